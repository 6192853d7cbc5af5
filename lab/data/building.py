"""From checked fields to requests: shared by all readers."""

from __future__ import annotations

from dataclasses import dataclass

from lab.data.cases import CaseProbe, EditCase
from lab.data.source import Row
from lab.data.text import distinct, template_of
from lab.errors import RequestError
from lab.records import EditRequest


@dataclass(frozen=True)
class ReadOptions:
    """Choices that a file leaves open.

    Attributes:
        convention: For zsRE: ``easyedit`` edits towards ``alt`` (a false answer), ``rome`` towards ``answers[0]`` (the true
            one, as the ROME and MEMIT papers do). The two are not comparable.
        seed: For ConvSent: draws the wording and the sentiment of each case.
    """

    convention: str = "easyedit"
    seed: int = 0


@dataclass(frozen=True)
class WantedEdit:
    """An edit as a file states it, before it is known whether the subject can be found.

    Attributes:
        prompt: Filled, or a template with one ``{}``.
        subject: As the file spells it.
        target_new: The new answer.
        old: The answer true without the edit, then its aliases; may be empty.
    """

    prompt: str
    subject: str
    target_new: str
    old: tuple[str, ...] = ()


def build_case(
    row: Row,
    id: str,
    format: str,
    edits: tuple[WantedEdit, ...],
    probes: tuple[CaseProbe, ...],
    meta: dict[str, str] | None = None,
) -> EditCase:
    """Makes a case; one whose subject cannot be located, or whose target is blank, says so in ``unsupported``."""
    requests: list[EditRequest] = []
    reason = "" if edits else "it asks for no edit"
    for number, edit in enumerate(edits):
        request_id = id if len(edits) == 1 else f"{id}/{number}"
        made = _request(request_id, edit)
        if isinstance(made, str):
            reason = made
            break
        requests.append(made)
    return EditCase(
        id=id,
        format=format,
        requests=() if reason else tuple(requests),
        probes=tuple(probe for probe in probes if probe.prompt.strip()),
        old_answers=tuple(distinct(edit.old) for edit in edits),
        file=row.file,
        line=row.line,
        unsupported=reason,
        meta=meta or {},
    )


def _request(id: str, edit: WantedEdit) -> EditRequest | str:
    target = edit.target_new.strip()
    old = next(iter(distinct(edit.old)), None)
    if edit.prompt.count("{}") == 1:
        prompt, subject = edit.prompt, edit.subject
    else:
        found = template_of(edit.prompt, edit.subject)
        if found is None:
            return f"the subject {edit.subject!r} does not occur in the prompt {edit.prompt!r}"
        prompt, subject = found
    try:
        return EditRequest(id, prompt, subject, target, old)
    except RequestError as error:
        return str(error)


def fill(prompt: str, subject: str) -> str:
    """The prompt with its ``{}`` filled, where it has one."""
    return prompt.replace("{}", subject)
