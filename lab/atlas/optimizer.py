"""Updates of a training step over parameters in shared memory: Muon for matrices inside blocks, AdamW for the rest.

The optimizers of ``torch.optim`` keep their state to themselves; here it lies in shared tensors, so that each process updates
its own part of one model and any of them can write the whole checkpoint.

Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon), with the update size of Liu et al. 2025
(arXiv:2502.16982), which makes its learning rate comparable with AdamW's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lab.atlas.lean import embedding_name
from lab.atlas.recipe import Recipe

_BETA1, _BETA2, _EPS, _MOMENTUM = 0.9, 0.97, 1e-10, 0.95
_NEWTON = (3.4445, -4.7750, 2.0315)


def is_matrix(name: str, value: Tensor, recipe: Recipe) -> bool:
    """Whether a parameter is a matrix inside a block."""
    return value.dim() == 2 and name not in (embedding_name(recipe.shape), "transformer.wpe.weight")


def initial_state(params: Mapping[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """Zero state by ``<kind>/<parameter>``: ``momentum`` for Muon, ``mean`` and ``square`` for AdamW."""
    state: dict[str, Tensor] = {}
    for name, value in params.items():
        if recipe.matrix_optimizer == "muon" and is_matrix(name, value, recipe):
            state[f"momentum/{name}"] = torch.zeros_like(value)
        else:
            state[f"mean/{name}"] = torch.zeros_like(value)
            state[f"square/{name}"] = torch.zeros_like(value)
    return state


def share_out(params: Mapping[str, Tensor], recipe: Recipe, parts: int) -> list[list[str]]:
    """Deals the parameters to processes; matrices of one shape evenly, as they cost the most."""
    order = sorted(params, key=lambda name: (is_matrix(name, params[name], recipe), params[name].numel()))
    return [order[part::parts] for part in range(parts)]


@torch.no_grad()
def update(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    names: Sequence[str],
    recipe: Recipe,
    factor: float,
    step: int,
) -> None:
    """Updates parameters and state in place.

    Args:
        params: fp32 parameters.
        grads: fp32 gradients, clipped.
        state: From ``initial_state``.
        names: The parameters to update.
        recipe: Peak rates and decay.
        factor: Share of the peak rate.
        step: Steps done before this one.
    """
    groups: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for name in names:
        value, grad = params[name], grads[name]
        momentum = state.get(f"momentum/{name}")
        matrix = is_matrix(name, value, recipe)
        rate = factor * (recipe.matrix_rate if matrix else recipe.rate)
        if matrix:
            value.mul_(1 - rate * recipe.weight_decay)
        if momentum is None:
            _adam(value, grad, state[f"mean/{name}"], state[f"square/{name}"], rate, step)
            continue
        momentum.lerp_(grad, 1 - _MOMENTUM)
        ahead = grad.lerp(momentum, _MOMENTUM)
        # A fused query-key-value matrix is three matrices side by side.
        count = 3 if name.endswith("c_attn.weight") else 1
        for target, direction in zip(value.chunk(count, 1), ahead.chunk(count, 1), strict=True):
            wide = target.shape[0] <= target.shape[1]
            pair = (target, direction) if wide else (target.t(), direction.t())
            groups.setdefault(pair[0].shape, []).append(pair)
    for size, pairs in groups.items():
        turned = orthogonalize(torch.stack([direction for _, direction in pairs]))
        length = -factor * recipe.matrix_rate * 0.2 * math.sqrt(max(size))
        for (target, _), direction in zip(pairs, turned, strict=True):
            target.add_(direction, alpha=length)


def _adam(value: Tensor, grad: Tensor, mean: Tensor, square: Tensor, rate: float, step: int) -> None:
    mean.lerp_(grad, 1 - _BETA1)
    square.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
    scale = (square / (1 - _BETA2 ** (step + 1))).sqrt_().add_(_EPS)
    value.addcdiv_(mean, scale, value=-rate / (1 - _BETA1 ** (step + 1)))


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones.

    Args:
        matrices: ``[n, rows, columns]`` with no more rows than columns.

    Returns:
        fp32 tensor of the same shape whose singular values lie near 1.
    """
    a, b, c = _NEWTON
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.float()
