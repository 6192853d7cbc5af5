"""Preference pairs against contextual ignorance and contextual overinclusion, and what keeps them balanced.

KnowPO (arXiv:2408.03297): where documents hold the answer it is preferred to what memory says (ignorance) and to anything
else the documents hold (overinclusion); where they do not, memory is preferred, or an admission where memory has nothing.
The rejected answers are the trained model's own, as far as it makes the mistake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.data.text import normalize_answer
from lab.errors import ConfigError
from lab.records import Passage
from lab.tokens import encode_ids
from rag.notes import one_line
from rag.preference.match import find_spans, same, same_as_any, says
from rag.preference.stage import Dataset, Record, Report, Stage, draw_for, finish, records, share_of
from rag.prompts import Prompts, prompts_for

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.readers.base import Reading

# Words; a whole sentence copied from a document is no answer.
_LONGEST_ANSWER = 12
# Contexts; enough that those of a pass are about equally long, few enough that a long reading shows how far it is.
_READ_AT_ONCE = 256
ERRORS = ("ignorance", "overinclusion_mixed", "overinclusion_known", "overinclusion_unknown")
DEFAULT_SHARES: Mapping[str, float] = {"sft": 0.35, "dpo": 0.5, "dev": 0.15}


@dataclass(frozen=True)
class Frame:
    """How an answer is worded by where it comes from; ``{}`` is the answer.

    Attributes:
        context: From the documents.
        memory: From memory, as the documents do not say.
        unknown: From nowhere; ``{}`` may be absent.
    """

    context: str = "{}"
    memory: str = "{}"
    unknown: str = "{}"

    def word(self, role: str, answer: str) -> str:
        """The answer in its frame.

        Raises:
            ConfigError: There is no such role.
        """
        if role not in ("context", "memory", "unknown"):
            raise ConfigError(f"role {role!r} of an answer is not one of context, memory, unknown")
        return getattr(self, role).replace("{}", answer)


BARE = Frame()
SENTENCES = Frame(
    "From the documents, the answer is: {}",
    "From my own memory, the answer is: {}",
    "From neither source, the answer is: {}",
)


def split_by_title(data: Dataset, shares: Mapping[str, float] = DEFAULT_SHARES, *, seed: int = 0) -> Stage:
    """Puts whole titles into splits by a seeded hash, so that no title is trained on and tested.

    Args:
        data: Items.
        shares: Split to share; they are scaled to sum to 1.
        seed: Seeds the hash.
    """
    total = sum(shares.values())
    if not shares or min(shares.values()) < 0 or total <= 0:
        raise ConfigError(
            f"shares of splits must be positive numbers, they are {dict(shares)}; give them like sft=0.4"
        )
    rows = records(data)
    for row in rows:
        at = share_of(seed, normalize_answer(row["title"])) * total
        for name, share in shares.items():
            row["split"] = name
            at -= share
            if at < 0:
                break
    return finish("split", len(rows), rows, shares=dict(shares), seed=seed)


def read_contexts(
    handle: ModelHandle,
    data: Dataset,
    *,
    skip: Sequence[str] = (),
    reader: str = "direct",
    progress: Report | None = None,
) -> Stage:
    """Lets the model answer every context: where its on-policy mistakes come from.

    A reader that leaves documents out may leave none; a context that holds an answer is then dropped, as no prompt shows it.

    Args:
        handle: The model.
        data: Contexts.
        skip: Splits whose contexts are not answered, as nothing is rejected there. Of other readers than the direct one all are, as
            only its prompts are known without asking.
        reader: The reader's name.
        progress: Told about every part of the contexts.

    Adds:
        ``prompt``, ``lead`` (what the reader lets the model write before the answer: notes), ``read`` (the answer; empty where
        skipped), ``read_raw`` (as generated).
    """
    from rag.readers import READERS

    asker = READERS.get(reader)(handle)
    prompts = asker.prompts
    rows = records(data)
    items = [(row["question"], [Passage("", text) for text in row["documents"]]) for row in rows]
    for row, (question, passages) in zip(rows, items, strict=True):
        row |= {"prompt": prompts.direct(question, passages), "lead": "", "read": "", "read_raw": ""}
    asked = [place for place, row in enumerate(rows) if reader != "direct" or row["split"] not in skip]
    readings: list[Reading] = []
    for begin in range(0, len(asked), _READ_AT_ONCE):
        readings += asker.read_many([items[place] for place in asked[begin : begin + _READ_AT_ONCE]])
        if progress:
            progress("reading", len(readings), len(asked))
    for place, reading in zip(asked, readings, strict=True):
        raw = f" {reading.answer}" if asker.takes_notes else reading.raw
        rows[place] |= {
            "prompt": reading.prompt,
            "lead": reading.lead,
            "read": reading.answer,
            "read_raw": raw,
        }
    made = [
        row
        for row in rows
        if row["context"] == "irrelevant" or row["prompt"] != prompts.closed(row["question"])
    ]
    gone = {"the reader kept no document": len(rows) - len(made)}
    told = {"model": handle.fingerprint, "state": handle.state, "reader": reader}
    return finish("reading", len(rows), made, gone, skip=list(skip), **told)


def pairs(handle: ModelHandle, data: Dataset, *, seed: int = 0) -> Stage:
    """One pair for every context: the right answer, and the mistake to be unlearned.

    A mistake that the model makes itself is what its pair rejects, be it a word of the documents, its memory or an admission.
    Where it makes none, a context that holds an answer serves one error, drawn, or the other where the model's memory agrees with
    the documents or the documents hold no second answer: memory is rejected, or that answer. Only documents that the prompt shows
    count, so that nothing is rejected which could not have been read there.

    Adds:
        ``error_type``, ``chosen_answer``, ``chosen_role``, ``rejected_answer``, ``rejected_role``, ``rejected_raw``,
        ``rejected_from`` (``memory``, ``on_policy``, ``span`` or ``unknown``).
    """
    prompts = prompts_for(handle)
    rows = records(data)
    names: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        found = names.setdefault((row["split"], row["answer_type"]), set())
        found.update(answer for answer in (*row["answers"], row["counterfactual"]) if answer)
    shelf = {(row["split"], row["passage"]): row for row in rows if row["answers"]}
    dropped: Counter[str] = Counter()
    made = []
    for row in rows:
        prompt = one_line(row["prompt"])
        told = [text for text in row["documents"] if one_line(text) in prompt]
        beside = [shelf[row["split"], text] for text in told if (row["split"], text) in shelf]
        same_title = sorted({each["answers"][0] for each in beside if each["title"] == row["title"]})
        named = sorted(names[row["split"], row["answer_type"]])
        maker = _PairMaker(row, prompts, "\n".join(told), (named, same_title), seed)
        pair = maker.make()
        if pair is None:
            dropped[f"{row['context']}: no mistake to reject"] += 1
        elif same(pair["chosen_answer"], pair["rejected_answer"]):
            dropped["chosen and rejected are the same answer"] += 1
        else:
            made.append(row | pair)
    return finish("pairs", len(rows), made, dropped, seed=seed)


@dataclass(frozen=True)
class _Rejected:
    """An answer to be rejected: whose words it is, how it was found, and as it was generated."""

    answer: str
    role: str
    source: str
    raw: str


class _PairMaker:
    """Makes the pair of one context.

    Args:
        row: The context, with memory and the model's reading.
        prompts: Words of the model.
        told: The documents that it was shown.
        names: What may be mistaken for the answer: answers of the type; where none of them stands in a document, what a document
            about the same title says of something else.
        seed: Of every draw.
    """

    def __init__(
        self, row: Record, prompts: Prompts, told: str, names: Sequence[Sequence[str]], seed: int
    ) -> None:
        self.row, self.prompts, self.told, self.names = row, prompts, told, names
        self.rng = draw_for(seed, "pair", row["id"], row["context"])

    def make(self) -> Record | None:
        row = self.row
        if row["context"] != "irrelevant":
            makers = [self._ignorance, self._mixed]
            self.rng.shuffle(makers)
            return self._made() or makers[0]() or makers[1]()
        if row["prior_known"]:
            right = [row["prior"], *row["memory"]]
            over = self._mistake(right) or self._span(right)
            return self._pair("overinclusion_known", row["prior"], "memory", over)
        if row["prior_unknown"] < 0.5 and row["memory"]:
            # Memory is unsure: neither its answer nor an admission is plainly right.
            return None
        over = self._mistake(row["answers"]) if self.prompts.knows(row["read"]) else None
        return self._pair(
            "overinclusion_unknown", self.prompts.unknown, "unknown", over or self._span(row["answers"])
        )

    def _made(self) -> Record | None:
        """Against the mistake that the model makes itself on a context which holds an answer."""
        answers = self.row["context_answers"]
        made = self._mistake(answers)
        error = "overinclusion_mixed" if made and made.role == "context" else "ignorance"
        return self._pair(error, answers[0], "context", made)

    def _ignorance(self) -> Record | None:
        answers, prior, raw = self.row["context_answers"], self.row["prior"], self.row["prior_raw"]
        if not self.prompts.knows(prior):
            rejected = _Rejected(self.prompts.unknown, "unknown", "unknown", raw)
        elif same_as_any(prior, answers):
            return None
        else:
            rejected = _Rejected(prior, "memory", "memory", raw)
        return self._pair("ignorance", answers[0], "context", rejected)

    def _mixed(self) -> Record | None:
        answers = self.row["context_answers"]
        return self._pair("overinclusion_mixed", answers[0], "context", self._span(answers))

    def _mistake(self, right: Sequence[str]) -> _Rejected | None:
        """What the model answers, where it is wrong and as short as an answer."""
        read, raw = self.row["read"], self.row["read_raw"]
        if not read or len(read.split()) > _LONGEST_ANSWER or same_as_any(read, right):
            return None
        if not self.prompts.knows(read):
            return _Rejected(self.prompts.unknown, "unknown", "on_policy", raw)
        copied = says(self.told, [read])
        return _Rejected(read, "context" if copied else "memory", "on_policy", raw)

    def _span(self, right: Sequence[str]) -> _Rejected | None:
        """Another answer that stands in the documents."""
        for names in self.names:
            found = {self.told[start:end] for start, end in find_spans(self.told, names)}
            if spans := sorted(span for span in found if not same_as_any(span, right)):
                span = self.rng.choice(spans)
                return _Rejected(span, "context", "span", span)
        return None

    def _pair(self, error: str, chosen: str, role: str, rejected: _Rejected | None) -> Record | None:
        if rejected is None:
            return None
        return {
            "error_type": error,
            "chosen_answer": chosen,
            "chosen_role": role,
            "rejected_answer": rejected.answer,
            "rejected_role": rejected.role,
            "rejected_raw": rejected.raw,
            "rejected_from": rejected.source,
        }


def word_pairs(
    handle: ModelHandle,
    data: Dataset,
    *,
    frame: Frame = BARE,
    rewrite: bool = True,
    most_tokens: int = 8,
    share: float = 0.2,
) -> Stage:
    """Writes both answers of a pair in one style and keeps pairs of nearly one length.

    Args:
        handle: Gives tokens and the end of answers.
        data: Pairs.
        frame: How answers are worded.
        rewrite: Off, the rejected text stays as the model wrote it and lengths are free: KnowPO's ablation.
        most_tokens: Lengths may differ by this many tokens,
        share: or by this share of the longer one, whichever is more.

    Adds:
        ``chosen`` and ``rejected``, each as it follows the prompt: what leads up to the answer, a blank, the text, the stop.
    """
    stop = prompts_for(handle).stop[0]
    rows = records(data)
    made, dropped, differences = [], Counter[str](), []
    for row in rows:
        texts = [
            frame.word(row[f"{side}_role"], row[f"{side}_answer"])
            if rewrite or side == "chosen"
            else row["rejected_raw"].strip()
            for side in ("chosen", "rejected")
        ]
        if not texts[1] or normalize_answer(texts[0]) == normalize_answer(texts[1]):
            dropped["the two texts are the same, or one is empty"] += 1
            continue
        lengths = [len(encode_ids(handle.tokenizer, f" {text}{stop}")) for text in texts]
        if rewrite and abs(lengths[0] - lengths[1]) > max(most_tokens, share * max(lengths)):
            dropped["lengths differ too much"] += 1
            continue
        differences.append(lengths[0] - lengths[1])
        chosen, rejected = (f"{row.get('lead', '')} {text}{stop}" for text in texts)
        made.append(row | {"chosen": chosen, "rejected": rejected})
    histogram = {str(size): count for size, count in sorted(Counter(differences).items())}
    mean = sum(differences) / len(differences) if differences else 0.0
    return finish(
        "rewrite", len(rows), made, dropped, rewrite=rewrite, most_tokens=most_tokens, share=share,
        length_differences=histogram, mean_length_difference=mean,
    )  # fmt: skip
