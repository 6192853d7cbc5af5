"""What a benchmark file holds to be true before anybody edits: the raw material of a bed.

The counterfactual target of an edit never becomes an answer here. Where a file gives only what holds *after* an edit (reasoning and
logical generalisation in KnowEdit, multi-hop answers in MQuAKE), nothing is taken from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.data.cases import CaseProbe, EditCase
from lab.data.load import load_cases
from lab.data.source import Row, read_rows
from lab.data.text import distinct, template_of
from lab.errors import DataError, UnknownNameError

KINDS = ("counterfact", "knowedit", "mquake", "sadr", "zsre")
"""Names of the public files that a bed can be made from; each is also the suite that evaluates it."""

# Forms whose edits put in something true, or which state no short answer: there is nothing to know before the edit.
_NO_TRUTH = {
    "counterfact_questions": "it gives the new object only, not the true one",
    "qaedit": "its edit targets are the true answers, so nothing would be left to edit",
    "knowedit_wikibio": "it holds passages, not facts with a short answer",
    "knowedit_convsent": "it holds opinions, not facts",
    "knowedit_sanitation": "its edits erase answers by topic; use a bed of another subset",
}


@dataclass(frozen=True)
class Truth:
    """One prompt of a file with the answer that is true without the edit.

    Attributes:
        prompt: The text as the suite asks it, distracting lead included.
        answers: The answer to state, then other spellings of it.
        role: ``own`` (the edited fact in its first wording), ``paraphrase``, ``neighbor``, ``alias``, ``other`` (another fact about
            the subject, or an unrelated one).
        subject: What the prompt is about, or empty where the file does not say.
        template: The wording without the lead, ``{}`` for the subject; empty without a subject.
        relation: What wordings are shared by: the file's relation id, or the case's own template.
        lead: Unrelated text in front of the wording.
        request: Which edit of its case it belongs to.
    """

    prompt: str
    answers: tuple[str, ...]
    role: str
    subject: str = ""
    template: str = ""
    relation: str = ""
    lead: str = ""
    request: int = 0

    @property
    def core(self) -> str:
        """The prompt without its lead."""
        return self.template.replace("{}", self.subject) if self.template else self.prompt

    @property
    def fact(self) -> tuple[str, str]:
        """Names the fact: subject and relation, or the folded prompt alone."""
        return (fold(self.subject), self.relation) if self.subject else (fold(self.prompt), "")


@dataclass(frozen=True)
class TrueCase:
    """One case of the file and every truth that it states.

    Attributes:
        id: As the suite names it.
        truths: In file order.
        targets: Per edit, the filled prompt and the answer that must never follow it.
        insertion: The file gives no answer before the edit: the bed knows the subject, not the fact.
    """

    id: str
    truths: tuple[Truth, ...]
    targets: tuple[tuple[str, str], ...]
    insertion: bool = False


def fold(text: str) -> str:
    """Text for comparison: any white space is one space, case does not matter."""
    return " ".join(text.split()).casefold()


def read_true_cases(kind: str, files: Sequence[Path]) -> list[TrueCase]:
    """Reads what the files hold true.

    Args:
        kind: One of ``KINDS``.
        files: Local files that the suite ``kind`` reads.

    Returns:
        The cases that an editor could take, in file order.

    Raises:
        UnknownNameError: No such kind.
        DataError: A file is absent, malformed, of another suite, or states no answer that is true before an edit.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of bed", kind, KINDS)
    found: list[TrueCase] = []
    for file in files:
        if not file.is_file():
            raise DataError("no such file; a bed is made from a local file", file)
        cases = load_cases(file, suite=kind)
        if cases.format in _NO_TRUTH:
            raise DataError(f"cannot become a bed: {_NO_TRUTH[cases.format]}", file)
        pairs = list(zip(cases, read_rows(file), strict=True))
        usable = [(case, row) for case, row in pairs if not case.unsupported]
        templates = Wordings.of(usable)
        # Two files may use the same numbers; the case ids must stay apart.
        prefix = f"{file.stem}:" if len(files) > 1 else ""
        for case, row in usable:
            truths = tuple(_truths(case, row, templates))
            targets = tuple((request.text, request.target_new) for request in case.requests)
            insertion = not any(truth.role == "own" for truth in truths)
            if truths:
                found.append(TrueCase(prefix + case.id, truths, targets, insertion))
    if not found:
        raise DataError(
            "holds no case with an answer that is true before the edit", files[0] if files else None
        )
    return found


def _relation(case: EditCase, row: Row, number: int) -> str:
    """The file's relation id, or the template where it has none."""
    rewrite: Any = row.value.get("requested_rewrite")
    if isinstance(rewrite, list):
        rewrite = rewrite[number] if number < len(rewrite) else None
    named = rewrite.get("relation_id") if isinstance(rewrite, Mapping) else None
    return str(named) if named else case.requests[number].prompt


@dataclass(frozen=True)
class Wordings:
    """How a file words its relations.

    Attributes:
        by_relation: Templates of a relation's edits and of their paraphrases, longest first.
        everywhere: Template and relation of all edits, longest first.
        named: Whether the file names its relations.
    """

    by_relation: Mapping[str, tuple[str, ...]]
    everywhere: tuple[tuple[str, str], ...]
    named: bool

    @classmethod
    def of(cls, cases: Sequence[tuple[EditCase, Row]]) -> Wordings:
        """Collects the templates of a file: what its paraphrases end in and its neighbours and hops are worded like."""
        own: dict[str, dict[str, None]] = {}
        named = False
        for case, row in cases:
            for number, request in enumerate(case.requests):
                relation = _relation(case, row, number)
                named = named or relation != request.prompt
                own.setdefault(relation, {})[request.prompt] = None
                if case.format == "mquake" and number < len(case.of("question")):
                    found = template_of(case.of("question")[number].prompt, request.subject)
                    own[relation] |= {found[0]: None} if found else {}
        whole = {relation: {**names} for relation, names in own.items()}
        for case, row in cases:
            for probe in case.of("paraphrase") if case.format != "mquake" else ():
                relation = _relation(case, row, 0)
                truth = _worded(probe.prompt, case.requests[0].subject, (), relation, _longest(own[relation]))
                whole[relation] |= {truth.template: None} if truth.template else {}
        pairs = {template: relation for relation, names in own.items() for template in names}
        return cls(
            {relation: _longest(names) for relation, names in whole.items()},
            tuple((template, pairs[template]) for template in _longest(pairs)),
            named,
        )


