"""Losses of unlearning as pure functions of logits and labels; what is minimised is what they return.

Throughout: ``logits [batch, pos, vocabulary]`` and ``labels [batch, pos]`` are aligned (position ``i`` predicts ``labels[i]``; no
shifting inside), and -100 marks every position that is no answer token: prompt, padding. Such a position never reaches a
log-softmax, so whatever stands there, NaN included, has no part in a loss or its gradient. Softmax runs in fp32, or in fp64 where
the logits are fp64. What the untouched model θ0 said is an argument, computed once beforehand; no function runs a model.

Notation: ``p_t`` probability of answer token ``t`` given prompt and earlier answer tokens, ``NLL = -Σ_t log p_t``,
``nll = NLL / T``. Every reduction over tokens is named: ``mean`` over all answer tokens of the batch (what a Hugging Face model's
own loss does), ``row_mean`` and ``row_sum`` over each answer first, then the mean over the batch.

Formulas marked *verified* were compared with the authors' code or with locuslab/open-unlearning; they are written anew here.
Two losses are sums: GradDiff is ``gradient_ascent`` with ``answer_nll`` on retained facts, KL-min is ``gradient_ascent`` with
``retain_kl`` on them; ``combined`` adds the two.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lab.errors import ConfigError
from lab.scoring import kl_divergence, log_probs, nll, reduce_positions

TokenReduction = Literal["mean", "row_mean", "row_sum"]
"""How tokens are reduced; what rows are left are averaged."""

IGNORED = -100


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of each label.

    Returns:
        ``[batch, pos]``; 0 where the label is -100.
    """
    return -nll(logits, labels, reduction="none")


def answer_nll(logits: Tensor, labels: Tensor, reduction: TokenReduction = "mean") -> Tensor:
    """``nll``: fine-tuning on answers.

    On retained facts it is the retain term of GradDiff, NPO and SimNPO; on a question with a refusal behind it, it is refusal
    tuning (Maini et al. 2024, arXiv 2401.06121, "IDK"; verified).
    """
    return nll(logits, labels, reduction=reduction).mean()


def gradient_ascent(logits: Tensor, labels: Tensor, reduction: TokenReduction = "mean") -> Tensor:
    """``-nll``: makes the answers unlikely, without a bound (Jang et al. 2023, arXiv 2210.01504; verified)."""
    return -answer_nll(logits, labels, reduction)


def combined(
    forget: Tensor, retain: Tensor | None, *, forget_weight: float = 1.0, retain_weight: float = 1.0
) -> Tensor:
    """``γ·L_forget + α·L_retain``; with no retain term, the first alone.

    GradDiff (Liu et al. 2022, arXiv 2203.12817) and KL-min (Maini et al. 2024, arXiv 2401.06121) are such sums with
    γ = α = 1 (verified).
    """
    weighted = forget_weight * forget
    return weighted if retain is None else weighted + retain_weight * retain


def retain_kl(
    logits: Tensor, labels: Tensor, reference: Tensor, reduction: TokenReduction = "mean"
) -> Tensor:
    """``mean_t KL(π_θ0 ‖ π_θ)`` over answer tokens: KL-min's retain term.

    Maini et al. 2024, arXiv 2401.06121 (verified); released code averages over prompt and padding as well.

    Args:
        logits: Of the model in training.
        labels: Mark which positions count.
        reference: ``[answer token, vocabulary]`` log-probabilities of the untouched model, row after row.
        reduction: Over tokens.
    """
    wanted = labels != IGNORED
    each = kl_divergence(reference.detach(), log_probs(logits[wanted]), reduction="none")
    return _reduce(_placed(each, wanted), wanted, reduction)


def npo(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor,
    *,
    beta: float = 0.1,
    reduction: TokenReduction = "row_sum",
) -> Tensor:
    """``-(2/β)·mean log σ(β·(NLL_θ - NLL_θ0))``: negative preference optimisation.

    Zhang et al. 2024, arXiv 2404.05868 (verified). Its gradient is that of ``-NLL`` times
    ``2 p^β / (p^β + p_0^β)``: 1 at the start, 0 once an answer is forgotten; β → 0 is gradient ascent. With
    ``reduction="row_mean"`` it is NPO-mean, a method of its own (as in RESTOR, verified).

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        reference: ``[batch, pos]`` log-probabilities of the labels under the untouched model (``token_logprobs``).
        beta: β.
        reduction: ``row_sum`` (NPO) or ``row_mean`` (NPO-mean).
    """
    gap = _per_row(reference.detach() - token_logprobs(logits, labels), labels, reduction)
    return _softened(gap, beta)


