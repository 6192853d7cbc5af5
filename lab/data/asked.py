"""What the files of unlearning benchmarks ask: typed items, whichever file they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lab.data.cases import Skip


@dataclass(frozen=True)
class Asked:
    """One question, cloze, continuation or text of an unlearning benchmark.

    Attributes:
        id: Stable name: format and line, and a number where a row holds several.
        group: What it is: ``qa``, ``cloze``, ``attack``, ``neighbor_qa``, ``neighbor_cloze``, ``choice``, ``continuation``,
            ``text``, ``unrelated``, ``refusal``, ``target``, ``instruction``, ``relation``.
        prompt: What the model is given; empty for a text.
        answers: The right answer (for ``text`` the text, for ``continuation`` what follows), then other spellings.
        paraphrase: The question in other words, or empty.
        paraphrased_answer: The right answer in other words, or empty.
        wrong: Perturbed or false answers.
        options: Of a choice, all of them in the file's order.
        subject: Whom or what it is about, or empty.
        file: Where it came from.
        line: 1-based line of its row.
        meta: Further plain values from the row.
    """

    id: str
    group: str
    prompt: str
    answers: tuple[str, ...]
    paraphrase: str = ""
    paraphrased_answer: str = ""
    wrong: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    subject: str = ""
    file: str = ""
    line: int = 0
    meta: Mapping[str, str] = field(default_factory=dict)

    @property
    def answer(self) -> str:
        """The first right answer; empty where the file gives none."""
        return self.answers[0] if self.answers else ""


@dataclass(frozen=True)
class AskedSet:
    """All items of one file.

    Attributes:
        suite: The benchmarks that use the form.
        format: Name of the file form.
        source: Path or hub id.
        items: In file order.
        rows: Records that gave them.
        malformed: Rows that broke the schema, when they were asked to be skipped.
    """

    suite: str
    format: str
    source: str
    items: tuple[Asked, ...]
    rows: int
    malformed: tuple[Skip, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.items)
