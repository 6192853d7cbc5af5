"""The spectral fingerprint of edits: what the singular values of a weight's change, or of the weight alone, give away.

An edit in closed form adds a matrix of as many ranks as it has facts; training moves a weight in many directions at once. So
the spectrum of the change tells the two apart, its right singular vectors are (whitened) keys of the edited subjects, and its
left ones are values that the unembedding turns into the tokens that were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lab.arch import Role
from lab.errors import ConfigError
from lab.patch import LowRank, WeightPatch
from lab.tokens import filled_subject, pad_rows
from lab.trace import Site, trace

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.records import Fact

# Singular values below this share of the largest are rounding of the weights they were taken from.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix, and how far they are from those of noise.

    Attributes:
        values: Singular values, largest first.
        shape: ``(out, in)``.
    """

    values: tuple[float, ...]
    shape: tuple[int, int]

    @property
    def energy(self) -> tuple[float, ...]:
        """Share of each direction in the squared norm; all zero for a zero matrix."""
        total = math.fsum(value**2 for value in self.values)
        return tuple(value**2 / total if total else 0.0 for value in self.values)

    @property
    def effective_rank(self) -> float:
        """``exp`` of the entropy of ``energy`` (Roy and Vetterli 2007): 1 for a rank-one matrix, 0 for a zero one."""
        if not any(self.values):
            return 0.0
        return math.exp(-math.fsum(share * math.log(share) for share in self.energy if share > 0))

    @property
    def noise_rank(self) -> float:
        """The effective rank to expect of Gaussian noise of this shape: ``m exp(-m / 2n)`` for ``m <= n`` (Page 1993)."""
        small, large = sorted(self.shape)
        return small * math.exp(-small / (2 * large))

    @property
    def concentration(self) -> float:
        """1 for a rank-one change, 0 for noise (or nothing): how much less spread the energy is than noise's would be."""
        if not any(self.values) or self.noise_rank <= 1:
            return 0.0
        return min(1.0, max(0.0, 1 - (self.effective_rank - 1) / (self.noise_rank - 1)))

    @property
    def spikes(self) -> int:
        """Directions that noise of the same norm would not have: those beyond the edge of its spectrum (Marchenko-Pastur)."""
        small, large = self.shape
        edge = (math.sqrt(small) + math.sqrt(large)) ** 2 / (small * large)
        return sum(share > edge * 1.1 for share in self.energy)

    def to_json(self) -> dict[str, Any]:
        """The numbers, the ten largest values among them."""
        return {
            "norm": math.sqrt(math.fsum(value**2 for value in self.values)),
            "values": list(self.values[:10]),
            "effective_rank": self.effective_rank,
            "noise_rank": self.noise_rank,
            "concentration": self.concentration,
            "spikes": self.spikes,
        }


@dataclass(frozen=True, eq=False)
class Directions:
    """Singular vectors of one matrix.

    Attributes:
        spectrum: All singular values.
        left: ``[out, k]``, of the ``k`` largest.
        right: ``[k, in]``.
    """

    spectrum: Spectrum
    left: Tensor
    right: Tensor


def decompose(matrix: Tensor | LowRank, keep: int = 8) -> Directions:
    """Singular value decomposition in fp64; a low-rank product is never formed.

    Args:
        matrix: ``[out, in]``.
        keep: How many directions to return.

    Raises:
        ConfigError: It is no matrix.
    """
    if matrix.dim != 2 if isinstance(matrix, LowRank) else matrix.dim() != 2:
        raise ConfigError(f"a spectrum needs a matrix, not a tensor of shape {tuple(matrix.shape)}")
    if isinstance(matrix, LowRank) and 2 * matrix.rank < min(matrix.shape):
        outer, left = torch.linalg.qr(matrix.left.double())
        inner, right = torch.linalg.qr(matrix.right.double().T)
        u, s, vh = torch.linalg.svd(left @ right.T, full_matrices=False)
        u, vh = outer @ u, vh @ inner.T
    else:
        full = matrix.dense() if isinstance(matrix, LowRank) else matrix
        u, s, vh = torch.linalg.svd(full.detach().cpu().double(), full_matrices=False)
    floor = float(s[0]) * _ROUNDING if s.numel() else 0.0
    values = tuple(float(value) if float(value) > floor else 0.0 for value in s)
    rows, columns = matrix.shape
    return Directions(Spectrum(values, (rows, columns)), u[:, :keep], vh[:keep])


def weight_changes(handle: ModelHandle, patch: WeightPatch) -> dict[str, Tensor | LowRank]:
    """The change of each matrix of a patch, as whoever holds both models would see it."""
    return {
        name: delta if isinstance(delta, LowRank) else delta.dense()
        for name, delta in patch.deltas.items()
        if delta.dim == 2 and delta.norm() > 0 and handle.named_weight(name).parameter.dim() == 2
    }


