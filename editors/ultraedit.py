"""UltraEdit: edits from one forward and one backward pass, without a search and without a subject (Gu et al., TMLR 2026, arXiv 2505.14679).

At every edited weight the pass gives, for each token, its input ``h`` and the gradient ``g`` of the target's loss at its
output. Both are normalised by the mean and deviation over all tokens that the sequence of edits has seen, and the update is
the ridge regression of ``v = −lr · |ĥ|² · ĝ`` on the raw inputs: ``Δᵀ = (Hᵀ H + I)⁻¹ Hᵀ V``.

The moments behind the normalisation are what a patch carries, so that a sequence of any length is normalised over its whole
life; pass the earlier patches as ``history``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method, check_layers, settle
from editors.patches import carried, make_patch
from editors.rows import EditRow, check_requests, request_rows
from editors.values import Progress, frozen
from lab.arch import Role
from lab.errors import ConfigError, NumericalError, RequestError
from lab.handle import ModelHandle, Weight
from lab.patch import Carry, Delta, Dense, LowRank, WeightPatch
from lab.records import EditRequest
from lab.tokens import pad_rows
from lab.trace import Site, trace

KIND = "ultraedit"
"""Of what its patches carry."""

Shape = tuple[int, int]
"""``(out, in)``; weights of one shape are normalised together."""


@dataclass(frozen=True)
class UltraEditConfig:
    """Settings.

    Attributes:
        layers: Blocks whose down projection is edited.
        gate_layers: Blocks whose first projection is edited (the gate where gate and up are apart).
        up_layers: Blocks whose second projection beside the gate is edited.
        lr: Size of the update.
        tokens: ``"all"``: every token of prompt and target counts (EasyEdit's configs). ``"answer"``: only those that predict
            a target token (the authors' own config).
        batch_size: Requests in one forward pass; bounds memory, does not change the result.
    """

    layers: tuple[int, ...] = ()
    gate_layers: tuple[int, ...] = ()
    up_layers: tuple[int, ...] = ()
    lr: float = 1e-6
    tokens: Literal["all", "answer"] = "all"
    batch_size: int = 10

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"lr must be positive, not {self.lr}")
        if self.tokens not in ("all", "answer"):
            raise ConfigError(f"unknown tokens {self.tokens!r}; use 'all' or 'answer'")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {self.batch_size}")
        if not self.places:
            raise ConfigError("no weight to edit: give layers, gate_layers or up_layers")

    @property
    def places(self) -> tuple[tuple[Role, int], ...]:
        """Roles and layers of the edited weights."""
        kinds = (
            (Role.MLP_OUT, self.layers),
            (Role.MLP_IN, self.gate_layers),
            (Role.MLP_UP, self.up_layers),
        )
        return tuple((role, layer) for role, layers in kinds for layer in layers)


@dataclass(frozen=True, eq=False)
class Signals:
    """What one pass says about one weight, fp64 on the CPU, a line per token.

    Attributes:
        inputs: ``h``, ``[token, in]``.
        gradients: ``g``, ``[token, out]``, of the summed negative log-likelihood.
    """

    inputs: Tensor
    gradients: Tensor

    @property
    def joined(self) -> Tensor:
        """``[h, g]``, ``[token, in + out]``."""
        return torch.cat([self.inputs, self.gradients], dim=1)


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and deviation of ``[h, g]`` over all tokens seen; two of them pool exactly, in any order.

    Attributes:
        count: ``[1]``, tokens.
        mean: ``[in + out]``.
        square: ``[in + out]``, sum of squared distances from the mean.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of ``values [token, width]``."""
        mean = values.mean(dim=0)
        return cls(values.new_tensor([len(values)]), mean, (values - mean).square().sum(dim=0))

    def pooled(self, other: Moments) -> Moments:
        """Of both sets of tokens together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        square = self.square + other.square + apart.square() * self.count * other.count / count
        return Moments(count, mean, square)

    def normalise(self, values: Tensor) -> Tensor:
        """``(values - mean) / deviation``; a feature that does not vary beyond fp32's rounding becomes nearly 0."""
        deviation = (self.square / (self.count - 1)).sqrt()
        # Relative to the feature, because gradients have no scale of their own: they shrink with the model's loss.
        noise = torch.finfo(torch.float32).eps * (deviation.square() + self.mean.square()).sqrt()
        return (values - self.mean) / (deviation + noise).clamp_min(torch.finfo(values.dtype).tiny)


@dataclass(frozen=True)
class UltraEditor:
    """UltraEdit; see the module. Make one with ``get_editor``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all requests together. See ``Editor.edit``.

        Args:
            handle: The model; usually with the patches of ``history`` applied.
            requests: What the model should say.
            history: Earlier patches; the moments they carry are pooled with those of these requests.
            progress: As in ``Editor.edit``.

        Raises:
            RequestError: One token alone would be normalised.
            UnsupportedModelError: The family has no such projection.
        """
        check_requests(requests, one_per_subject=False)
        with handle.writing():
            config, plan = settle(handle, self.options, "ultraedit", UltraEditConfig, (), search=False)
            for layers in (config.layers, config.gate_layers, config.up_layers):
                if layers:
                    check_layers(handle, layers)
            past = _past(carried(history or (), KIND, handle))
            signals, losses = read_signals(handle, requests, config, progress)
            weights = {place: handle.weight(*place) for place in config.places}
            fresh = _by_shape(weights, signals)
            moments = {
                shape: past[shape].pooled(own) if shape in past else own for shape, own in fresh.items()
            }
            if any(float(own.count) < 2 for own in moments.values()):
                raise RequestError(
                    "a single token has no deviation to be normalised by; edit several requests at once, give history, "
                    "or use tokens='all'"
                )
            dtype = torch.promote_types(handle.dtype, torch.float32)
            deltas: dict[str, Delta] = {}
            notes: list[dict[str, Any]] = []
            for place, weight in weights.items():
                delta = _delta(signals[place], moments[weight.shape], config.lr, dtype, weight.name)
                size = float(torch.linalg.matrix_norm(weight.canonical().float()))
                notes.append({"weight": weight.name, "relative_norm": delta.norm() / size})
                deltas[weight.name] = delta
            extra = {
                "tokens": len(next(iter(signals.values())).inputs),
                "losses": [
                    {"id": request.id, "nll": loss} for request, loss in zip(requests, losses, strict=True)
                ],
                "weights": notes,
                "normalised_over": {_name(shape): int(own.count) for shape, own in sorted(moments.items())},
                "history": {"patches": [patch.id for patch in history or ()]},
            }
            parents = [entry.patch.id for entry in handle.applied]
            return make_patch(
                handle, self.options, plan, requests, deltas, parents, extra, carry=(_carry(fresh),)
            )


def read_signals(
    handle: ModelHandle, requests: Sequence[EditRequest], config: UltraEditConfig, progress: Progress | None
) -> tuple[dict[tuple[Role, int], Signals], list[float]]:
    """Inputs and output gradients of every edited weight, and each request's mean negative log-likelihood.

    The loss is summed, not averaged: a token's gradient then depends on its own row only, whatever shares the batch.

    Raises:
        NumericalError: A loss is not finite; names the request.
    """
    rows = [row for request in requests for row in request_rows(handle, request, ["{}"], "last")]
    inputs = {place: Site(*place, "in") for place in config.places}
    outputs = {place: Site(*place, "out") for place in config.places}
    parts: dict[tuple[Role, int], list[Signals]] = {place: [] for place in config.places}
    losses: list[float] = []
    writes = dict.fromkeys(outputs.values(), _with_gradient)
    reads = (*inputs.values(), *outputs.values())
    with frozen(handle.model), trace(handle, reads=reads, writes=writes, detach=False) as recording:
        for begin in range(0, len(rows), config.batch_size):
            chunk = rows[begin : begin + config.batch_size]
            batch = pad_rows([row.ids for row in chunk], handle.pad_id, "right", handle.device)
            # There is no stop site, so every pass gives logits.
            logits = cast(Tensor, recording.run(batch))
            each = _losses(logits, chunk)
            for request, row, loss in zip(requests[begin:], chunk, each.tolist(), strict=False):
                if not math.isfinite(loss):
                    raise NumericalError(
                        f"request {request.id!r}: the loss of its target is {loss}; load the model in fp32 or bf16"
                    )
                losses.append(loss / len(row.targets))
            gradients = torch.autograd.grad(each.sum(), [recording[site] for site in outputs.values()])
            kept = batch.attention_mask.bool() if config.tokens == "all" else _answers(chunk, batch.input_ids)
            for place, gradient in zip(config.places, gradients, strict=True):
                parts[place].append(Signals(_lines(recording[inputs[place]], kept), _lines(gradient, kept)))
            if progress is not None:
                progress("requests", len(losses), len(rows))
    joined = {
        place: Signals(torch.cat([one.inputs for one in some]), torch.cat([one.gradients for one in some]))
        for place, some in parts.items()
    }
    for (role, layer), found in joined.items():
        if not bool(found.joined.isfinite().all()):
            raise NumericalError(
                f"the inputs or gradients at {role} of layer {layer} hold NaN or infinity; load the model in fp32 or bf16"
            )
    return joined, losses


def ridge_factors(inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """``Δᵀ = (Hᵀ H + I)⁻¹ Hᵀ V``, solved over tokens or over the width, whichever is less.

    Args:
        inputs: ``H``, ``[token, in]`` fp64.
        values: ``V``, ``[token, out]`` fp64.

    Returns:
        ``left [out, r]`` and ``right [r, in]`` with ``Δ = left @ right``; ``r`` is the smaller of tokens and ``in``.
    """
    tokens, width = inputs.shape
    if tokens < width:
        gram = inputs @ inputs.T + torch.eye(tokens, dtype=inputs.dtype)
        return torch.cholesky_solve(values, torch.linalg.cholesky(gram)).T, inputs
    gram = inputs.T @ inputs + torch.eye(width, dtype=inputs.dtype)
    solved = torch.cholesky_solve(inputs.T @ values, torch.linalg.cholesky(gram))
    return solved.T, torch.eye(width, dtype=inputs.dtype)


def _delta(signals: Signals, moments: Moments, lr: float, dtype: torch.dtype, name: str) -> Delta:
    width = signals.inputs.shape[1]
    hidden, gradient = moments.normalise(signals.joined).split([width, signals.gradients.shape[1]], dim=1)
    values = -lr * hidden.square().sum(dim=1, keepdim=True) * gradient
    left, right = (part.to(dtype) for part in ridge_factors(signals.inputs, values))
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise NumericalError(f"{name}: the update holds NaN or infinity; the model stays as it was")
    thin = left.shape[1] * (left.shape[0] + right.shape[1]) < left.shape[0] * right.shape[1]
    return LowRank(left, right) if thin else Dense(left @ right)


def _with_gradient(value: Tensor) -> Tensor:
    # No parameter asks for gradients, so the lowest edited weight's output is where they begin.
    return value if value.requires_grad else value.detach().requires_grad_()


def _lines(values: Tensor, kept: Tensor) -> Tensor:
    return values.detach()[kept].to(device="cpu", dtype=torch.float64)


def _losses(logits: Tensor, rows: Sequence[EditRow]) -> Tensor:
    """Summed negative log-likelihood of each row's target, ``[row]``."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for index, row in enumerate(rows):
        lines = logits[index, row.prompt_last : row.prompt_last + len(row.targets)].to(wide)
        target = torch.tensor(row.targets, device=logits.device)
        losses.append(torch.nn.functional.cross_entropy(lines, target, reduction="sum"))
    return torch.stack(losses)


def _answers(rows: Sequence[EditRow], ids: Tensor) -> Tensor:
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for index, row in enumerate(rows):
        kept[index, row.prompt_last : row.prompt_last + len(row.targets)] = True
    return kept


def _by_shape(
    weights: Mapping[tuple[Role, int], Weight], signals: Mapping[tuple[Role, int], Signals]
) -> dict[Shape, Moments]:
    found: dict[Shape, Moments] = {}
    for place, weight in weights.items():
        own = Moments.of(signals[place].joined)
        found[weight.shape] = found[weight.shape].pooled(own) if weight.shape in found else own
    return found


def _name(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


def _carry(moments: Mapping[Shape, Moments]) -> Carry:
    """The moments of these requests alone; pooling them later keeps a sequence independent of how it was cut."""
    tensors = {}
    for shape, own in moments.items():
        for part in ("count", "mean", "square"):
            tensors[f"{_name(shape)} {part}"] = getattr(own, part)
    return Carry(KIND, tensors)


def _past(carries: Sequence[Carry]) -> dict[Shape, Moments]:
    found: dict[Shape, Moments] = {}
    for carry in carries:
        for name in {name.split()[0] for name in carry.tensors}:
            out, width = (int(size) for size in name.split("x"))
            own = Moments(*(carry.tensors[f"{name} {part}"] for part in ("count", "mean", "square")))
            found[out, width] = found[out, width].pooled(own) if (out, width) in found else own
    return found


def _build(options: EditorOptions) -> Editor:
    return UltraEditor(options)


ULTRAEDIT = Method(
    "ultraedit",
    "One gradient, normalised over the life of a sequence, and a ridge regression; no search",
    "Gu et al. 2026, arXiv 2505.14679",
    "one forward and one backward pass per request, one solve per weight",
    False,
    _build,
)
