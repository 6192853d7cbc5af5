"""Losses of unlearning that read hidden states, whole rows of logits, or two runs at once; conventions as in ``losses``.

*Verified* formulas were compared with released code, *reconstructed* ones follow from what a paper's text says; where that
leaves more than one reading, the docstring says which was taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from editors.unlearning.losses import IGNORED
from lab.errors import ConfigError
from lab.scoring import log_probs

Key = TypeVar("Key", bound=Hashable)


def flatness(logits: Tensor, labels: Tensor) -> Tensor:
    """``mean_t (max_v z - mean_v z)²``: zero where no token stands out.

    The forget term of PDU (Entesari et al. 2025, arXiv 2506.05314; verified; released code includes prompts and padding).
    """
    wide = _wide(logits[labels != IGNORED])
    return (wide.amax(-1) - wide.mean(-1)).square().mean()


def improbable(logits: Tensor, labels: Tensor, *, floor: float | None = -5.0) -> Tensor:
    """``-mean_t log(1 - p_t)``: the token unlikelihood that LAT pushes away with.

    Args:
        logits: Of the model in training.
        labels: What should become unlikely.
        floor: Tokens whose log-probability is below this are done and count as 0; ``None`` counts all.
    """
    wanted = labels != IGNORED
    picked = labels[wanted].unsqueeze(-1)
    wide = _wide(logits[wanted])
    # log(1 - p) = logsumexp of the others - logsumexp of all: exact also where p is close to 1.
    rest = wide.scatter(-1, picked, float("-inf")).logsumexp(-1) - wide.logsumexp(-1)
    if floor is not None:
        done = log_probs(wide.detach()).gather(-1, picked)[:, 0] < floor
        rest = torch.where(done, torch.zeros_like(rest), rest)
    return -rest.mean()


def bidirectional(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor,
    before: Tensor,
    *,
    push: float = 1.0,
    top: int = 50,
) -> Tensor:
    """``mean_t [Σ_{C⁺} Huber(z, z_T) + μ·Σ_{C⁻∖C⁺} relu(z - min(z_0, z_T))]`` over centred logits.

    ``C⁺`` are the teacher's likeliest tokens, ``C⁻`` the untouched model's. The first sum pulls towards the teacher (as in DUET,
    arXiv 2601.21283); the second pushes what the untouched model would have said down to the teacher's level. Its hinge is
    our reading of arXiv 2604.15482 (reconstructed). Logits are centred over the vocabulary, since a common shift says nothing.

    Args:
        logits: Of the model in training.
        labels: Mark which positions count.
        teacher: ``[answer token, vocabulary]`` of the instructed, untouched model; logits or log-probabilities.
        before: The same without the instruction.
        push: μ.
        top: Size of both sets; the vocabulary where that is smaller.
    """
    wide, goal, old = (_centred(each) for each in (logits[labels != IGNORED], teacher, before))
    count = min(top, wide.shape[-1])
    wished = torch.zeros_like(wide, dtype=torch.bool).scatter(-1, goal.topk(count, dim=-1).indices, True)
    said = torch.zeros_like(wished).scatter(-1, old.topk(count, dim=-1).indices, True) & ~wished
    pull = smooth_l1_loss(wide, goal.to(wide), reduction="none")
    over = (wide - torch.minimum(old, goal)).clamp_min(0)
    return ((pull * wished).sum(-1) + push * (over * said).sum(-1)).mean()


def masked_teacher(before: Tensor, labels: Tensor, refusal: Tensor) -> Tensor:
    """A teacher for models that follow no instruction: answer tokens at the bottom, refusal tokens at the top.

    Args:
        before: ``[answer token, vocabulary]`` of the untouched model.
        labels: ``[answer token]``, lowered to the row's least.
        refusal: ``[answer token]``, raised to the row's most; -1 raises none.
    """
    low, high = before.amin(-1, keepdim=True), before.amax(-1, keepdim=True)
    made = before.scatter(-1, labels[:, None], low)
    raised = made.scatter(-1, refusal.clamp_min(0)[:, None], high)
    return torch.where((refusal >= 0)[:, None], raised, made)


def pooled(states: Tensor, row: Tensor, rows: int) -> Tensor:
    """Position-weighted mean of each row's states, of length 1: ``Σ_i i·h_i / Σ_i i``.

    Args:
        states: ``[token, d]``, a row's tokens in order.
        row: ``[token]``.
        rows: How many rows there are.

    Returns:
        ``[rows, d]``.
    """
    lengths = torch.bincount(row, minlength=rows)
    starts = lengths.cumsum(0) - lengths
    rank = (torch.arange(len(row), device=row.device) - starts[row] + 1).to(states.dtype)
    total = states.new_zeros(rows, states.shape[-1]).index_add(0, row, states * rank[:, None])
    weight = states.new_zeros(rows).index_add(0, row, rank)
    return normalize(total / weight[:, None], dim=-1)


def n_pair(anchor: Tensor, positive: Tensor, negatives: Tensor, *, tau: float = 1.0) -> Tensor:
    """``mean log(1 + Σ_n exp((a·e_n - a·e_p)/τ))``.

    The contrastive term of WPN (arXiv 2408.09459; reconstructed from its name and abstract).

    Args:
        anchor: ``[batch, d]``, what the model in training is about to say.
        positive: ``[batch, d]``, held constant: what it should be near.
        negatives: ``[batch, n, d]``, held constant: what it should be far from.
        tau: τ.
    """
    if not tau > 0:
        raise ConfigError(f"tau must be positive, not {tau}")
    near = (anchor * positive.detach()).sum(-1, keepdim=True)
    far = torch.einsum("bd,bnd->bn", anchor, negatives.detach())
    gaps = torch.cat([torch.zeros_like(near), (far - near) / tau], dim=1)
    return gaps.logsumexp(1).mean()


def consistency(plain: Mapping[Key, Tensor], steered: Mapping[Key, Tensor], real: Tensor) -> Tensor:
    """``mean over layers and tokens of |sg(h) - h'|²``: LfU's term (arXiv 2511.13052; from the paper's text).

    Args:
        plain: Layer to ``[batch, pos, d]``, held constant.
        steered: The same under the undesired change.
        real: ``[batch, pos]``, tokens that are no padding.
    """
    parts = [(plain[key].detach() - steered[key]).square().sum(-1)[real].mean() for key in plain]
    return torch.stack(parts).mean()


def misdirection(states: Tensor, real: Tensor, goal: Tensor) -> Tensor:
    """Mean squared distance of real tokens' states from ``goal``, over tokens and widths: both terms of RMU.

    Li et al. 2024, arXiv 2403.03218 (verified): towards ``c·u`` on facts to forget, towards the untouched states on others.

    Args:
        states: ``[batch, pos, d]``.
        real: ``[batch, pos]``.
        goal: ``[d]`` or ``[real token, d]``.
    """
    return (states[real] - goal.to(states)).square().mean()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _centred(logits: Tensor) -> Tensor:
    wide = _wide(logits)
    return wide - wide.mean(-1, keepdim=True)
