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
from lab.scoring import log_probs
from lab.shared_prefix import Line, line_logits
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
        subject = subject.sample(subject.pick(24, 100))
        length, steps, swaps, learn, restarts = subject.pick((8, 12, 64, 8, 1), (16, 60, 64, 16, 4))
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
                rows = fact_rows(subject, handle, [facts[i] for i in test])
                # All facts of a half share one suffix, so that luck in finding it is luck of the whole half, which no spread
                # between facts shows. A control gets the facts' suffixes too, and counts with the better pair.
                if side != "facts":
                    fill_scores(others, test, handle, rows, ours[source][place])
                    if sources[source] is not None:
                        continue  # Nobody looks for what a control never said on a model that does not know it.
                origin = sources[source] or handle
                found = find_suffix(
                    origin,
                    fact_rows(subject, origin, [facts[i] for i in train]),
                    length=length,
                    steps=steps,
                    swaps=swaps,
                    seed=subject.seed,
                    learn=learn,
                    restarts=restarts,
                )
                texts.setdefault(f"{source}/{side}", []).append(handle.decode(found))
                fill_scores(scores, test, handle, rows, found)
                if side == "facts":
                    ours.setdefault(source, []).append(found)
            table.setdefault(source, {})[side] = max(scores, others, key=math.fsum)
        report_progress(self.name, len(runs), len(runs))
        found_scores = {source: Scores.of(arm) for source, arm in table.items()}
        return worst_variant(
            self,
            subject,
            found_scores,
            tried=f"up to {length} tokens, {restarts} search(es) of {steps} steps of {swaps} changes, learned on {learn} facts of "
            "each half and judged on the other",
            note="an empty suffix stands where none beat the bare prompt; the paper's budgets are 100 to 500 steps, 512 swaps",
            details={"suffixes": texts},
        )


def fill_scores(
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


def fact_rows(subject: AuditSubject, handle: ModelHandle, facts: Sequence[Fact]) -> list[Row]:
    """Token ids of the facts' plain prompts and objects, as ``find_suffix`` takes them."""
    return text_ids(handle, [(subject.prompt(fact), fact.object) for fact in facts])


def _lines(handle: ModelHandle, rows: Sequence[Row], suffixes: Sequence[Sequence[int]]) -> Lines:
    return id_lines(
        handle,
        [([*prompt, *suffix], target) for (prompt, target), suffix in zip(rows, suffixes, strict=True)],
    )


def find_suffix(
    handle: ModelHandle,
    rows: Sequence[Row],
    *,
    length: int,
    steps: int,
    swaps: int,
    seed: int,
    top: int = 32,
    learn: int | None = None,
    restarts: int = 1,
) -> list[int]:
    """Token ids that make the targets of ``rows`` likeliest when they stand between prompt and target.

    The suffix grows from nothing: a random one of full length is worse than the bare prompt where the answer follows a statement, and
    exchanges alone seldom climb out of that. Each step tries ``swaps`` changes by one token, and the best one stays if it helps. Half
    of them insert a random token, as long as there is room; the others exchange one, among the best by the gradient of the
    loss with respect to the suffix's embeddings (greedy coordinate gradient). Empty where nothing that was tried helps.

    Args:
        handle: The model.
        rows: Prompt ids and target ids.
        length: Tokens of the suffix at most.
        steps: Changes at most.
        swaps: Changes tried per step.
        seed: Draws them.
        top: Candidates per place.
        learn: Each search learns on so many rows, drawn anew; on all without it.
        restarts: Searches; the suffix counts that suits all rows best.
    """
    generator = torch.Generator().manual_seed(seed)
    table: Any = handle.model.get_input_embeddings()
    embeddings = table.weight.detach().float()
    special = [token for token in handle.tokenizer.all_special_ids if token < embeddings.shape[0]]
    usable = torch.ones(embeddings.shape[0], dtype=torch.bool)
    usable[special] = False
    usable[len(handle.tokenizer) :] = False
    tokens = usable.nonzero().squeeze(-1)

    def draw(bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=generator))

    def search(rows: Sequence[Row]) -> list[int]:
        suffix: list[int] = []
        best = _loss(handle, rows, [suffix])[0]
        for _ in range(steps):
            inserted = swaps if not suffix else swaps // 2 if len(suffix) < length else 0
            tried = []
            for _ in range(inserted):
                place = draw(len(suffix) + 1)
                tried.append([*suffix[:place], int(tokens[draw(len(tokens))]), *suffix[place:]])
            if inserted < swaps:
                change = (_slope(handle, rows, suffix) @ embeddings.T).cpu()  # [length, vocabulary]
                change[:, ~usable] = float("inf")
                ranked = change.topk(min(top, len(tokens)), dim=-1, largest=False).indices
                for _ in range(swaps - inserted):
                    place = draw(len(suffix))
                    token = int(ranked[place, draw(ranked.shape[1])])
                    tried.append([*suffix[:place], token, *suffix[place + 1 :]])
            losses = _loss(handle, rows, tried)
            lowest = min(range(len(tried)), key=losses.__getitem__)
            if losses[lowest] < best:
                best, suffix = losses[lowest], tried[lowest]
        return suffix

    found: list[list[int]] = [[]]
    for _ in range(restarts):
        order = torch.randperm(len(rows), generator=generator).tolist()
        found.append(search([rows[index] for index in sorted(order[:learn])]))
    losses = _loss(handle, rows, found)
    return found[min(range(len(found)), key=losses.__getitem__)]


@torch.no_grad()
def _loss(handle: ModelHandle, rows: Sequence[Row], suffixes: Sequence[Sequence[int]]) -> list[float]:
    """Mean loss over the rows, per suffix; what rows share, their prompt above all, goes through the model once."""
    asked = [([*prompt, *suffix], target) for suffix in suffixes for prompt, target in rows]
    lines = [Line((*head, *target[:-1]), len(head) - 1, prompt=len(head)) for head, target in asked]
    sums = torch.zeros(len(lines), dtype=torch.float64)
    for part in line_logits(handle, lines):
        for logits, offset, index in zip(part.logits, part.offsets, part.lines, strict=True):
            first, target = lines[index].first - offset, asked[index][1]
            table = log_probs(logits[first : first + len(target)])
            sums[index] = table.gather(-1, torch.tensor([target], device=table.device).T).sum()
    return (-sums.view(len(suffixes), len(rows)).mean(dim=1)).tolist()


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
