"""PMET's search for two deltas written the plain way: the whole model at every step, one request, its rules as in the authors' code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.reference.value_search import PlainRow


@dataclass(frozen=True)
class JointResult:
    deltas: tuple[Tensor, Tensor]
    inits: tuple[Tensor, Tensor]
    losses: list[float]
    eased: list[bool]


def plain_joint_search(
    model: Any,
    modules: tuple[nn.Module, nn.Module],
    rows: Sequence[PlainRow],
    essence: PlainRow,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
    clamp: float,
    kl_factor: float,
    stop_below: float,
    nll_factor: float,
    pad_id: int = 0,
) -> JointResult:
    every = [*rows, essence]
    length = max(len(row.ids) for row in every)
    ids = torch.full((len(every), length), pad_id)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(every):
        ids[index, : len(row.ids)] = torch.tensor(list(row.ids))
        mask[index, : len(row.ids)] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    lines, changes = torch.arange(len(every)), torch.tensor([row.change for row in every])
    dtype = torch.promote_types(model.dtype, torch.float32)
    deltas = tuple(torch.zeros(model.config.hidden_size, dtype=dtype, requires_grad=True) for _ in modules)
    inits: dict[int, Tensor] = {}
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)

    def adding(place: int) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            shaped = output.reshape(len(every), length, -1)
            inits.setdefault(place, shaped[0, rows[0].change].detach().clone())
            update = torch.zeros_like(shaped).index_put(
                (lines, changes), deltas[place].to(shaped.dtype).expand(len(every), -1)
            )
            return (shaped + update).reshape(output.shape)

        return hook

    hooks = [module.register_forward_hook(adding(place)) for place, module in enumerate(modules)]
    adam = torch.optim.Adam(list(deltas), lr=lr)
    losses: list[float] = []
    eased: list[bool] = []
    before: Tensor | None = None
    factor = nll_factor
    try:
        for step in range(steps):
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
            ).logits.to(dtype)
            log_probs = logits.log_softmax(-1)
            now = log_probs[len(rows), essence.change]
            before = now.detach() if before is None else before
            each, best = [], []
            for index, row in enumerate(rows):
                place = log_probs[index, row.prompt_last : row.prompt_last + len(row.targets)]
                each.append(place[range(len(row.targets)), list(row.targets)].mean())
                best.append(place.max(dim=1).values.mean())
            nll = -factor * torch.stack(each).mean()
            kl = kl_factor * torch.nn.functional.kl_div(before, now, log_target=True, reduction="sum")
            decay = weight_decay * sum(delta.norm() / inits[i].norm() ** 2 for i, delta in enumerate(deltas))
            loss = nll + kl + decay
            losses.append(float(loss.detach()))
            eased.append(factor != nll_factor)
            if losses[-1] < stop_below:
                break
            if torch.stack(best).exp().mean().item() == torch.stack(each).exp().mean().item():
                factor = 0.1 * nll_factor
                if float(kl.detach()) <= 0.01:
                    break
            else:
                factor = nll_factor
            if step == steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                for place, delta in enumerate(deltas):
                    limit = clamp * inits[place].norm()
                    if delta.norm() > limit:
                        delta.mul_(limit / delta.norm())
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in asked:
            parameter.requires_grad_(True)
    first, second = (delta.detach() for delta in deltas)
    return JointResult((first, second), (inits[0], inits[1]), losses, eased)
