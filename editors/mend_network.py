"""The network of MEND: it turns the gradient of an edit, as rank-one factors, into the factors of a better update.

The gradient of a projection ``y = W x`` is ``Σ_t δ_t u_tᵀ`` over tokens, with inputs ``u_t`` and output gradients ``δ_t``
(Mitchell et al. 2022, arXiv 2110.11309, section 3.1). Both are normalised by running statistics, put side by side, and sent
through two residual low-rank layers; what comes out, ``ũ_t`` and ``δ̃_t``, gives the update ``−η Σ_t δ̃_t ũ_tᵀ``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from editors.tuning import TargetLines, functional_logits
from lab.arch import Role
from lab.handle import ModelHandle
from lab.scoring import kl_divergence, log_probs
from lab.trace import Site, trace

SPREAD_FLOOR = 1e-2
"""A feature that hardly varies (a dead unit) is divided by this share of the mean spread, not by its own near zero."""


@dataclass(frozen=True)
class EditedWeight:
    """One matrix that the network edits.

    Attributes:
        role, layer: Where it is.
        name: Parameter name.
        shape: ``(out, in)``.
        transposed: The module stores ``[in, out]``.
    """

    role: Role
    layer: int
    name: str
    shape: tuple[int, int]
    transposed: bool

    @property
    def group(self) -> str:
        """Weights of one shape share one network."""
        return f"{self.shape[0]}x{self.shape[1]}"


@dataclass(frozen=True)
class Factors:
    """A gradient in its rank-one terms: ``grads.T @ inputs`` is the gradient of the weight as ``[out, in]``.

    Attributes:
        inputs: u, ``[term, in]``.
        grads: δ, ``[term, out]``.
        row: ``[term]`` index of the row that each term comes from.
    """

    inputs: Tensor
    grads: Tensor
    row: Tensor


def edited_weights(handle: ModelHandle, layers: Sequence[int]) -> tuple[EditedWeight, ...]:
    """Both projections of the MLPs of some blocks."""
    found = []
    for layer in layers:
        for role in (Role.MLP_IN, Role.MLP_OUT):
            weight = handle.weight(role, layer)
            found.append(EditedWeight(role, layer, weight.name, weight.shape, weight.transposed))
    return tuple(found)


def gradient_factors(
    handle: ModelHandle, weights: Sequence[EditedWeight], lines: TargetLines
) -> tuple[dict[str, Factors], Tensor]:
    """Gradients of each row's loss with respect to some weights, as factors.

    Terms of padding, and of tokens that no gradient reaches, are left out. Rows do not mix: the factors of a batch are those
    of its rows, one after another.

    Args:
        handle: The model, its parameters frozen; left as it was.
        weights: Which.
        lines: The edits.

    Returns:
        Parameter name to factors, fp32 or wider; and the rows' losses ``[row]``.
    """
    probes: dict[str, Tensor] = {}

    def probed(name: str, output: Tensor) -> Tensor:
        # A zero added to the output: the gradient with respect to it is the one with respect to the output.
        probes[name] = torch.zeros_like(output, requires_grad=True)
        return output + probes[name]

    inputs = {each.name: Site(each.role, each.layer, "in") for each in weights}
    writes = {
        Site(each.role, each.layer, "out"): lambda output, name=each.name: probed(name, output)
        for each in weights
    }
    with trace(handle, list(inputs.values()), writes, detach=False) as recording:
        logits = recording.run(lines.batch, logits_to_keep=lines.keep)
        assert logits is not None  # nothing stops the pass
        losses = lines.row_losses(lines.of(logits))
        names = [each.name for each in weights]
        gradients = torch.autograd.grad(losses.sum(), [probes[name] for name in names])
        read = {name: recording[inputs[name]].detach() for name in names}
    found = {}
    for name, gradient in zip(names, gradients, strict=True):
        used = lines.batch.attention_mask.bool() & (gradient != 0).any(dim=-1)
        wide = torch.promote_types(gradient.dtype, torch.float32)
        row = used.nonzero()[:, 0]
        found[name] = Factors(read[name][used].to(wide), gradient[used].to(wide), row)
    return found, losses.detach()


class RunningMoments(nn.Module):
    """Mean and spread of each feature over all rows seen in training (the parallel form of Welford's update)."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.count: Tensor
        self.mean: Tensor
        self.squares: Tensor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=dtype))
        self.register_buffer("squares", torch.zeros(width, dtype=dtype))

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """Takes rows ``[row, width]`` in."""
        if not len(rows):
            return
        total = self.count + len(rows)
        mean = rows.mean(dim=0)
        gap = mean - self.mean
        share = (self.count * len(rows) / total).to(rows.dtype)
        self.squares += (rows - mean).square().sum(dim=0) + gap.square() * share
        self.mean += gap * (len(rows) / total).to(rows.dtype)
        self.count.copy_(total)

    @property
    def spread(self) -> Tensor:
        """Standard deviation of each feature, with a floor; 1 before two rows were seen."""
        if self.count < 2:
            return torch.ones_like(self.squares)
        spread = (self.squares / (self.count - 1).to(self.squares.dtype)).sqrt()
        floor = (SPREAD_FLOOR * spread.mean()).clamp_min(torch.finfo(spread.dtype).tiny)
        return spread.clamp_min(floor)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows with mean 0 and spread 1."""
        return (rows - self.mean) / self.spread


class LowRankLayer(nn.Module):
    """``x + act(scale_i (B A x + b) + shift_i)``: the identity at the start, with a scale and a shift per edited weight."""

    def __init__(
        self,
        width: int,
        rank: int,
        weights: int,
        rectify: bool,
        generator: torch.Generator,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        start = torch.randn(rank, width, generator=generator, dtype=torch.float64) / width**0.5
        self.rectify = rectify
        self.down = nn.Parameter(start.to(dtype))
        self.up = nn.Parameter(torch.zeros(width, rank, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, dtype=dtype))
        self.scale = nn.Parameter(torch.ones(weights, width, dtype=dtype))
        self.shift = nn.Parameter(torch.zeros(weights, width, dtype=dtype))

    def forward(self, rows: Tensor, index: int) -> Tensor:
        """Transforms rows ``[row, width]`` of the ``index``-th weight of the group."""
        change = self.scale[index] * (rows @ self.down.T @ self.up.T + self.bias) + self.shift[index]
        # clamp, not relu: at the start everything is exactly 0, where relu lets no gradient through and clamp does.
        return rows + (change.clamp_min(0) if self.rectify else change)


class GradientNetwork(nn.Module):
    """The network of all edited weights of one shape."""

    def __init__(
        self, shape: tuple[int, int], rank: int, weights: int, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        super().__init__()
        out, inner = shape
        self.inner = inner
        self.inputs = RunningMoments(inner, dtype)
        self.grads = RunningMoments(out, dtype)
        width = inner + out
        self.first = LowRankLayer(width, min(rank, width), weights, True, generator, dtype)
        self.second = LowRankLayer(width, min(rank, width), weights, False, generator, dtype)

    def forward(self, factors: Factors, index: int) -> tuple[Tensor, Tensor]:
        """ũ ``[term, in]`` and δ̃ ``[term, out]`` for the ``index``-th weight."""
        rows = torch.cat([self.inputs(factors.inputs), self.grads(factors.grads)], dim=1)
        rows = self.second(self.first(rows, index), index)
        return rows[:, : self.inner], rows[:, self.inner :]


class MendNetwork(nn.Module):
    """All gradient networks of a model, and the learned rate η of each edited weight.

    Args:
        weights: What it edits.
        rank: Of the low-rank layers; at most their width.
        rate: η at the start.
        seed: Draws the start.
        dtype: Of its parameters: fp32, or fp64 for fp64 models.
    """

    def __init__(
        self,
        weights: Sequence[EditedWeight],
        *,
        rank: int,
        rate: float,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.weights = tuple(weights)
        generator = torch.Generator().manual_seed(seed)
        members: dict[str, list[EditedWeight]] = {}
        for weight in self.weights:
            members.setdefault(weight.group, []).append(weight)
        self.index = {weight.name: members[weight.group].index(weight) for weight in self.weights}
        self.networks = nn.ModuleDict(
            {
                group: GradientNetwork(several[0].shape, rank, len(several), generator, dtype)
                for group, several in members.items()
            }
        )
        self.rates = nn.Parameter(torch.full((len(self.weights),), rate, dtype=dtype))

    def observe(self, factors: Mapping[str, Factors]) -> None:
        """Takes factors into the running statistics; for training only."""
        for weight in self.weights:
            network = self._network(weight)
            network.inputs.update(factors[weight.name].inputs)
            network.grads.update(factors[weight.name].grads)

    def forward(self, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]]:
        """Updates from gradients.

        Args:
            factors: Of every edited weight, by parameter name.

        Returns:
            Parameter name to ``left[out, term]`` and ``right[term, in]``; their product is to be added to the weight.
        """
        updates = {}
        for number, weight in enumerate(self.weights):
            inputs, grads = self._network(weight)(factors[weight.name], self.index[weight.name])
            updates[weight.name] = (-self.rates[number] * grads.T, inputs)
        return updates

    def _network(self, weight: EditedWeight) -> GradientNetwork:
        network = self.networks[weight.group]
        assert isinstance(network, GradientNetwork)
        return network


def edit_losses(
    handle: ModelHandle, network: MendNetwork, factors: Mapping[str, Factors], lines: TargetLines
) -> tuple[Tensor, Tensor]:
    """The two losses of one edit; the graph reaches the network's parameters.

    Args:
        handle: The model, its parameters frozen.
        network: Makes the update.
        factors: Of the edit's gradient.
        lines: The prompt that the edit must reach as row 0, then the prompts that must stay as they are.

    Returns:
        ``NLL(target | edited)``, and ``KL(base ‖ edited)`` averaged over the answer tokens of the other rows (0 without any).
    """
    weights = {}
    updates = network(factors)
    for weight in network.weights:
        left, right = updates[weight.name]
        parameter = handle.named_weight(weight.name).parameter.detach()
        change = (left @ right).T if weight.transposed else left @ right
        weights[weight.name] = (parameter.to(change.dtype) + change).to(parameter.dtype)
    table = lines.of(functional_logits(handle, lines, weights))
    edit = lines.row_losses(table)[0]
    others = lines.row > 0
    if not bool(others.any()):
        return edit, edit.new_zeros(())
    base = handle.logits(lines.batch, logits_to_keep=lines.keep)
    before = log_probs(base[lines.row[others], lines.column[others]])
    return edit, kl_divergence(before, table[others])
