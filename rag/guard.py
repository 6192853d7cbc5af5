"""The guard: what was to be forgotten does not come back through a document.

A document, or a few of them together, can tell a model again what its weights have lost (arXiv:2407.00106). Five gates stand in the
way: ``ingest`` (a text that states a forgotten fact), ``query`` (a question that asks for one), ``chunk`` (a passage that makes a
forgotten answer likelier, by itself), ``set`` (passages that do so only together) and ``output`` (an answer that gives one away).
What is stopped reads like what is not known.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from lab.data.text import normalize_answer
from lab.errors import ConfigError, DataError
from lab.records import Fact, Passage
from lab.scoring import score_targets
from rag.facts import names_of, question_of
from rag.ledger.conflicts import mentions

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.ledger.values import Entry

Gate = Literal["ingest", "query", "chunk", "set", "output"]
GATES: tuple[Gate, ...] = get_args(Gate)
# Calibrated gates close no earlier: below, a forgotten answer is not even twice as likely. Our choice.
LEAST_GAIN = 0.5
# Words that connect no two texts.
_EMPTY_WORDS = (
    "is are was were be been has have had do does did of in on at by to for from with as and or not no nothing it its his her "
    "their this that these those he she they i you we what which who whom whose where when how why here there said say name "
    "another same q"
)


@dataclass(frozen=True)
class Forgotten:
    """A fact that was to be forgotten.

    Attributes:
        names: Names of its subject.
        question: Asks for its object.
        cues: Words of its attribute; a question with a name and a cue asks for the fact.
        answers: Its object and the object's other names.
    """

    names: tuple[str, ...]
    question: str
    cues: tuple[str, ...]
    answers: tuple[str, ...]

    @classmethod
    def of(cls, fact: Fact) -> Forgotten:
        """The fact of a record, worded as the built-in world words it."""
        from lab.atlas.forms import load_format

        relations = load_format().relations
        label = relations[fact.relation].label if fact.relation in relations else fact.relation
        question = question_of(fact) or f"{fact.text}?"
        return cls((fact.subject, *names_of(fact)), question, (label,), fact.answers)

    @classmethod
    def of_entry(cls, entry: Entry) -> Forgotten:
        """The fact of a ledger's entry."""
        from lab.atlas.forms import load_format

        fact, relations = entry.fact, load_format().relations
        label = relations[fact.relation].label if fact.relation in relations else fact.relation
        question = fact.question or f"{(fact.prompt or '{}').replace('{}', fact.subject)}?"
        return cls(fact.names, question, (label,), tuple(dict.fromkeys((*fact.answers, *entry.old))))

    def told_by(self, text: str) -> bool:
        """Whether a text holds a name of the subject and an answer."""
        return mentions(text, self.names) and mentions(text, self.answers)

    def named_by(self, texts: Sequence[str]) -> bool:
        """Whether one of some texts holds a name of the subject; an answer alone may be anybody's."""
        return any(mentions(text, self.names) for text in texts)


