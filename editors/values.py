"""``optimise_value``: the one inner loop of all locate-then-edit methods.

For each request it looks for a shift δ of one module's output at one token that makes the model continue with the new
target (ROME, section 3.1, equation 4): the target's negative log-likelihood over several contexts, plus a divergence that
keeps the subject what it is, plus weight decay, plus any penalties. Many requests are optimised together; the result of
each is the same as alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from editors.easing import Easing, targets_reached
from editors.prefixes import Prefixes
from editors.rows import FactToken, essence_row, request_rows
from editors.value_batches import Problem, batches_of, parts_of, rows_of
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.likelihood import target_nll
from lab.records import EditRequest
from lab.replay import Replay
from lab.trace import Site

Progress = Callable[[str, int, int], None]
"""Called with a phase, how much of it is done, and how much there is."""


@dataclass(frozen=True)
class ValueConfig:
    """Parameters of the search.

    Attributes:
        steps: Forward passes; one fewer updates.
        lr: Learning rate of Adam.
        weight_decay: Weight of ``|δ| / |h0|²``.
        clamp: δ is kept within ``clamp * |h0|``.
        kl_factor: Weight of the divergence on the essence prompt; 0 leaves it out.
        stop_below: A request whose loss falls below this is finished.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    clamp: float = 4.0
    kl_factor: float = 0.0625
    stop_below: float = 0.05

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, not {self.steps}")
        for name in ("lr", "clamp"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("weight_decay", "kl_factor"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} must not be negative, it is {getattr(self, name)}")


@dataclass(frozen=True)
class AttentionStep:
    """What a penalty sees of one step: attention rows of the rewriting rows' last prompt token, above the tapped layer.

    Attributes:
        current: Layer to ``[row, head, key]``, with gradient.
        original: The same of the unedited model (δ = 0), without.
        subject: Key column of the edited token, the same in every row.
        owner: ``[row]``, index of each row's edit in ``0 .. edits - 1``.
        edits: Number of edits still running.
    """

    current: Mapping[int, Tensor]
    original: Mapping[int, Tensor]
    subject: int
    owner: Tensor
    edits: int

    def mean_over_rows(self, values: Tensor) -> Tensor:
        """Mean of ``values[row]`` over each edit's rows, ``[edit]``."""
        total = values.new_zeros(self.edits).index_add(0, self.owner, values)
        return total / torch.bincount(self.owner, minlength=self.edits).to(values.dtype)


class Penalty(Protocol):
    """A term of the loss that any optimising editor can carry; it keeps no state."""

    def __call__(self, step: AttentionStep) -> Tensor:
        """Returns the penalty of each edit, ``[edit]``."""
        ...


@dataclass(frozen=True)
class StepLoss:
    """The loss of one request at one step, and its parts; the total weighs ``nll`` where the search is eased."""

    total: float
    nll: float
    kl: float
    decay: float
    penalty: float


@dataclass(frozen=True)
class ValueResult:
    """What the search found for one request.

    Attributes:
        delta: δ, ``[d]``.
        init: h0, the tap's unedited output on the plain prompt, ``[d]``.
        losses: One entry per forward pass.
        beside: δ of the further taps, ``[d]`` each; they only helped the search.
    """

    delta: Tensor
    init: Tensor
    losses: tuple[StepLoss, ...]
    beside: tuple[Tensor, ...] = ()

    @property
    def target(self) -> Tensor:
        """z = h0 + δ, ``[d]``."""
        return self.init + self.delta

    @property
    def p_target(self) -> float:
        """exp of the mean log-probability of a target token over the contexts, at the last pass."""
        return math.exp(-self.losses[-1].nll)


def optimise_value(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    layer: int,
    role: Role | Sequence[Role],
    prefixes: Prefixes,
    config: ValueConfig,
    penalties: Sequence[Penalty] = (),
    *,
    easing: Easing | None = None,
    fact_token: FactToken = "subject_last",
    max_rows: int = 256,
    progress: Progress | None = None,
) -> list[ValueResult]:
    """Searches δ for each request, many at a time.

    Args:
        handle: The model; left as it was.
        requests: What to say instead.
        layer: Block of the tap.
        role: ``Role.MLP`` (ROME) or ``Role.BLOCK`` (MEMIT); of several (PMET), each with its own δ, decay and clamp, the first counts.
        prefixes: Context templates, the plain ``"{}"`` first.
        config: Parameters of the search.
        penalties: Further terms of the loss.
        easing: PMET's rule for targets that are already said.
        fact_token: Where δ acts: the subject's last token, or the prompt's.
        max_rows: Rows whose keys and values are kept at a time; bounds memory, does not change the result.
        progress: Told how many requests are finished.

    Returns:
        One result per request, in their order.

    Raises:
        NumericalError: A loss is not finite; names the request.
        RequestError: A request cannot be turned into rows.
    """
    roles = (role,) if isinstance(role, Role) else tuple(role)
    problems = []
    for request in requests:
        rows = request_rows(handle, request, prefixes.flat, fact_token)
        essence = [essence_row(handle, request, fact_token)] if config.kl_factor else []
        problems.append(Problem(request, (*rows, *essence), len(rows)))
    found: dict[int, ValueResult] = {}
    with handle.writing(), frozen(handle.model):
        for batch in batches_of(problems, max_rows):
            chosen = [problems[index] for index in batch]
            replay = _replay(handle, chosen, layer, roles, attention=bool(penalties))
            for part in parts_of(chosen, handle.device):
                rows = [row for index in part for row in rows_of(chosen, index)]
                mine = [chosen[index] for index in part]
                search = _Search(handle, mine, replay.keep(rows, trim=True), config, penalties, easing)
                found.update(zip((batch[index] for index in part), search.run(), strict=True))
                if progress is not None:
                    progress("values", len(found), len(problems))
    return [found[index] for index in range(len(problems))]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients reach no parameter for the length of a ``with``."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@dataclass(frozen=True)
class _View:
    """The edits that still run: their share of the replay, and what each of its rows and lines is for.

    Attributes:
        replay: Restricted to these edits' rows.
        edits: ``[running]``, their indices in the whole batch.
        owner: ``[row]``, index in the whole batch.
        rewriting: Rows that carry a target.
        rewriting_owner: For each of them, the index among the running edits.
        line_owner: ``[line]`` of logits, index among the running edits.
        line_target, line_weight: ``[line]``; essence lines weigh nothing.
        essence: ``[running]`` lines of the essence rows, or empty.
    """

    replay: Replay
    edits: Tensor
    owner: Tensor
    rewriting: Tensor
    rewriting_owner: Tensor
    line_owner: Tensor
    line_target: Tensor
    line_weight: Tensor
    essence: Tensor


def _replay(
    handle: ModelHandle, problems: Sequence[Problem], layer: int, roles: Sequence[Role], *, attention: bool
) -> Replay:
    rows = [row for problem in problems for row in problem.rows]
    return Replay(
        handle,
        [row.ids for row in rows],
        [row.change for row in rows],
        [Site(role, layer) for role in roles],
        [row.wanted for row in rows],
        [row.prompt_last for row in rows] if attention else None,
    )


class _Search:
    """The loop over some problems."""

    def __init__(
        self,
        handle: ModelHandle,
        problems: Sequence[Problem],
        replay: Replay,
        config: ValueConfig,
        penalties: Sequence[Penalty],
        easing: Easing | None,
    ) -> None:
        self.handle, self.problems, self.config = handle, problems, config
        self.replay, self.penalties, self.easing = replay, penalties, easing
        self.dtype = torch.promote_types(handle.dtype, torch.float32)
        self.base_attention: Mapping[int, Tensor] = {}
        self.base_essence = torch.empty(0)
        # Only where the search is eased, and there new at every step.
        self.reached = torch.zeros(len(problems), dtype=torch.bool, device=handle.device)
        self.nll_weight = torch.empty(0) if easing is None else easing.weights(self.reached, self.dtype)

    def run(self) -> list[ValueResult]:
        config, count = self.config, len(self.problems)
        first = [rows_of(self.problems, index)[0] for index in range(count)]
        init = self.replay.bases[first].to(self.dtype)
        norms = torch.linalg.vector_norm(init, dim=2)
        delta = torch.zeros_like(init, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=config.lr)
        traces: list[list[StepLoss]] = [[] for _ in range(count)]
        view = self._view(range(count))
        for step in range(config.steps):
            with torch.enable_grad():
                parts = self._loss(view, delta, norms)
                total = self._total(view, parts)
            running = view.edits.tolist()
            self._record(traces, running, parts.detach(), total.detach(), step)
            if step == config.steps - 1:
                break
            going = view.edits[~self._finished(view, parts.detach(), total.detach())].tolist()
            if not going:
                break
            (gradient,) = torch.autograd.grad(total.sum(), delta)
            # Adam's momentum would move finished edits too, so only the running ones take its step.
            before = delta.detach().clone()
            delta.grad = gradient
            adam.step()
            with torch.no_grad():
                moved = torch.zeros(count, 1, 1, dtype=torch.bool, device=delta.device)
                moved[going] = True
                delta.copy_(torch.where(moved, delta, before))
                length = torch.linalg.vector_norm(delta, dim=2)
                limit = config.clamp * norms
                scale = torch.where(
                    length > limit, limit / length.clamp_min(torch.finfo(length.dtype).tiny), 1.0
                )
                delta.mul_(torch.where(moved[..., 0], scale, torch.ones_like(scale))[..., None])
            if len(going) < len(running):
                view = self._view(going)
        found = delta.detach()
        return [
            ValueResult(found[index, 0], init[index, 0], tuple(traces[index]), tuple(found[index, 1:]))
            for index in range(count)
        ]

    def _view(self, edits: Sequence[int]) -> _View:
        device = self.handle.device
        chosen = [row for edit in edits for row in rows_of(self.problems, edit)]
        whole = len(edits) == len(self.problems)
        owner, rewriting, rewriting_owner, lines, essence = [], [], [], [], []
        for local, edit in enumerate(edits):
            problem = self.problems[edit]
            for row in problem.rows:
                if row.targets:
                    rewriting.append(len(owner))
                    rewriting_owner.append(local)
                    weight = 1 / (problem.contexts * len(row.targets))
                    lines.extend((local, target, weight) for target in row.targets)
                else:
                    essence.append(len(lines))
                    lines.append((local, 0, 0.0))
                owner.append(edit)

        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.long, device=device)

        return _View(
            replay=self.replay if whole else self.replay.keep(chosen),
            edits=integers(edits),
            owner=integers(owner),
            rewriting=integers(rewriting),
            rewriting_owner=integers(rewriting_owner),
            line_owner=integers([line[0] for line in lines]),
            line_target=integers([line[1] for line in lines]),
            line_weight=torch.tensor([line[2] for line in lines], dtype=self.dtype, device=device),
            essence=integers(essence),
        )

    def _loss(self, view: _View, delta: Tensor, norms: Tensor) -> Tensor:
        """NLL, KL, weight decay and penalties of each running edit, ``[4, running]``."""
        result = view.replay.run(delta, view.owner)
        logits = result.logits.to(self.dtype)
        running = len(view.edits)
        lines, current = target_nll(logits, view.line_target, view.essence)
        nll = lines.new_zeros(running).index_add(0, view.line_owner, lines * view.line_weight)
        kl = torch.zeros_like(nll)
        if len(view.essence):
            if not len(self.base_essence):
                self.base_essence = current.detach()
            original = self.base_essence[view.edits]
            kl = self.config.kl_factor * (current.exp() * (current - original)).sum(dim=1)
        length = torch.linalg.vector_norm(delta[view.edits], dim=2)
        decay = (self.config.weight_decay * length / norms[view.edits] ** 2).sum(dim=1)
        penalty = torch.zeros_like(nll)
        if self.penalties:
            step = self._attention_step(view, result.attention)
            for term in self.penalties:
                penalty = penalty + term(step).to(penalty.dtype)
        if self.easing is not None:
            lines = (logits.detach(), view.line_target, view.line_weight > 0, view.line_owner)
            self.reached[view.edits] = targets_reached(*lines, running)
        return torch.stack([nll, kl, decay, penalty])

    def _total(self, view: _View, parts: Tensor) -> Tensor:
        """The loss of each running edit, ``[running]``."""
        if self.easing is None:
            return parts.sum(dim=0)
        return self.nll_weight[view.edits] * parts[0] + parts[1:].sum(dim=0)

    def _finished(self, view: _View, parts: Tensor, total: Tensor) -> Tensor:
        """Which of the running edits are done, ``[running]``; weighs the likelihood of the others for the next step."""
        finished = total.double() < self.config.stop_below
        if self.easing is not None:
            reached = self.reached[view.edits]
            self.nll_weight[view.edits] = self.easing.weights(reached, self.dtype)
            finished = finished | self.easing.stops(reached, parts[1])
        return finished

    def _attention_step(self, view: _View, attention: Mapping[int, Tensor]) -> AttentionStep:
        current = {layer: rows[view.rewriting] for layer, rows in attention.items()}
        if not self.base_attention:
            # The first pass runs with δ = 0 and every edit, so its rows are the unedited model's.
            self.base_attention = {layer: rows.detach() for layer, rows in current.items()}
        going = torch.zeros(len(self.problems), dtype=torch.bool, device=view.edits.device)
        going[view.edits] = True
        kept = going[torch.tensor(
            [edit for edit, problem in enumerate(self.problems) for _ in range(problem.contexts)], device=going.device
        )]  # fmt: skip
        original = {layer: rows[kept] for layer, rows in self.base_attention.items()}
        return AttentionStep(current, original, view.replay.column, view.rewriting_owner, len(view.edits))

    def _record(
        self, traces: list[list[StepLoss]], running: Sequence[int], parts: Tensor, total: Tensor, step: int
    ) -> None:
        for local, edit in enumerate(running):
            values = [float(part) for part in parts[:, local]]
            loss = float(total[local])
            if not math.isfinite(loss):
                request = self.problems[edit].request
                raise NumericalError(
                    f"request {request.id!r}: the loss of the value search became {loss} at step {step}; "
                    "try a smaller lr or a smaller clamp, or load the model in float32"
                )
            traces[edit].append(StepLoss(loss, *values))
