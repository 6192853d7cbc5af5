"""Losses of unlearning token by token in plain loops, from the formulas; no helper of the library."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rows(logits: Tensor, labels: Tensor) -> list[list[tuple[Tensor, int]]]:
    """For each answer its positions: logits ``[vocabulary]`` and label."""
    return [
        [(logits[r, c], int(labels[r, c])) for c in range(labels.shape[1]) if int(labels[r, c]) >= 0]
        for r in range(labels.shape[0])
    ]


def probability(z: Tensor, label: int) -> Tensor:
    return torch.exp(z[label]) / torch.exp(z).sum()


def nll(logits: Tensor, labels: Tensor, how: str) -> Tensor:
    each = [[-torch.log(probability(z, y)) for z, y in row] for row in rows(logits, labels)]
    if how == "mean":
        return sum(x for row in each for x in row) / sum(len(row) for row in each)
    return sum(sum(row) / (len(row) if how == "row_mean" else 1) for row in each) / len(each)


def kl(before: Tensor, now: Tensor, labels: Tensor) -> Tensor:
    total, count = 0.0, 0
    for old, new in zip(rows(before, labels), rows(now, labels), strict=True):
        for (a, _), (b, _) in zip(old, new, strict=True):
            p, q = torch.softmax(a, 0), torch.softmax(b, 0)
            total, count = total + (p * (p / q).log()).sum(), count + 1
    return total / count


def _answers(logits: Tensor, labels: Tensor, mean: bool) -> list[Tensor]:
    found = []
    for row in rows(logits, labels):
        total = sum(torch.log(probability(z, y)) for z, y in row)
        found.append(total / len(row) if mean else total)
    return found


def _soft(gaps: list[Tensor], beta: float) -> Tensor:
    return sum(-2 / beta * torch.log(1 / (1 + torch.exp(-beta * gap))) for gap in gaps) / len(gaps)


def npo(now: Tensor, before: Tensor, labels: Tensor, beta: float, *, mean: bool) -> Tensor:
    pairs = zip(_answers(now, labels, mean), _answers(before, labels, mean), strict=True)
    return _soft([old - new for new, old in pairs], beta)


def simnpo(now: Tensor, labels: Tensor, beta: float, margin: float) -> Tensor:
    return _soft([-answer - margin for answer in _answers(now, labels, True)], beta)


def dpo(
    chosen: Tensor,
    chosen_before: Tensor,
    chosen_labels: Tensor,
    rejected: Tensor,
    rejected_before: Tensor,
    rejected_labels: Tensor,
    beta: float,
) -> Tensor:
    wins = zip(
        _answers(chosen, chosen_labels, False), _answers(chosen_before, chosen_labels, False), strict=True
    )
    losses = zip(
        _answers(rejected, rejected_labels, False),
        _answers(rejected_before, rejected_labels, False),
        strict=True,
    )
    return _soft([(a - b) - (c - d) for (a, b), (c, d) in zip(wins, losses, strict=True)], beta)


def weighted(logits: Tensor, labels: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    each = []
    for row in rows(logits, labels):
        for z, y in row:
            p = probability(z, y)
            each.append(weight(p.detach()) * torch.log(p))
    return sum(each) / len(each)


def undial(logits: Tensor, before: Tensor, labels: Tensor, beta: float) -> Tensor:
    each = []
    for now, old in zip(rows(logits, labels), rows(before, labels), strict=True):
        for (z, y), (teacher, _) in zip(now, old, strict=True):
            shift = torch.zeros_like(teacher)
            shift[y] = beta
            each.append(-(torch.softmax(teacher - shift, 0) * torch.softmax(z, 0).log()).sum())
    return sum(each) / len(each)


def ce_u(logits: Tensor, labels: Tensor, skip: int) -> Tensor:
    each = []
    for row in rows(logits, labels):
        for z, y in row[skip:]:
            others = torch.exp(z.detach())
            others = torch.where(torch.arange(len(others)) == y, 0.0, others)
            each.append(-(others / others.sum() * torch.softmax(z, 0).log()).sum())
    return sum(each) / len(each)


def catnip(logits: Tensor, labels: Tensor, beta: float, detached: bool) -> Tensor:
    answers = []
    for row in rows(logits, labels):
        each = []
        for z, y in row:
            p = probability(z, y)
            rest = 1 - p
            odds = torch.log(p) - torch.log(rest.detach() if detached else rest)
            each.append(-2 / beta * torch.log(1 / (1 + torch.exp(beta * odds))))
        answers.append(sum(each) / len(each))
    return sum(answers) / len(answers)


def flatness(logits: Tensor, labels: Tensor) -> Tensor:
    each = [(z.max() - z.sum() / len(z)) ** 2 for row in rows(logits, labels) for z, _ in row]
    return sum(each) / len(each)


def improbable(logits: Tensor, labels: Tensor, floor: float) -> Tensor:
    each = []
    for row in rows(logits, labels):
        for z, y in row:
            p = probability(z, y)
            each.append(-torch.log(1 - p) * float(torch.log(p) >= floor))
    return sum(each) / len(each)


def bidirectional(
    now: Tensor, teacher: Tensor, before: Tensor, labels: Tensor, push: float, top: int
) -> Tensor:
    total, count = 0.0, 0
    for new, goal, old in zip(rows(now, labels), rows(teacher, labels), rows(before, labels), strict=True):
        for (z, _), (t, _), (o, _) in zip(new, goal, old, strict=True):
            z, t, o = (x - x.sum() / len(x) for x in (z, t, o))
            wished = sorted(range(len(t)), key=lambda v: -float(t[v]))[:top]
            said = sorted(range(len(o)), key=lambda v: -float(o[v]))[:top]
            for v in wished:
                gap = (z[v] - t[v]).abs()
                total = total + (0.5 * gap**2 if float(gap.detach()) < 1 else gap - 0.5)
            for v in set(said) - set(wished):
                allowed = o[v] - max(float(o[v] - t[v]), 0.0)
                total = total + push * (z[v] - allowed).clamp_min(0)
            count += 1
    return total / count


def n_pair(anchor: Tensor, positive: Tensor, negatives: Tensor, tau: float) -> Tensor:
    each = []
    for a, p, others in zip(anchor, positive, negatives, strict=True):
        each.append(torch.log(1 + sum(torch.exp((a @ n - a @ p) / tau) for n in others)))
    return sum(each) / len(each)


def pooled(rows_of_states: list[Tensor]) -> Tensor:
    found = []
    for states in rows_of_states:
        total = sum((i + 1) * h for i, h in enumerate(states)) / sum(range(1, len(states) + 1))
        found.append(total / total.norm())
    return torch.stack(found)
