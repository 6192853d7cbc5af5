"""Where a fact is read from: causal tracing. The logit lens of ``lab.lens`` is offered here too.

Causal tracing (Meng et al. 2022, section 2) hides a subject behind noise, puts single clean activations back, and looks how
much of the answer returns. Every (token, layer) pair and noise sample is a row of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lab.errors import ConfigError, RequestError
from lab.lens import LogitLens, logit_lens
from lab.records import Fact
from lab.restoration import KIND_ROLES, Kind, clean_cases, noise_std_of, trace_cases
from lab.tokens import encode_ids, filled_subject, join_target, subject_span

if TYPE_CHECKING:
    from lab.handle import ModelHandle

__all__ = [
    "POSITION_CLASSES",
    "LogitLens",
    "SiteReport",
    "TraceResult",
    "causal_trace",
    "logit_lens",
    "position_class",
    "subject_site",
]

PositionClass = Literal[
    "before", "subject_first", "subject_middle", "subject_last", "first_after", "further", "last"
]
POSITION_CLASSES: tuple[PositionClass, ...] = (
    "before", "subject_first", "subject_middle", "subject_last", "first_after", "further", "last",
)  # fmt: skip

# ROME restores 10 of GPT-2 XL's 48 layers at once for MLP and attention.
_WINDOW_SHARE = 10 / 48


def position_class(token: int, subject: range, length: int) -> PositionClass:
    """Names a token's place relative to the subject, in a prompt of ``length`` tokens.

    A one-token subject is ``subject_last``; the prompt's last token is ``last`` unless it belongs to the subject.
    """
    if token in subject:
        if token == subject[-1]:
            return "subject_last"
        return "subject_first" if token == subject[0] else "subject_middle"
    if token < subject[0]:
        return "before"
    if token == length - 1:
        return "last"
    return "first_after" if token == subject[-1] + 1 else "further"


@dataclass(frozen=True, eq=False)
class TraceResult:
    """How much of an answer each restored activation brings back.

    Attributes:
        clean: Probability of the answer without noise.
        corrupted: The same with the subject under noise, mean over samples.
        effects: ``[token, layer]``, probability with that activation restored minus ``corrupted`` (the indirect effect).
        tokens: Text of each token.
        subject: Token positions of the subject.
        answer: The model's most probable next token without noise, which all of this is about.
        kind: What was restored: ``block``, ``mlp`` or ``attn`` outputs.
        window: Layers restored together, centred on the map's layer.
        noise_std: Standard deviation of the noise on the subject's embeddings.
    """

    clean: float
    corrupted: float
    effects: Tensor
    tokens: tuple[str, ...]
    subject: range
    answer: str
    kind: Kind
    window: int
    noise_std: float

    @property
    def peak(self) -> tuple[int, int]:
        """Token and layer of the largest effect."""
        return divmod(int(self.effects.argmax()), self.effects.shape[1])

    @property
    def peak_class(self) -> PositionClass:
        """Position class of the largest effect."""
        return position_class(self.peak[0], self.subject, len(self.tokens))

    def by_class(self) -> dict[PositionClass, list[float]]:
        """Mean effect by layer for each position class that occurs."""
        groups: dict[PositionClass, list[int]] = {}
        for token in range(len(self.tokens)):
            groups.setdefault(position_class(token, self.subject, len(self.tokens)), []).append(token)
        return {
            name: self.effects[groups[name]].mean(0).tolist() for name in POSITION_CLASSES if name in groups
        }

    def to_json(self) -> dict[str, Any]:
        """All numbers as plain values."""
        token, layer = self.peak
        return {
            "clean": self.clean,
            "corrupted": self.corrupted,
            "effects": self.effects.tolist(),
            "tokens": list(self.tokens),
            "subject": [self.subject.start, self.subject.stop],
            "answer": self.answer,
            "kind": self.kind,
            "window": self.window,
            "noise_std": self.noise_std,
            "peak": {"token": token, "layer": layer, "class": self.peak_class},
            "by_class": self.by_class(),
        }

    def plot(self, path: str | Path) -> Path:
        """Writes the map as PNG; the subject's tokens carry a star."""
        from lab.plots import heat_map

        what = {"block": "hidden state", "mlp": "MLP output", "attn": "attention output"}[self.kind]
        width = f", {self.window} layers at a time" if self.window > 1 else ""
        return heat_map(
            path,
            self.effects,
            title=f"P({self.answer.strip()}) after restoring one {what}{width}",
            rows="",
            columns="layer",
            bar="probability regained",
            row_labels=[
                f"{text}{'*' if index in self.subject else ''}" for index, text in enumerate(self.tokens)
            ],
            limits=(0.0, max(float(self.effects.max()), 1e-6)),
            colors={"block": "Purples", "mlp": "Greens", "attn": "Reds"}[self.kind],
        )


@dataclass(frozen=True)
class SiteReport:
    """Where the largest effect of restoring an MLP lies, fact by fact.

    Attributes:
        classes: Fact id to position class; facts that the model does not know are not in it.
        layers: Fact id to the layer of that effect.
        unknown: Ids of facts whose answer the model does not give, so that there is nothing to trace.
        uncorrupted: Ids of facts whose answer survives the noise in full, likewise.
    """

    classes: dict[str, PositionClass]
    layers: dict[str, int]
    unknown: tuple[str, ...]
    uncorrupted: tuple[str, ...]

    def share(self, name: PositionClass = "subject_last") -> float:
        """Share of traced facts whose largest effect is of this class.

        Raises:
            RequestError: No fact could be traced.
        """
        if not self.classes:
            raise RequestError(
                "no fact could be traced: the model gives none of the answers, or none depends on its subject"
            )
        return sum(found == name for found in self.classes.values()) / len(self.classes)


