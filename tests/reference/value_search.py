"""The value search written the plain way: the whole model, forward and backward, at every step.

Nothing of ``lab.replay`` or ``editors.values`` is used, so that equality means something. Rows are right-padded, every
parameter is frozen, and each step is one forward and one backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainRow:
    """Tokens, where the change acts, the last prompt token, and the targets predicted from there on."""

    ids: Sequence[int]
    change: int
    prompt_last: int
    targets: Sequence[int] = ()


@dataclass(frozen=True)
class PlainResult:
    delta: Tensor
    init: Tensor
    losses: list[float]


def plain_value_search(
    model: Any,
    module: nn.Module,
    rows: Sequence[PlainRow],
    essence: PlainRow | None,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp: float,
    kl_factor: float,
    stop_below: float = 0.05,
    gamma: float = 0.0,
    hinge: bool = True,
    pad_id: int = 0,
) -> PlainResult:
    """One request; with ``gamma`` the model must run eager attention, whose full maps the drift is computed from."""
    every = [*rows, *([essence] if essence is not None else [])]
    length = max(len(row.ids) for row in every)
    ids = torch.full((len(every), length), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(every):
        ids[index, : len(row.ids)] = torch.tensor(list(row.ids))
        mask[index, : len(row.ids)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    lines = torch.arange(len(every))
    changes = torch.tensor([row.change for row in every])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    first: dict[str, Any] = {}
    current: dict[str, Tensor] = {}

    def add_delta(_module: nn.Module, _args: Any, output: Any) -> Any:
        value = output[0] if isinstance(output, tuple) else output
        shaped = value.reshape(len(every), length, -1)
        first.setdefault("init", shaped[0, rows[0].change].detach().clone())
        update = torch.zeros_like(shaped).index_put(
            (lines, changes), current["delta"].to(shaped.dtype).expand(len(every), -1)
        )
        changed = (shaped + update).reshape(value.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = module.register_forward_hook(add_delta)
    losses: list[float] = []
    try:
        width = model.config.hidden_size
        delta = torch.zeros(width, dtype=torch.promote_types(model.dtype, torch.float32), requires_grad=True)
        adam = torch.optim.Adam([delta], lr=lr)
        for step in range(steps):
            current["delta"] = delta
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                output_attentions=gamma > 0,
            )
            loss = _loss(output, first, rows, essence, delta, weight_decay, kl_factor, gamma, hinge)
            losses.append(float(loss.detach()))
            if losses[-1] < stop_below or step == steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            limit = clamp * first["init"].norm()
            with torch.no_grad():
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        hook.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    return PlainResult(delta.detach(), first["init"], losses)


def _loss(
    output: Any,
    first: dict[str, Any],
    rows: Sequence[PlainRow],
    essence: PlainRow | None,
    delta: Tensor,
    weight_decay: float,
    kl_factor: float,
    gamma: float,
    hinge: bool,
) -> Tensor:
    logits = output.logits
    where = [
        (index, row.prompt_last + place)
        for index, row in enumerate(rows)
        for place in range(len(row.targets))
    ]
    targets = torch.tensor([target for row in rows for target in row.targets])
    weights = torch.tensor(
        [1 / (len(rows) * len(row.targets)) for row in rows for _ in row.targets], dtype=delta.dtype
    )
    picked = logits[[row for row, _ in where], [place for _, place in where]].to(delta.dtype)
    chosen = torch.log_softmax(picked, dim=1).gather(1, targets[:, None])[:, 0]
    loss = -(weights * chosen).sum()
    if essence is not None:
        now = torch.log_softmax(logits[len(rows), essence.change].to(delta.dtype), dim=0)
        before = first.setdefault("essence", now.detach())
        loss = loss + kl_factor * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
    loss = (
        loss
        + weight_decay
        * torch.linalg.vector_norm(delta)
        / torch.linalg.vector_norm(first["init"].to(delta.dtype)) ** 2
    )
    if gamma:
        maps = [layer[: len(rows)] for layer in output.attentions]
        original = first.setdefault("maps", [layer.detach() for layer in maps])
        loss = loss + gamma * plain_drift(original, maps, rows, hinge)
    return loss


def plain_drift(
    original: Sequence[Tensor], current: Sequence[Tensor], rows: Sequence[PlainRow], hinge: bool
) -> Tensor:
    """SADR's sum from full attention maps ``[row, head, query, key]`` of every layer, loop by loop."""
    total = torch.zeros((), dtype=current[0].dtype)
    for before, now in zip(original, current, strict=True):
        for index, row in enumerate(rows):
            p, q = before[index, :, row.prompt_last] + 1e-8, now[index, :, row.prompt_last] + 1e-8
            strongest = p[:, row.change].max()
            for head in range(p.shape[0]):
                if not hinge or bool(q[head, row.change] > strongest):
                    total = total + (p[head] * (p[head] / q[head]).log()).sum() / len(rows)
    return total
