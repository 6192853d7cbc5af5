"""``suffix``: one string of tokens behind every prompt that makes the answers come out (dynamic unlearning attack).

The suffix is found by greedy coordinate gradient (arXiv 2307.15043) on half of the facts and judged on the other half, as
arXiv 2408.10682 does to see whether a suffix opens a model or merely dictates an answer. Controls are asked behind suffixes of their
own and behind those of the facts, and the higher of the two counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lab.arch import Role
from lab.audit.base import (
    Access,
    AttackResult,
    AuditSubject,
    Family,
    Progress,
    Scores,
    not_applicable,
)
from lab.audit.forward import Lines, id_lines, text_ids, written_logprobs
from lab.audit.variants import halves, worst_variant
from lab.records import Fact
from lab.trace import Site

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Row = tuple[list[int], list[int]]


class Suffix:
    """GCG over a universal suffix; found on the audited model, and where there is one on the model before, then carried over."""

    name = "suffix"
    family: Family = "prompt"
    access: Access = "white-box"
    paper = "arXiv 2408.10682"
    cost = "a backward pass and a batch of swaps per step and half"
    needs: tuple[str, ...] = ()

    def run(self, subject: AuditSubject, report_progress: Progress) -> AttackResult:
        """Runs the attack."""
        if len(subject.facts) < 2:
            return not_applicable(
                self, "one fact cannot be divided into facts to learn from and facts to test"
            )
        subject = subject.sample(subject.pick(16, 100))
        length, steps, swaps, learn = subject.pick((5, 4, 16, 4), (16, 100, 256, 16))
        controls = subject.controls
        sides: list[tuple[str, ModelHandle, Sequence[Fact]]] = [("facts", subject.handle, subject.facts)]
        if controls.oracle is not None:
            sides.append(("oracle", controls.oracle, subject.facts))
        if len(controls.never) > 1:
            sides.append(("never", subject.handle, controls.never))
        sources = {"found_here": None, **({"carried_over": subject.base} if subject.base is not None else {})}
        table: dict[str, dict[str, list[float]]] = {}
        texts: dict[str, list[str]] = {}
        ours: dict[str, list[list[int]]] = {}
        runs = [(source, side) for source in sources for side in sides]
        for done, (source, (side, handle, facts)) in enumerate(runs):
            report_progress(self.name, done, len(runs))
            scores, others = [0.0] * len(facts), [0.0] * len(facts)
            for place, (train, test) in enumerate(halves(len(facts), subject.seed)):
                origin = sources[source] or handle
                found = find_suffix(
                    origin,
                    _rows(subject, origin, [facts[i] for i in train[:learn]]),
                    length=length,
                    steps=steps,
                    swaps=swaps,
                    seed=subject.seed,
                )
                texts.setdefault(f"{source}/{side}", []).append(handle.decode(found))
                rows = _rows(subject, handle, [facts[i] for i in test])
                _fill(scores, test, handle, rows, found)
                if side == "facts":
                    ours.setdefault(source, []).append(found)
                else:
                    # All facts of a half share one suffix, so that luck in finding it is luck of the whole half, which no
                    # spread between facts shows. A control gets the facts' suffixes too, and counts with the better pair.
                    _fill(others, test, handle, rows, ours[source][place])
            table.setdefault(source, {})[side] = max(scores, others, key=math.fsum)
        report_progress(self.name, len(runs), len(runs))
        found_scores = {source: Scores.of(arm) for source, arm in table.items()}
        return worst_variant(
            self,
            subject,
            found_scores,
            tried=f"{length} tokens, {steps} steps of {swaps} swaps, learned on {learn} facts of each half and judged on "
            "the other",
            note="an empty suffix stands where none beat the bare prompt; the paper's budgets are 100 to 500 steps, 512 swaps",
            details={"suffixes": texts},
        )


def _fill(
    scores: list[float],
    places: Sequence[int],
    handle: ModelHandle,
    rows: Sequence[Row],
    suffix: Sequence[int],
) -> None:
    """Puts the probabilities of the rows' targets behind a suffix where they belong."""
    values = written_logprobs(handle, _lines(handle, rows, [suffix] * len(rows)))
    for index, value in zip(places, values.exp().clamp_max(1.0).tolist(), strict=True):
        scores[index] = value