def causal_trace(
    handle: ModelHandle,
    prompt: str,
    subject: str,
    *,
    kind: Kind = "block",
    window: int | None = None,
    noise: str | float = "s3",
    samples: int = 10,
    seed: int = 0,
    subjects: Sequence[str] = (),
    batch_tokens: int = 4096,
) -> TraceResult:
    """Traces one prompt.

    Args:
        handle: The model, with whatever is applied to it.
        prompt: Template with one ``{}``, or a filled prompt that holds the subject.
        subject: What to hide.
        kind: What to restore.
        window: Layers restored together; 1 for blocks, and for MLP and attention ROME's share of the depth (10 of 48).
        noise: ``"s3"`` is 3 standard deviations of subject embeddings; a number is the standard deviation itself.
        samples: Noise samples.
        seed: Seeds the noise.
        subjects: Subjects whose embeddings give the standard deviation; this prompt's own without.
        batch_tokens: Tokens in one forward pass.

    Raises:
        SubjectNotFoundError: The subject does not occur.
        ConfigError: An unknown kind, noise rule or window.
    """
    ids, span = _prompt(handle, prompt, subject)
    width = _window(handle, kind, window)
    with handle.writing(), torch.no_grad():
        [case] = clean_cases(handle, kind, [(ids, span)])
        pieces = [encode_ids(handle.tokenizer, name, special=False) for name in subjects]
        std = noise_std_of(handle, noise, pieces or [[ids[at] for at in span]])
        [corrupted], [effects] = trace_cases(handle, kind, width, [case], std, samples, seed, batch_tokens)
    return TraceResult(
        clean=case.clean,
        corrupted=corrupted,
        effects=effects,
        tokens=tuple(_token_text(handle, token) for token in ids),
        subject=span,
        answer=_token_text(handle, case.answer),
        kind=kind,
        window=width,
        noise_std=std,
    )


def subject_site(
    handle: ModelHandle,
    facts: Sequence[Fact],
    *,
    window: int | None = None,
    noise: str | float = "s3",
    samples: int = 4,
    seed: int = 0,
    known_only: bool = True,
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> SiteReport:
    """Finds, for each fact, the position class of the largest effect of restoring an MLP output.

    Args:
        handle: The model.
        facts: Facts with a prompt and an id.
        window: As in ``causal_trace``.
        noise: As in ``causal_trace``; the standard deviation is over the subjects of all facts.
        samples: Noise samples for each fact.
        seed: Seeds the noise.
        known_only: Leave out facts where the model's next token does not begin an answer.
        batch_tokens: Tokens in one forward pass.
        progress: Called with facts done and their number.
    """
    width = _window(handle, "mlp", window)
    prompts = [_prompt(handle, fact.prompt, fact.subject) for fact in facts]
    classes: dict[str, PositionClass] = {}
    layers: dict[str, int] = {}
    unknown: list[str] = []
    uncorrupted: list[str] = []
    with handle.writing(), torch.no_grad():
        std = (
            noise_std_of(handle, noise, [[ids[at] for at in span] for ids, span in prompts]) if facts else 0.0
        )
        # Equal lengths together, for corrupted rows are never padded.
        order = sorted(range(len(facts)), key=lambda index: len(prompts[index][0]))
        for start in range(0, len(order), 64):
            chunk = order[start : start + 64]
            cases = clean_cases(handle, "mlp", [prompts[index] for index in chunk])
            kept = []
            for index, case in zip(chunk, cases, strict=True):
                firsts = {
                    join_target(handle.tokenizer, facts[index].text, text)[1][0]
                    for text in facts[index].answers
                }
                if known_only and case.answer not in firsts:
                    unknown.append(facts[index].id)
                else:
                    kept.append((facts[index], case))
            corrupted, effects = trace_cases(
                handle, "mlp", width, [case for _, case in kept], std, samples, seed, batch_tokens
            )
            for (fact, case), low, effect in zip(kept, corrupted, effects, strict=True):
                if low >= case.clean or float(effect.max()) <= 0:
                    uncorrupted.append(fact.id)
                    continue
                token, layers[fact.id] = divmod(int(effect.argmax()), handle.n_layers)
                classes[fact.id] = position_class(token, case.subject, len(case.ids))
            if progress is not None:
                progress(min(start + 64, len(facts)), len(facts))
    return SiteReport(classes, layers, tuple(unknown), tuple(uncorrupted))


def _prompt(handle: ModelHandle, prompt: str, subject: str) -> tuple[list[int], range]:
    if prompt.count("{}") == 1:
        _, ids, span = filled_subject(handle.tokenizer, prompt, subject)
        return ids, span
    return encode_ids(handle.tokenizer, prompt), subject_span(handle.tokenizer, prompt, subject)


def _window(handle: ModelHandle, kind: str, window: int | None) -> int:
    if kind not in KIND_ROLES:
        raise ConfigError(f"unknown kind {kind!r} of activation; known: block, mlp, attn")
    if window is None:
        return 1 if kind == "block" else max(1, round(handle.n_layers * _WINDOW_SHARE))
    if window < 1:
        raise ConfigError(f"the window must be at least one layer, it is {window}")
    return window


def _token_text(handle: ModelHandle, token: int) -> str:
    text = str(handle.tokenizer.decode([token]))
    # A token that is part of a character has no text of its own.
    return str(handle.tokenizer.convert_ids_to_tokens(token)) if "�" in text or not text else text
