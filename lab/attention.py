"""Where attention falls, and how a patch moves it: drift towards the subject, and what comes back with the original rows.

The rows themselves come from ``capture_rows``, which this module offers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.attention_rows import IMPLEMENTATION, AttentionRows, capture_rows, replace_rows
from lab.errors import ConfigError
from lab.tokens import encode_ids, filled_subject, pad_rows, subject_span

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.memory import MemoryPatch
    from lab.patch import WeightPatch

__all__ = [
    "IMPLEMENTATION",
    "AttentionRows",
    "DriftReport",
    "attention_drift",
    "capture_rows",
    "plot_drift",
    "replace_rows",
    "restored_logits",
    "text_attention",
]


@dataclass(frozen=True, eq=False)
class DriftReport:
    """How much more (or less) each head looks at the subject after a patch.

    The row is that of the last prompt token, the column that of the subject's last token.

    Attributes:
        before: ``[prompt, layer, head]``, attention to the subject without the patch.
        after: The same with it.
        prompts: The filled prompts.
    """

    before: Tensor
    after: Tensor
    prompts: tuple[str, ...]

    @property
    def drift(self) -> Tensor:
        """Mean over prompts of ``after − before``, ``[layer, head]``."""
        return (self.after - self.before).mean(0)

    @property
    def max_head(self) -> Tensor:
        """Mean over prompts of the largest head's drift, ``[layer]`` (SADR's measure)."""
        return (self.after - self.before).amax(-1).mean(0)

    def to_json(self) -> dict[str, Any]:
        """The numbers, layer by layer."""
        return {
            "prompts": len(self.prompts),
            "max_head_drift": [float(value) for value in self.max_head],
            "drift": self.drift.tolist(),
            "before": self.before.mean(0).tolist(),
            "after": self.after.mean(0).tolist(),
        }

    def plot(self, path: str | Path) -> Path:
        """Writes a PNG: drift by layer and head, and the largest head's drift by layer."""
        return plot_drift(path, self.drift, self.max_head, len(self.prompts))


def plot_drift(path: str | Path, drift: Tensor, max_head: Tensor, prompts: int) -> Path:
    """The plot of a ``DriftReport`` from its numbers.

    Args:
        path: The PNG.
        drift: ``[layer, head]``.
        max_head: ``[layer]``.
        prompts: How many prompts they are means over.
    """
    from lab.plots import heat_map

    limit = max(float(drift.abs().max()), 1e-6)
    return heat_map(
        path,
        drift,
        title=f"Attention drift towards the subject ({prompts} prompts)",
        rows="layer",
        columns="head",
        bar="attention after − before",
        limits=(-limit, limit),
        colors="RdBu_r",
        side=("largest head", max_head),
    )


def _prompt_rows(
    handle: ModelHandle, prompts: Sequence[str], subjects: Sequence[str]
) -> list[tuple[str, list[int], int]]:
    if not prompts or len(prompts) != len(subjects):
        raise ConfigError(
            f"{len(prompts)} prompts and {len(subjects)} subjects: there must be one subject for each prompt"
        )
    rows = []
    for prompt, subject in zip(prompts, subjects, strict=True):
        if prompt.count("{}") == 1:
            text, ids, span = filled_subject(handle.tokenizer, prompt, subject)
        else:
            text, ids = prompt, encode_ids(handle.tokenizer, prompt)
            span = subject_span(handle.tokenizer, prompt, subject)
        rows.append((text, ids, span[-1]))
    return rows


@torch.no_grad()
def attention_drift(
    handle: ModelHandle,
    patch: WeightPatch | MemoryPatch,
    prompts: Sequence[str],
    subjects: Sequence[str],
    *,
    batch_size: int = 64,
) -> DriftReport:
    """Measures how a patch moves the attention from the last prompt token to the subject's last token.

    Args:
        handle: The model, without the patch.
        patch: The patch; applied for the second pass and undone.
        prompts: Templates with one ``{}``, or filled prompts that hold their subject.
        subjects: One for each prompt.
        batch_size: Rows in one forward pass.

    Raises:
        ConfigError: Prompts and subjects do not pair up.
        SubjectNotFoundError: A subject does not occur in its prompt.
    """
    rows = _prompt_rows(handle, prompts, subjects)
    with handle.writing():
        before = _subject_attention(handle, rows, batch_size)
        with patch.applied(handle):
            after = _subject_attention(handle, rows, batch_size)
    return DriftReport(before, after, tuple(text for text, _, _ in rows))


def _subject_attention(
    handle: ModelHandle, rows: Sequence[tuple[str, list[int], int]], batch_size: int
) -> Tensor:
    parts = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        batch = pad_rows([ids for _, ids, _ in chunk], handle.pad_id, device=handle.device)
        with capture_rows(handle, batch.last) as captured:
            handle.logits(batch, logits_to_keep=1)
            stacked = captured.stack()
        columns = torch.tensor([column for _, _, column in chunk], device=stacked.device)
        index = columns.view(-1, 1, 1, 1).expand(*stacked.shape[:3], 1)
        parts.append(stacked.gather(3, index).squeeze(3).double().cpu())
    return torch.cat(parts)


@torch.no_grad()
def restored_logits(
    handle: ModelHandle,
    patch: WeightPatch | MemoryPatch,
    prompts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Next-token logits of the patched model when its last token attends as it did before the patch.

    What this brings back of a lost answer is what the drift of attention took.

    Args:
        handle: The model, without the patch.
        patch: The patch.
        prompts: Filled prompts, one batch.
        layers: Layers whose original rows are put back; all without it.

    Returns:
        ``[prompt, vocabulary]``.

    Raises:
        AttentionUnavailableError: The family runs eager attention only.
    """
    batch = handle.encode(prompts)
    index = torch.arange(len(prompts), device=batch.input_ids.device)
    with handle.writing():
        with capture_rows(handle, batch.last) as captured:
            handle.logits(batch, logits_to_keep=1)
            chosen = range(handle.n_layers) if layers is None else layers
            original = {layer: captured[layer] for layer in chosen}
        with patch.applied(handle), replace_rows(handle, batch.last, original):
            return handle.logits(batch)[index, batch.last]


@torch.no_grad()
def text_attention(handle: ModelHandle, prompt: str, texts: Sequence[str]) -> tuple[float, ...]:
    """How much of a prompt's last token's attention falls on each of some texts in it, mean over layers and heads.

    All tokens of the prompt together get 1. The shares say where the model looks, not what its answer depends on.

    Args:
        handle: The model; nobody else uses it meanwhile.
        prompt: What the model continues.
        texts: Parts of the prompt, in its order.

    Returns:
        A share for each text.

    Raises:
        SubjectNotFoundError: A text does not stand in the prompt, behind those before it.
    """
    spans, place = [], 0
    for text in texts:
        start = prompt.find(text, place)
        spans.append(subject_span(handle.tokenizer, prompt, text, start=start))
        place = start + len(text)
    if not spans:
        return ()
    with handle.writing():
        batch = handle.encode([prompt])
        with capture_rows(handle, batch.last) as rows:
            handle.logits(batch, logits_to_keep=1)
            looked = rows.stack()[0].mean((0, 1))
    return tuple(float(looked[span.start : span.stop].sum()) for span in spans)
