"""The linear algebra of locate-then-edit: one Cholesky factor per layer, low-rank updates, null-space projectors.

Everything is fp64 on the CPU. At condition 1e7 the same solves in fp32 are wrong by several per cent, so nothing here
offers fp32. Shapes: ``in`` is the width of the edited matrix's input, ``out`` of its output, ``B`` the number of edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.errors import ConfigError, NumericalError
from lab.patch import LowRank

_FIRST_RIDGE = 1e-10
_LAST_RIDGE = 1e-2
# Squared relative distance below which two keys of a model in fp32 are one: what is between them is rounding.
_SAME_KEY = (32 * torch.finfo(torch.float32).eps) ** 2


@dataclass(frozen=True, eq=False)
class Factor:
    """``weight * (C + ridge * I)`` in factored form, where ``C`` is a key second moment.

    Attributes:
        cholesky: ``[in, in]`` fp64, lower Cholesky factor of ``C + ridge * I`` (without ``weight``, so that every weight
            shares it).
        weight: λ of MEMIT, or 1.
        ridge: What was added to the diagonal of ``C``; 0 unless ``C`` was numerically singular.
        relative_ridge: ``ridge`` as a multiple of the mean of the diagonal.
    """

    cholesky: Tensor
    weight: float
    ridge: float = 0.0
    relative_ridge: float = 0.0

    @property
    def size(self) -> int:
        """``in``."""
        return self.cholesky.shape[0]

    def solve(self, keys: Tensor) -> Tensor:
        """Returns ``(weight * (C + ridge * I))⁻¹ keys`` for ``[in, B]`` (or ``[in]``), fp64 on the CPU."""
        if keys.shape[0] != self.size:
            raise ConfigError(f"keys of width {keys.shape[0]} do not fit statistics of width {self.size}")
        columns = _fp64(keys)
        flat = columns.dim() == 1
        solved = torch.cholesky_solve(columns.unsqueeze(1) if flat else columns, self.cholesky) / self.weight
        return solved.squeeze(1) if flat else solved


def factorize(moment: Tensor, weight: float = 1.0) -> Factor:
    """Cholesky factor of a second moment, with the smallest ridge that makes it possible.

    The ridge is ``ε · trace(C) / in``, ε = 0, then 1e-10, 1e-9, ... A factor whose pivots span more than fp64 resolves
    counts as failed: the algorithm did finish, on rounding noise.

    Args:
        moment: ``[in, in]``, symmetric positive semi-definite.
        weight: Multiplies the matrix; positive.

    Raises:
        ConfigError: ``weight`` is not positive, or ``moment`` is not square.
        NumericalError: ``moment`` is zero, not finite, or indefinite beyond repair.
    """
    if not weight > 0:
        raise ConfigError(f"the weight of the key statistics must be positive, it is {weight}")
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ConfigError(f"a second moment is square, this one is {tuple(moment.shape)}")
    matrix = _fp64(moment)
    mean = float(matrix.diagonal().mean())
    if not torch.isfinite(matrix).all() or not mean > 0:
        raise NumericalError(
            "the key statistics are zero or not finite; delete the cached file and collect them again"
        )
    size = matrix.shape[0]
    floor = size * torch.finfo(torch.float64).eps
    relative = 0.0
    while relative <= _LAST_RIDGE:
        ridge = relative * mean
        shifted = matrix if ridge == 0.0 else matrix + ridge * torch.eye(size, dtype=torch.float64)
        lower, info = torch.linalg.cholesky_ex(shifted)
        pivots = lower.diagonal()
        if int(info) == 0 and float(pivots.min() / pivots.max()) ** 2 > floor:
            return Factor(lower, float(weight), ridge, relative)
        relative = _FIRST_RIDGE if relative == 0.0 else relative * 10
    raise NumericalError(
        f"the key statistics stay singular with a ridge of {_LAST_RIDGE} of their mean; collect them over more tokens"
    )


def woodbury_factors(factor: Factor, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """MEMIT's update ``Δ = R Kᵀ (A + K Kᵀ)⁻¹`` as two thin matrices, with ``A`` the factored statistics.

    With ``Z = A⁻¹ K`` the update is ``R (I + Kᵀ Z)⁻¹ Zᵀ`` (Woodbury; equal to the direct form, Meng et al. 2023, eq. 14).

    Args:
        factor: Of ``λ C``.
        keys: ``K``, ``[in, B]``.
        residuals: ``R``, ``[out, B]``.

    Returns:
        ``left [out, B]`` and ``right [B, in]``, fp64, with ``Δ = left @ right``.

    Raises:
        NumericalError: The ``B x B`` system cannot be factored (keys not finite).
    """
    return _thin_update(factor, keys, residuals, 1.0)


def emmet_factors(factor: Factor, keys: Tensor, residuals: Tensor, mu: float = 0.1) -> tuple[Tensor, Tensor]:
    """EMMET's equality-constrained update ``Δ = R (Kᵀ A⁻¹ K + μ I)⁻¹ Kᵀ A⁻¹``; shapes as in ``woodbury_factors``.

    With ``mu = 0`` the update maps every key onto its residual exactly; two keys that are equal as far as a model in fp32
    can tell then make it singular.

    Raises:
        ConfigError: ``mu`` is negative.
        NumericalError: The ``B x B`` system is singular; raise ``mu`` or drop requests that share a subject.
    """
    if mu < 0:
        raise ConfigError(f"mu must not be negative, it is {mu}")
    return _thin_update(factor, keys, residuals, mu, _SAME_KEY)


def null_space_factors(
    projector: Projector,
    keys: Tensor,
    residuals: Tensor,
    past: Tensor,
    ridge: float,
    past_gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """AlphaEdit's update ``Δᵀ = [P (K Kᵀ + K_p K_pᵀ) + ridge I]⁻¹ P K Rᵀ`` as two thin matrices.

    The solution lies in the range of ``P``. With ``Y = P [K_p, K]`` and ``G = Yᵀ Y + ridge I`` it is
    ``Δ = R (last B rows of G⁻¹ Yᵀ)``: a system over the edits so far instead of over the width of the keys. As ``P`` is a
    projector, ``Yᵀ Y = [K_p, K]ᵀ P [K_p, K]``, of which only the part with ``K`` is new.

    Args:
        projector: ``P``.
        keys: ``K``, ``[in, B]``.
        residuals: ``R``, ``[out, B]``.
        past: ``K_p``, ``[in, n]``, keys of earlier edits; ``[in, 0]`` where there are none.
        ridge: λ₂, positive.
        past_gram: ``K_pᵀ P K_p``, ``[n, n]``, where it is known (``PastGram``).

    Returns:
        ``left [out, B]`` and ``right [B, in]``, fp64, with ``Δ = left @ right``.

    Raises:
        ConfigError: ``ridge`` is not positive, or shapes do not fit.
        NumericalError: The system cannot be factored (keys not finite).
    """
    if not ridge > 0:
        raise ConfigError(f"the ridge of the null-space update must be positive, it is {ridge}")
    if keys.dim() != 2 or past.dim() != 2 or past.shape[0] != keys.shape[0]:
        raise ConfigError(
            f"keys {tuple(keys.shape)} and past keys {tuple(past.shape)} must both be [in, edits]"
        )
    if residuals.dim() != 2 or residuals.shape[1] != keys.shape[1]:
        raise ConfigError(f"{keys.shape[1]} keys need as many residuals, not {tuple(residuals.shape)}")
    before, new = _fp64(past), _fp64(keys)
    known = before.T @ projector.apply(before) if past_gram is None else past_gram
    if known.shape != (before.shape[1], before.shape[1]):
        raise ConfigError(f"{before.shape[1]} past keys have no Gram matrix of {tuple(known.shape)}")
    gram = _grown(known, before, new, projector.apply(new))
    identity = torch.eye(gram.shape[0], dtype=torch.float64)
    lower, info = torch.linalg.cholesky_ex((gram + gram.T) / 2 + ridge * identity)
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        raise NumericalError(
            "the system over the edits cannot be factored; keys are not finite or the ridge is too small"
        )
    count = before.shape[1]
    chosen = torch.cholesky_solve(identity[:, count:], lower)
    return _fp64(residuals), projector.apply(before @ chosen[:count] + new @ chosen[count:]).T


def _grown(known: Tensor, before: Tensor, new: Tensor, kept: Tensor) -> Tensor:
    """``[K_p, K]ᵀ P [K_p, K]`` from its corner ``known`` and ``kept = P K``."""
    cross = before.T @ kept
    return torch.cat([torch.cat([known, cross], dim=1), torch.cat([cross.T, new.T @ kept], dim=1)])


class PastGram:
    """``K_pᵀ P K_p`` over a growing list of keys: what is new of it is computed, the rest is kept.

    An edit of a sequence needs it over all earlier keys. The list is compared by the tensors themselves, so that another sequence, or
    one that lost an edit, starts anew where it differs. The result does not depend on what was asked before.
    """

    def __init__(self) -> None:
        self._projector: Projector | None = None
        self._blocks: list[Tensor] = []
        # Room for more than there is, so that a key more does not copy all earlier ones. One key is one row.
        self._keys = torch.empty(0, 0, dtype=torch.float64)
        self._gram = torch.empty(0, 0, dtype=torch.float64)

    def over(self, projector: Projector, blocks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and their Gram matrix, which later calls may not be relied on to leave as they are.

        Args:
            projector: ``P``.
            blocks: Keys ``[in, n_i]``, oldest first.

        Returns:
            ``K_p [in, n]`` and ``K_pᵀ P K_p [n, n]``, fp64.
        """
        same = self._projector is projector
        shared = 0
        for mine, block in zip(self._blocks if same else (), blocks, strict=False):
            if mine is not block:
                break
            shared += 1
        count = sum(block.shape[1] for block in blocks[:shared])
        total = count + sum(block.shape[1] for block in blocks[shared:])
        width = projector.basis.shape[0]
        if not same or total > len(self._keys):
            room = max(16, 2 * total)
            keys, gram = (torch.empty(room, size, dtype=torch.float64) for size in (width, room))
            if count:
                keys[:count], gram[:count, :count] = self._keys[:count], self._gram[:count, :count]
            self._keys, self._gram = keys, gram
        for block in blocks[shared:]:
            new = _fp64(block)
            end = count + new.shape[1]
            kept = projector.apply(new)
            self._gram[count:end, :count] = (self._keys[:count] @ kept).T
            self._gram[:count, count:end] = self._gram[count:end, :count].T
            self._gram[count:end, count:end] = new.T @ kept
            self._keys[count:end] = new.T
            count = end
        self._projector, self._blocks = projector, list(blocks)
        return self._keys[:count].T, self._gram[:count, :count]


