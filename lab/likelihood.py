"""Log-likelihood of target tokens with a gradient that is written over what the forward pass left.

Over a vocabulary, ``torch.nn.functional.cross_entropy`` goes through memory as often as it computes: its backward pass fills a tensor of
zeros and makes another for the gradient, and so does every selection of lines. Here the log-probabilities themselves become the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def target_nll(logits: Tensor, targets: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
    """``-log p(target)`` of each line in nats, and the whole distribution of some lines; for one backward pass.

    Args:
        logits: ``[line, vocab]``.
        targets: ``[line]``, token ids.
        whole: ``[some]``, indices of different lines whose log-probabilities are wanted as well.

    Returns:
        ``[line]`` and ``[some, vocab]``, both with gradient to ``logits``.

    Raises:
        RuntimeError: From a second backward pass through the same result.
    """
    return _TargetNll.apply(logits, targets, whole)


class _TargetNll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, whole: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(logits, dim=1)
        ctx.save_for_backward(logp, targets, whole)
        return -logp.gather(1, targets[:, None])[:, 0], logp[whole]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logp, targets, whole = ctx.saved_tensors
        of_nll, of_whole = grads
        # In place, which is also why autograd refuses a second pass: the saved tensor has changed.
        gradient = logp.exp_()
        further = of_whole - gradient[whole] * of_whole.sum(dim=1, keepdim=True)
        gradient.mul_(of_nll[:, None])
        gradient.scatter_add_(1, targets[:, None], -of_nll[:, None])
        return gradient.index_add_(0, whole, further), None, None