def simnpo(logits: Tensor, labels: Tensor, *, beta: float = 4.5, margin: float = 0.0) -> Tensor:
    """``-(2/β)·mean log σ(β·(nll_θ - δ))``: NPO without a reference, by token means.

    Fan et al. 2024, arXiv 2410.07163 (verified). The paper calls the margin γ; here γ is always the weight of the forget term.

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        beta: β.
        margin: δ.
    """
    return _softened(_per_row(-token_logprobs(logits, labels), labels, "row_mean") - margin, beta)


def dpo(
    chosen_logits: Tensor,
    chosen_labels: Tensor,
    chosen_reference: Tensor,
    rejected_logits: Tensor,
    rejected_labels: Tensor,
    rejected_reference: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """``-(2/β)·mean log σ(β·[log(π_θ/π_θ0)(refusal) - log(π_θ/π_θ0)(answer)])``, summed log-probabilities.

    Rafailov et al. 2023, arXiv 2305.18290, with refusals preferred to answers as in Maini et al. 2024, arXiv 2401.06121
    ("IdkDPO"; verified). The factor 2/β is the unlearning literature's and makes NPO the case of an unchanged refusal.

    Args:
        chosen_logits, chosen_labels: Of the refusals, a row for each answer.
        chosen_reference: ``[batch, pos]`` log-probabilities of their labels under the untouched model.
        rejected_logits, rejected_labels, rejected_reference: The same of the answers to forget.
        beta: β.
    """
    chosen = _per_row(token_logprobs(chosen_logits, chosen_labels) - chosen_reference.detach(), chosen_labels)
    rejected = _per_row(
        token_logprobs(rejected_logits, rejected_labels) - rejected_reference.detach(), rejected_labels
    )
    return _softened(chosen - rejected, beta)


def catnip(logits: Tensor, labels: Tensor, *, beta: float = 1.0, detach_ref: bool = False) -> Tensor:
    """``-(2/β)·mean_rows mean_t log σ(-β·ℓ_t)`` with ``ℓ = log p - log(1-p)``: NPO token by token, its reference ``1 - p``.

    arXiv 2602.02824 (reconstructed: the substitution that needs neither reference nor retained data and weighs every token by
    the model's own confidence). The gradient on a label's logit is ``2σ(βℓ)``, times ``1 - p`` with ``detach_ref``; β = 1
    is ``-2·log(1-p)``.

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        beta: β.
        detach_ref: Holds ``1 - p`` constant; with β = 1 that is twice ``wga``'s gradient.
    """
    if not beta > 0:
        raise ConfigError(f"beta must be positive, not {beta}")
    wanted = labels != IGNORED
    picked = labels[wanted].unsqueeze(-1)
    wide = logits[wanted].to(torch.promote_types(logits.dtype, torch.float32))
    # Not log(1 - exp(log p)): the other tokens' mass is exact also where p is close to 1.
    rest = wide.scatter(-1, picked, float("-inf")).logsumexp(-1)
    whole = wide.logsumexp(-1)
    own = wide.gather(-1, picked)[:, 0] - whole
    odds = own - (rest - whole).detach() if detach_ref else own + whole - rest
    each = -(2.0 / beta) * logsigmoid(-beta * odds)
    return _reduce(_placed(each, wanted), wanted, "row_mean")


def wga(logits: Tensor, labels: Tensor, *, beta: float = 1.0, reduction: TokenReduction = "mean") -> Tensor:
    """``mean_t w_t·log p_t`` with ``w = p^β`` held constant: ascent that fades as a token is forgotten.

    Wang et al. 2025, arXiv 2502.19301 (verified). β = 0 is gradient ascent.
    """
    return satimp(logits, labels, saturation=beta, importance=0.0, reduction=reduction)


def satimp(
    logits: Tensor,
    labels: Tensor,
    *,
    saturation: float = 5.0,
    importance: float = 1.0,
    reduction: TokenReduction = "mean",
) -> Tensor:
    """``mean_t w_t·log p_t`` with ``w = p^β₁·(1-p)^β₂`` held constant.

    Yang et al. 2025, arXiv 2505.11953 (verified). The weight vanishes for tokens that are forgotten and for those that are certain.

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        saturation: β₁.
        importance: β₂.
        reduction: Over tokens.
    """
    picked = token_logprobs(logits, labels)
    certain = picked.detach()
    # 1 - p, without cancellation where p is close to 1.
    weight = (saturation * certain).exp() * (-torch.expm1(certain)) ** importance
    return _reduce(weight * picked, labels != IGNORED, reduction)


def undial(
    logits: Tensor,
    labels: Tensor,
    reference: Tensor,
    *,
    beta: float = 10.0,
    reduction: TokenReduction = "mean",
) -> Tensor:
    """``CE(softmax(z_θ0 - β·onehot(label)), π_θ)``: distillation from the untouched model with the label's logit lowered.

    Dong et al. 2024, arXiv 2402.10052 (verified; released code lets -100 labels wrap around, here they are masked).

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        reference: ``[answer token, vocabulary]`` logits or log-probabilities of the untouched model, row after row.
        beta: How far the label's logit is lowered.
        reduction: Over tokens.
    """
    wanted = labels != IGNORED
    picked = labels[wanted].unsqueeze(-1)
    lowered = reference.detach().scatter_add(
        -1, picked, torch.full_like(picked, -beta, dtype=reference.dtype)
    )
    return _cross_entropy(logits, wanted, log_probs(lowered), reduction)


def ce_u(
    logits: Tensor, labels: Tensor, *, skip_first: int = 1, reduction: TokenReduction = "mean"
) -> Tensor:
    """``CE(softmax(z with the label's logit at -∞), π_θ)``, the target held constant: the model's own second choices.

    Yang 2025, arXiv 2503.01224, as in open-unlearning (verified).

    Args:
        logits: Of the model in training.
        labels: Answers to forget.
        skip_first: Answer tokens left out at the start of every answer.
        reduction: Over tokens.

    Raises:
        ConfigError: No token is left.
    """
    wanted = labels != IGNORED
    wanted = wanted & (wanted.cumsum(dim=-1) > skip_first)
    if not bool(wanted.any()):
        raise ConfigError(
            f"skip_first={skip_first} leaves no answer token; answers of one token need skip_first=0"
        )
    picked = labels[wanted].unsqueeze(-1)
    target = log_probs(logits[wanted].detach().scatter(-1, picked, float("-inf")))
    return _cross_entropy(logits, wanted, target, reduction)


def _cross_entropy(logits: Tensor, wanted: Tensor, target: Tensor, reduction: TokenReduction) -> Tensor:
    """``-Σ_v q_v log p_v`` of the wanted positions; ``target`` holds log q, ``[wanted, vocabulary]``."""
    each = -(target.exp() * log_probs(logits[wanted])).sum(-1)
    # Rows that lost all their tokens have no part in the mean over rows.
    kept = wanted.any(dim=-1)
    return _reduce(_placed(each, wanted)[kept], wanted[kept], reduction)


def _placed(values: Tensor, wanted: Tensor) -> Tensor:
    """Values of the wanted positions at their places, 0 elsewhere."""
    table = torch.zeros(wanted.shape, dtype=values.dtype, device=values.device)
    return table.masked_scatter(wanted, values)


def _per_row(values: Tensor, labels: Tensor, reduction: TokenReduction = "row_sum") -> Tensor:
    if reduction == "mean":
        raise ConfigError("a preference loss compares whole answers; use row_sum or row_mean")
    return reduce_positions(values, labels != IGNORED, reduction)


def _reduce(values: Tensor, wanted: Tensor, reduction: TokenReduction) -> Tensor:
    return reduce_positions(values, wanted, reduction).mean()


def _softened(gap: Tensor, beta: float) -> Tensor:
    if not beta > 0:
        raise ConfigError(f"beta must be positive, not {beta}; the limit of 0 is gradient ascent")
    return -(2.0 / beta) * logsigmoid(beta * gap).mean()
