"""Fine-tuning baselines written plainly: one weight of a model is trained in place, token by token, request by request."""

from __future__ import annotations

import torch


def finetune(
    model,
    parameter,
    rows: list[tuple[list[int], list[int]]],
    *,
    objective: str,
    steps: int,
    lr: float,
    bound: float | None = None,
    stop_below: float = 1e-2,
) -> torch.Tensor:
    """Trains ``parameter`` of ``model`` in place and returns how much it changed, as it is stored.

    Args:
        model: A causal language model.
        parameter: The only thing that is trained.
        rows: Prompt ids and target ids of each request; every update sees all of them.
        objective: ``"last"``: all target tokens against the distribution after the prompt. ``"each"``: teacher forced.
        steps: Passes.
        lr: Learning rate of Adam.
        bound: Largest change of an entry.
        stop_below: Training ends when the mean loss is below this.
    """
    for other in model.parameters():
        other.requires_grad_(other is parameter)
    before = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=lr)
    for _ in range(steps):
        losses = []
        for prompt, target in rows:
            terms = []
            for index, token in enumerate(target):
                seen = prompt + target[:index] if objective == "each" else prompt
                logits = model(torch.tensor([seen])).logits[0, -1]
                terms.append(-torch.log_softmax(logits, dim=-1)[token])
            losses.append(sum(terms) / len(terms))
        loss = sum(losses) / len(losses)
        if float(loss.detach()) < stop_below:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        if bound is not None:
            with torch.no_grad():
                parameter.copy_(torch.minimum(torch.maximum(parameter, before - bound), before + bound))
    return parameter.detach() - before