def woodbury_update(factor: Factor, keys: Tensor, residuals: Tensor) -> LowRank:
    """``woodbury_factors`` as a delta of a patch (fp32)."""
    left, right = woodbury_factors(factor, keys, residuals)
    return LowRank(left.float(), right.float())


def _thin_update(
    factor: Factor, keys: Tensor, residuals: Tensor, diagonal: float, floor: float = 0.0
) -> tuple[Tensor, Tensor]:
    if keys.dim() != 2 or residuals.dim() != 2 or keys.shape[1] != residuals.shape[1]:
        raise ConfigError(
            f"keys {tuple(keys.shape)} and residuals {tuple(residuals.shape)} must both be [width, edits]"
        )
    columns = _fp64(keys)
    solved = factor.solve(columns)
    gram = columns.T @ solved
    system = (gram + gram.T) / 2 + diagonal * torch.eye(gram.shape[0], dtype=torch.float64)
    lower, info = torch.linalg.cholesky_ex(system)
    pivots = lower.diagonal()
    flat = int(info) == 0 and bool((pivots.min() / pivots.max()) ** 2 < floor)
    if int(info) != 0 or flat or not bool(torch.isfinite(lower).all()):
        raise NumericalError(
            "the system over the edits is singular: two keys coincide (the same subject twice) or are not finite"
        )
    return torch.cholesky_solve(_fp64(residuals).T, lower).T, solved.T