def _rows(subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact]) -> list[Row]:
    return text_ids(handle, [(subject.prompt(fact), fact.object) for fact in facts])


def _lines(handle: ModelHandle, rows: Sequence[Row], suffixes: Sequence[Sequence[int]]) -> Lines:
    return id_lines(
        handle,
        [([*prompt, *suffix], target) for (prompt, target), suffix in zip(rows, suffixes, strict=True)],
    )


def find_suffix(
    handle: ModelHandle, rows: Sequence[Row], *, length: int, steps: int, swaps: int, seed: int, top: int = 32
) -> list[int]:
    """Token ids that make the targets of ``rows`` likeliest when they stand between prompt and target.

    Empty where no suffix that was tried beats having none. Each step takes the gradient of the loss with respect to the
    suffix's embeddings, ranks all tokens at every place by the first-order change of the loss, and tries ``swaps`` single
    exchanges among the best; the best one stays if it helps.

    Args:
        handle: The model.
        rows: Prompt ids and target ids.
        length: Tokens of the suffix.
        steps: Exchanges at most.
        swaps: Exchanges tried per step.
        seed: Draws the start and the exchanges.
        top: Candidates per place.
    """
    generator = torch.Generator().manual_seed(seed)
    table: Any = handle.model.get_input_embeddings()
    embeddings = table.weight.detach().float()
    special = [token for token in handle.tokenizer.all_special_ids if token < embeddings.shape[0]]
    usable = torch.ones(embeddings.shape[0], dtype=torch.bool)
    usable[special] = False
    usable[len(handle.tokenizer) :] = False
    places = usable.nonzero().squeeze(-1)
    suffix = places[torch.randint(len(places), (length,), generator=generator)].tolist()
    best = _loss(handle, rows, [suffix])[0]
    for _ in range(steps):
        change = (_slope(handle, rows, suffix) @ embeddings.T).cpu()  # [length, vocabulary]
        change[:, ~usable] = float("inf")
        ranked = change.topk(min(top, len(places)), dim=-1, largest=False).indices
        tried = []
        for _ in range(swaps):
            place = int(torch.randint(length, (1,), generator=generator))
            pick = int(torch.randint(ranked.shape[1], (1,), generator=generator))
            tried.append([*suffix[:place], int(ranked[place, pick]), *suffix[place + 1 :]])
        losses = _loss(handle, rows, tried)
        lowest = min(range(len(tried)), key=losses.__getitem__)
        if losses[lowest] < best:
            best, suffix = losses[lowest], tried[lowest]
    # An attacker whose search came to nothing asks without a suffix.
    return suffix if best < _loss(handle, rows, [[]])[0] else []


def _loss(handle: ModelHandle, rows: Sequence[Row], suffixes: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss over the rows, per suffix."""
    found = []
    per_pass = max(1, 64 // len(rows))
    for begin in range(0, len(suffixes), per_pass):
        part = suffixes[begin : begin + per_pass]
        lines = _lines(handle, [row for _ in part for row in rows], [each for each in part for _ in rows])
        found += (-written_logprobs(handle, lines).view(len(part), len(rows)).mean(dim=1)).tolist()
    return found


def _slope(handle: ModelHandle, rows: Sequence[Row], suffix: Sequence[int]) -> Tensor:
    """Gradient of the mean loss with respect to the suffix's embeddings, ``[length, d]``."""
    lines = _lines(handle, rows, [suffix] * len(rows))
    size = len(suffix)
    numbers = torch.arange(len(rows), device=handle.device)[:, None]
    columns = lines.prompt_last[:, None] - size + 1 + torch.arange(size, device=handle.device)
    nudge = torch.zeros(size, handle.hidden_size, device=handle.device, requires_grad=True)

    def write(value: Tensor) -> Tensor:
        changed = value.clone()
        changed[numbers, columns] = changed[numbers, columns] + nudge.to(value.dtype)
        return changed

    loss = -written_logprobs(handle, lines, {Site(Role.EMBED): write}, grad=True).mean()
    (slope,) = torch.autograd.grad(loss, nudge)
    return slope.float()