def _longest(templates: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(templates, key=lambda template: (-len(template), template)))


def _truths(case: EditCase, row: Row, wordings: Wordings) -> Iterator[Truth]:
    old = [distinct(answers) for answers in case.old_answers]
    for number, request in enumerate(case.requests):
        if not old[number]:
            continue
        relation = _relation(case, row, number)
        yield Truth(
            request.text, old[number], "own", request.subject, request.prompt, relation, request=number
        )
        if case.format == "mquake":
            question = case.of("question")[number] if number < len(case.of("question")) else None
            if question is not None:
                yield _worded(question.prompt, request.subject, old[number], relation, (), number)
    if case.format == "mquake":
        yield from _hops(case, row, wordings)
        return
    request, relation, answers = case.requests[0], _relation(case, row, 0), old[0]
    known = wordings.by_relation.get(relation, ())
    for probe in case.probes:
        if probe.group == "paraphrase" and answers:
            yield _worded(probe.prompt, request.subject, answers, relation, known)
        elif probe.group == "neighborhood":
            yield _neighbor(probe, relation, wordings)
        elif probe.group == "portability" and answers and probe.kind in ("subject_alias", "subject_aliasing"):
            name = _fill_of(request.prompt, probe.prompt)
            if name and fold(probe.answers[0]) == fold(request.target_new):
                yield Truth(probe.prompt, answers, "alias", name, request.prompt, relation)
        elif probe.group == "relation" or (probe.group == "locality" and probe.kind != "forgetfulness"):
            # Forgetfulness prompts name the new target ("..., which is not Rome, is"), so they are left out.
            yield _other(probe, request.subject)


def _hops(case: EditCase, row: Row, wordings: Wordings) -> Iterator[Truth]:
    """MQuAKE's single hops before the edits, and those after that no edit touches: they hold all the same."""
    edited = {fold(request.text) for request in case.requests}
    for key in ("single_hops", "new_single_hops"):
        for hop in row.value.get(key) or ():
            answers = distinct([str(hop.get("answer", "")), *map(str, hop.get("answer_alias") or ())])
            cloze = str(hop.get("cloze", ""))
            if not answers or not cloze.strip() or fold(cloze) in edited:
                continue
            first = _parsed(cloze, answers, "other", wordings.everywhere)
            yield first
            question = str(hop.get("question", ""))
            if question and first.subject:
                found = template_of(question, first.subject)
                if found is not None and found[1] == first.subject:
                    yield Truth(question, answers, "other", first.subject, found[0], first.relation)


def _worded(
    prompt: str, subject: str, answers: tuple[str, ...], relation: str, known: Sequence[str], request: int = 0
) -> Truth:
    """A further wording of the edited fact, parted from the unrelated text in front of it."""
    found = template_of(prompt, subject)
    if found is None:
        return Truth(prompt, answers, "paraphrase", relation=relation, request=request)
    whole, spelled = found
    before, after = whole.split("{}")
    start = next((len(before) - len(t.split("{}")[0]) for t in known if _ends(before, after, t)), None)
    if start is None:
        # No edit of the relation is worded like this: the wording begins after the last sentence or line.
        start = max(
            [before.rfind(mark) + len(mark) for mark in (". ", "! ", "? ", "\n", ".\xa0") if mark in before],
            default=0,
        )
    return Truth(prompt, answers, "paraphrase", spelled, whole[start:], relation, whole[:start], request)


def _ends(before: str, after: str, template: str) -> bool:
    head, tail = template.split("{}")
    rest = before[: len(before) - len(head)]
    return tail == after and before.endswith(head) and (not rest or rest[-1].isspace())


def _neighbor(probe: CaseProbe, relation: str, wordings: Wordings) -> Truth:
    shared = [(template, relation) for template in wordings.by_relation.get(relation, ())]
    # Without named relations a neighbour is worded like some other edit, which then names its relation.
    return _parsed(probe.prompt, probe.answers, "neighbor", shared if wordings.named else wordings.everywhere)


def _parsed(prompt: str, answers: tuple[str, ...], role: str, known: Iterable[tuple[str, str]]) -> Truth:
    for template, relation in known:
        name = _fill_of(template, prompt)
        if name:
            return Truth(prompt, answers, role, name, template, relation)
    return Truth(prompt, answers, role)


def _other(probe: CaseProbe, subject: str) -> Truth:
    found = template_of(probe.prompt, subject)
    if found is None:
        return Truth(probe.prompt, probe.answers, "other")
    return Truth(probe.prompt, probe.answers, "other", found[1], found[0], found[0])


def _fill_of(template: str, text: str) -> str:
    """What stands for ``{}`` in ``text``, or nothing where it is worded otherwise."""
    head, tail = template.split("{}")
    inside = text[len(head) : len(text) - len(tail)] if tail else text[len(head) :]
    return inside if text == head + inside + tail and inside.strip() == inside else ""