@dataclass(frozen=True, eq=False)
class Projector:
    """Orthogonal projector onto the span of a second moment's small eigenvalues, kept as one thin block.

    Attributes:
        basis: ``[in, b]`` fp64 with orthonormal columns: the smaller one of the two eigenvector blocks.
        complement: ``True`` when ``basis`` spans what is projected away, so that ``P = I − basis basisᵀ``.
        rank: Dimensions that ``P`` keeps.
        threshold: Eigenvalues below this were kept.
    """

    basis: Tensor
    complement: bool
    rank: int
    threshold: float

    def apply(self, keys: Tensor) -> Tensor:
        """Returns ``P keys`` for ``[in, n]`` (or ``[in]``), fp64, without ever forming ``P``."""
        columns = _fp64(keys)
        inside = self.basis @ (self.basis.T @ columns)
        return columns - inside if self.complement else inside

    def dense(self) -> Tensor:
        """``P`` itself, ``[in, in]``."""
        return self.apply(torch.eye(self.basis.shape[0], dtype=torch.float64))


def null_space(moment: Tensor, threshold: float) -> Projector:
    """Projector onto the eigenvectors of ``moment`` whose eigenvalues lie below an absolute threshold (AlphaEdit).

    The threshold is on the scale of the model's own activations, so the kept rank must be looked at: it is reported,
    and both extremes are refused.

    Raises:
        ConfigError: The threshold keeps no direction or all of them.
        NumericalError: ``moment`` is not finite.
    """
    matrix = _fp64(moment)
    if not torch.isfinite(matrix).all():
        raise NumericalError(
            "the key statistics are not finite; delete the cached file and collect them again"
        )
    values, vectors = torch.linalg.eigh(matrix)
    size = matrix.shape[0]
    rank = int((values < threshold).sum())
    if rank in (0, size):
        raise ConfigError(
            f"threshold {threshold} keeps {rank} of {size} directions; the eigenvalues run from {float(values[0]):.3g} "
            f"to {float(values[-1]):.3g} with median {float(values[size // 2]):.3g}: choose one inside that range"
        )
    complement = rank > size - rank
    basis = vectors[:, rank:] if complement else vectors[:, :rank]
    return Projector(basis.contiguous(), complement, rank, float(threshold))


def _fp64(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)