@dataclass(frozen=True)
class Thresholds:
    """Where the measuring gates close.

    Attributes:
        query: Smallest share of words that a question shares with a forgotten one (Jaccard).
        chunk: Smallest gain of a forgotten answer by one passage, in nats a token.
        joint: The same by all passages together.
        rate: Share of harmless cases above each threshold that was allowed.
        cases: How many harmless cases each was set on: query, chunk, joint.
        people: Whose facts they were set on; nobody of them may be measured.
    """

    query: float = 1.0
    chunk: float = 1.0
    joint: float = 1.0
    rate: float = 0.01
    cases: tuple[int, int, int] = (0, 0, 0)
    people: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What the gates let through.

    Attributes:
        answer: The answer to be given; the word for unknown where it was stopped, ``None`` where there was no draft.
        passages: Passages that may be read.
        stopped: Whether a question or a draft was stopped.
        gate: The first gate that closed; ``None`` where all stayed open.
        why: What it saw, for the log and never for the user.
        blocked: Passage, gate, and reason of every passage that may not be read.
    """

    answer: str | None
    passages: tuple[Passage, ...]
    stopped: bool = False
    gate: Gate | None = None
    why: str = ""
    blocked: tuple[tuple[str, Gate, str], ...] = ()


class Guard:
    """Five gates before a model.

    Args:
        handle: The model, with its patches.
        forgotten: What must not come back.
        thresholds: See ``calibrate``.
        gates: Which gates are on.

    Raises:
        ConfigError: There is no such gate.
    """

    def __init__(
        self,
        handle: ModelHandle,
        forgotten: Sequence[Forgotten],
        thresholds: Thresholds | None = None,
        *,
        gates: Sequence[Gate] = GATES,
    ) -> None:
        from rag.prompts import prompts_for

        if unknown := [gate for gate in gates if gate not in GATES]:
            raise ConfigError(f"unknown gate {unknown[0]!r}; use {', '.join(GATES)}")
        self.handle = handle
        self.forgotten = tuple(forgotten)
        self.thresholds = thresholds or Thresholds()
        self.gates = frozenset(gates)
        self.prompts = prompts_for(handle)
        self._alone: tuple[tuple[str, ...], dict[Forgotten, float]] = ((), {})

    def admits(self, text: str) -> bool:
        """Whether a text may be taken in (gate ``ingest``)."""
        return "ingest" not in self.gates or not any(fact.told_by(text) for fact in self.forgotten)

    def check(self, question: str, passages: Sequence[Passage], draft: str | None = None) -> Decision:
        """Looks at a question, what was retrieved for it, and an answer where there is one.

        Args:
            question: As asked.
            passages: What was retrieved.
            draft: What the model would answer from the passages that a check without a draft let through.
        """
        unknown = self.prompts.unknown
        if "query" in self.gates:
            for fact in self.forgotten:
                asked = mentions(question, fact.names) and mentions(question, fact.cues)
                alike = similarity(question, fact.question)
                if asked or alike >= self.thresholds.query:
                    why = f"asks for {fact.question!r} (similarity {alike:.2f})"
                    return Decision(None if draft is None else unknown, (), True, "query", why)
        kept, blocked = self._sift(question, passages)
        first = blocked[0] if blocked else None
        decision = Decision(
            draft, kept, gate=first[1] if first else None, why=first[2] if first else "", blocked=blocked
        )
        if draft is None or "output" not in self.gates:
            return decision
        for fact in named(self.forgotten, question, passages):
            if mentions(draft, fact.answers):
                return replace(
                    decision,
                    answer=unknown,
                    stopped=True,
                    gate=decision.gate or "output",
                    why=decision.why or f"the answer gives away {fact.question!r}",
                )
        return decision

    def answer(
        self, question: str, passages: Sequence[Passage], read: Callable[[Sequence[Passage]], str]
    ) -> Decision:
        """Has a question answered behind the gates; a draft that is stopped is tried once more without passages.

        Args:
            question: As asked.
            passages: What was retrieved.
            read: Answers the question with passages.
        """
        before = self.check(question, passages)
        if before.stopped:
            return replace(before, answer=self.prompts.unknown)
        after = self.check(question, before.passages, read(before.passages))
        if not after.stopped:
            return replace(after, gate=before.gate, why=before.why, blocked=before.blocked)
        again = self.check(question, (), read(())) if before.passages else after
        answer = self.prompts.unknown if again.stopped else again.answer
        return replace(after, answer=answer, passages=(), blocked=before.blocked)

    def _sift(
        self, question: str, passages: Sequence[Passage]
    ) -> tuple[tuple[Passage, ...], tuple[tuple[str, Gate, str], ...]]:
        kept: list[Passage] = []
        blocked: list[tuple[str, Gate, str]] = []
        # A new name in one passage and what it stands for in another: only all of them together name the subject.
        near = named(self.forgotten, question, passages) if {"chunk", "set"} & self.gates else []
        for passage in passages:
            if not self.admits(passage.text):
                blocked.append((passage.id, "ingest", "states a forgotten fact"))
                continue
            gain, fact = self._gain(near, [passage]) if "chunk" in self.gates else (0.0, None)
            if fact is not None and gain > self.thresholds.chunk:
                blocked.append((passage.id, "chunk", f"{fact.question!r}: gain {gain:.2f}"))
            else:
                kept.append(passage)
        if "set" in self.gates and len(kept) > 1:
            gain, fact = self._gain(near, kept)
            if fact is not None and gain > self.thresholds.joint:
                why = f"{fact.question!r}: joint gain {gain:.2f}"
                blocked.extend((passage.id, "set", why) for passage in kept)
                kept = []
        return tuple(kept), tuple(blocked)

    def _gain(self, near: Sequence[Forgotten], passages: Sequence[Passage]) -> tuple[float, Forgotten | None]:
        """The largest gain over some facts, and its fact."""
        gains = leak_gains(self.handle, near, passages, self._without())
        best = max(range(len(near)), key=gains.__getitem__, default=None)
        return (0.0, None) if best is None else (gains[best], near[best])

    def _without(self) -> dict[Forgotten, float]:
        """Scores of forgotten answers without passages, of the weights as they are now."""
        state = tuple(entry.patch.id for entry in self.handle.applied)
        if state != self._alone[0]:
            self._alone = (state, {})
        return self._alone[1]


def named(facts: Sequence[Forgotten], question: str, passages: Sequence[Passage]) -> list[Forgotten]:
    """Those facts whose subject the question names, or a passage that has to do with it; the others cost no look at the model."""
    texts = connected(question, passages)
    return [fact for fact in facts if fact.named_by(texts)]


def connected(question: str, passages: Sequence[Passage]) -> list[str]:
    """The question and the passages that share a word with it, or with a passage that does; words that say nothing do not count.

    A new name for a subject, or a chain of them, connects the passage that gives it; a name beside the point does not. A question
    that no passage shares a word with (a short one of a conversation) may be about any of them, so all count.
    """
    found, left = [question], [passage.text for passage in passages]
    seen = _content(question)
    while more := [text for text in left if seen & _content(text)]:
        found += more
        left = [text for text in left if text not in more]
        seen = seen.union(*map(_content, more))
    return found if len(found) > 1 else found + left


def _content(text: str) -> set[str]:
    return set(normalize_answer(text).split()) - set(_EMPTY_WORDS.split())


def leak_gains(
    handle: ModelHandle,
    facts: Sequence[Forgotten],
    passages: Sequence[Passage],
    alone: MutableMapping[Forgotten, float] | None = None,
) -> list[float]:
    """How much likelier passages make each forgotten answer to its own question, in nats a token.

    Args:
        handle: The model.
        facts: The facts.
        passages: What is read.
        alone: Scores of answers without passages, filled and reused.
    """
    from rag.prompts import prompts_for

    if not facts:
        return []
    held = {} if alone is None else alone
    missing = [fact for fact in dict.fromkeys(facts) if fact not in held]
    prompts = prompts_for(handle)
    pairs = [(prompts.direct(fact.question, passages), fact.answers[0]) for fact in facts]
    pairs += [(prompts.closed(fact.question), fact.answers[0]) for fact in missing]
    scores = [score.mean_logprob for score in score_targets(handle, pairs)]
    held.update(zip(missing, scores[len(facts) :], strict=True))
    return [score - held[fact] for fact, score in zip(facts, scores, strict=False)]


def similarity(one: str, other: str) -> float:
    """Shared words over all words of two texts."""
    left, right = set(normalize_answer(one).split()), set(normalize_answer(other).split())
    return len(left & right) / len(left | right) if left | right else 0.0


def threshold(scores: Sequence[float], rate: float) -> float:
    """The smallest score among those given that at most a share ``rate`` of them exceeds.

    Raises:
        DataError: There are no scores, or ``rate`` is no share.
    """
    if not scores or not 0 <= rate < 1:
        raise DataError(f"a threshold needs scores and a rate below 1; there are {len(scores)}, rate {rate}")
    ordered = sorted(scores)
    return ordered[len(ordered) - 1 - int(rate * len(ordered))]


def calibrate(
    handle: ModelHandle,
    forgotten: Sequence[Fact],
    harmless: Sequence[tuple[str, Sequence[Passage]]],
    *,
    rate: float = 0.01,
) -> Thresholds:
    """Sets the thresholds so that harmless questions and passages pass.

    Args:
        handle: The model.
        forgotten: Forgotten facts of the people that are calibrated on.
        harmless: Questions about what is kept, with what was retrieved for them.
        rate: Share of harmless cases that each gate may stop.

    Raises:
        DataError: There is nothing to calibrate on.
    """
    facts = [Forgotten.of(fact) for fact in forgotten]
    asked = (
        [max(similarity(question, fact.question) for fact in facts) for question, _ in harmless]
        if facts
        else []
    )
    single: list[float] = []
    joint: list[float] = []
    alone: dict[Forgotten, float] = {}
    for question, passages in harmless:
        near = named(facts, question, passages)
        for some, scores in [*(([one], single) for one in passages), (list(passages), joint)]:
            scores.append(max(leak_gains(handle, near, some, alone), default=0.0))
    # A question must share more than any harmless one did.
    query = min(1.0, threshold(asked, rate) + 1e-6)
    people = tuple(dict.fromkeys(fact.subject for fact in forgotten))
    return Thresholds(
        query,
        max(LEAST_GAIN, threshold(single, rate)),
        max(LEAST_GAIN, threshold(joint, rate)),
        rate,
        (len(asked), len(single), len(joint)),
        people,
    )