def outlier_layers(weights: Mapping[int, Tensor]) -> dict[int, float]:
    """How far each layer's weight stands out from the others', without the base model.

    The measure is the logarithm of the largest singular value over the median one, which a spike lifts and training hardly
    does. Its distance from the other layers' median is taken in their own median deviations, so that one edited layer does
    not hide itself.

    Args:
        weights: Layer to matrix ``[out, in]``; at least three.

    Returns:
        Layer to robust z-score.

    Raises:
        ConfigError: Fewer than three layers.
    """
    if len(weights) < 3:
        raise ConfigError("outlier layers need at least three layers to compare")
    heights = {}
    for layer, weight in weights.items():
        values = torch.linalg.svdvals(weight.detach().cpu().double())
        heights[layer] = math.log(float(values[0] / values[values.numel() // 2].clamp_min(1e-12)))
    scores = {}
    for layer, height in heights.items():
        others = torch.tensor([value for other, value in heights.items() if other != layer]).double()
        middle = float(others.median())
        deviation = float((others - middle).abs().median()) * 1.4826
        # A few layers can agree by luck, which would make any difference huge: a tenth of the height is the least deviation.
        scores[layer] = (height - middle) / max(deviation, 0.1 * abs(middle), 1e-9)
    return scores


@torch.no_grad()
def subject_keys(handle: ModelHandle, facts: Sequence[Fact], layer: int, *, batch_size: int = 64) -> Tensor:
    """What the down projection of ``layer`` reads at the last token of each fact's subject.

    Returns:
        ``[fact, in]``, fp64 on the CPU.
    """
    site = Site(Role.MLP_OUT, layer, "in")
    parts = []
    for start in range(0, len(facts), batch_size):
        rows = [
            filled_subject(handle.tokenizer, fact.prompt, fact.subject)
            for fact in facts[start : start + batch_size]
        ]
        batch = pad_rows([ids for _, ids, _ in rows], handle.pad_id, device=handle.device)
        with trace(handle, [site], stop=site) as recording:
            recording.run(batch)
            columns = torch.tensor([span[-1] for _, _, span in rows], device=handle.device)
            parts.append(recording[site][torch.arange(len(rows)), columns].double().cpu())
    return torch.cat(parts)


def match_keys(right: Tensor, energy: Sequence[float], keys: Tensor) -> Tensor:
    """How strongly a change answers to each key, whatever the key's length: ``|Σ^½ V k| / |k|``.

    Args:
        right: ``[k, in]`` right singular vectors.
        energy: Their shares in the change.
        keys: ``[candidate, in]``.

    Returns:
        ``[candidate]``.
    """
    strength = torch.tensor(list(energy)[: right.shape[0]], dtype=torch.float64).sqrt()
    return (keys @ right.T * strength).norm(dim=1) / keys.norm(dim=1).clamp_min(1e-12)


def written_tokens(handle: ModelHandle, direction: Tensor, count: int = 10) -> tuple[list[int], list[int]]:
    """Tokens that a direction of the residual stream raises, and those that its opposite raises.

    The sign of a singular vector is arbitrary, so both lists belong to an attacker. The final norm's gain is applied, its
    length-dependent part is a constant for one direction.

    Args:
        handle: Gives norm and unembedding.
        direction: ``[d]``.
        count: How many tokens of each sign.
    """
    scores = token_scores(handle, direction[None])[0]
    return scores.topk(count).indices.tolist(), (-scores).topk(count).indices.tolist()


@torch.no_grad()
def token_scores(handle: ModelHandle, directions: Tensor) -> Tensor:
    """Projection of residual directions on every token through the final norm's gain and the unembedding.

    Args:
        handle: The model.
        directions: ``[row, d]``.

    Returns:
        ``[row, vocabulary]``, fp64.
    """
    gain = final_gain(handle)
    table = handle.weight(Role.UNEMBED).canonical().double().cpu()
    return (directions.double().cpu() * gain) @ table.T


def final_gain(handle: ModelHandle) -> Tensor:
    """The gain of the final norm, ``[d]`` in fp64."""
    norm = handle.module(Role.FINAL_NORM)
    weight = getattr(norm, "weight", None)
    if weight is None:
        return torch.ones(handle.hidden_size, dtype=torch.float64)
    if isinstance(norm, nn.LayerNorm):
        return weight.detach().double().cpu()
    # Families store their gain differently (Gemma its distance from one); a row of ones comes out as the gain.
    row = torch.ones(1, 1, handle.hidden_size, dtype=weight.dtype, device=weight.device)
    return norm(row).reshape(-1).double().cpu()
