"""Token rows of an edit: the request in each context, with its target, and the row that holds the subject's essence fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lab.errors import RequestError, SubjectNotFoundError
from lab.handle import ModelHandle
from lab.records import EditRequest
from lab.tokens import filled_subject, join_target

FactToken = Literal["subject_last", "last"]
FACT_TOKENS: tuple[FactToken, ...] = ("subject_last", "last")

ESSENCE_PROMPT = "{} is a"
"""Prompt whose prediction at the subject is held fixed (ROME, section 3.1)."""


@dataclass(frozen=True)
class EditRow:
    """One token row.

    Attributes:
        ids: Prompt tokens, then all target tokens but the last (nothing is predicted from that one).
        change: Position where the edit acts.
        prompt_last: Position of the last prompt token.
        targets: Target tokens, predicted at ``prompt_last`` and the positions after it; empty for the essence row.
    """

    ids: tuple[int, ...]
    change: int
    prompt_last: int
    targets: tuple[int, ...] = ()

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens up to the change: all that a key or a value at the change depends on."""
        return self.ids[: self.change + 1]

    @property
    def wanted(self) -> list[int]:
        """Positions whose next token is looked at: those of the target, or the change of an essence row."""
        return [self.prompt_last + step for step in range(len(self.targets))] or [self.change]


def request_rows(
    handle: ModelHandle, request: EditRequest, contexts: Sequence[str], fact_token: FactToken = "subject_last"
) -> list[EditRow]:
    """The request in each context template, followed by its target.

    Raises:
        SubjectNotFoundError: No token covers the subject.
        EmptyTargetError: The target has no tokens.
    """
    rows = []
    for context in contexts:
        text, last = _filled(handle, request, request.prompt, context)
        head, target = join_target(handle.tokenizer, text, request.target_new)
        change = last if fact_token == "subject_last" else len(head) - 1
        rows.append(EditRow((*head, *target[:-1]), change, len(head) - 1, tuple(target)))
    return rows


def essence_row(handle: ModelHandle, request: EditRequest, fact_token: FactToken = "subject_last") -> EditRow:
    """The row ``"<subject> is a"``; its prediction is read where the edit acts, not after the tail."""
    text, last = _filled(handle, request, ESSENCE_PROMPT, "{}")
    if fact_token == "last":
        ids = tuple(handle.encode([text]).input_ids[0].tolist())
        return EditRow(ids, len(ids) - 1, len(ids) - 1)
    _, ids, _ = filled_subject(handle.tokenizer, ESSENCE_PROMPT, request.subject)
    return EditRow(tuple(ids), last, last)


def check_requests(requests: Sequence[EditRequest], *, one_per_subject: bool) -> None:
    """Refuses lists that contradict themselves.

    Args:
        requests: The list.
        one_per_subject: The method writes one value per subject, so a later request would overwrite an earlier one.

    Raises:
        RequestError: The list is empty, or two requests share an id, a prompt with subject, or (where it matters) a subject.
    """
    if not requests:
        raise RequestError("there is nothing to edit: the list of requests is empty")
    kinds = [("the same id", lambda request: request.id)]
    kinds.append(("the same prompt and subject", lambda request: request.text))
    if one_per_subject:
        kinds.append(
            (
                "the same subject, and the later edit would overwrite the earlier",
                lambda request: request.subject,
            )
        )
    for what, key in kinds:
        seen: dict[str, EditRequest] = {}
        for request in requests:
            if (name := key(request)) in seen:
                raise RequestError(
                    f"requests {seen[name].id!r} and {request.id!r} have {what} ({name!r}); edit them in separate calls"
                )
            seen[name] = request


def _filled(handle: ModelHandle, request: EditRequest, prompt: str, context: str) -> tuple[str, int]:
    try:
        text, _, span = filled_subject(handle.tokenizer, prompt, request.subject, context)
    except SubjectNotFoundError as error:
        raise SubjectNotFoundError(f"request {request.id!r}: {error}") from None
    return text, span[-1]
