"""The loop of methods that train: terms of every update, the optimiser, the rules that end it, and what is kept to go on later."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from editors.unlearning import losses, state_losses
from editors.unlearning.checkpoint import Checkpoint, copied
from editors.unlearning.embedding_rows import EmbeddingRows, embedding_rows
from editors.unlearning.guarded import GuardedAdam, Optimiser, damping
from editors.unlearning.passes import Passes
from editors.unlearning.procedure import Answers, Procedure, Step
from editors.unlearning.settings import GradientConfig
from editors.unlearning.sides import Kind, Side, make_side
from editors.unlearning.subjects import Subjects
from editors.values import Progress
from lab.arch import Role
from lab.errors import NumericalError
from lab.handle import ModelHandle
from lab.records import Fact
from lab.scoring import score_targets
from lab.trace import Site
from lab.training import Reference

RetainTerm = Literal["nll", "kl", "pull"]


@dataclass(frozen=True)
class Objective:
    """A method that trains, as its terms.

    Attributes:
        forget: The forget loss of one batch; reads the kinds of answers named in ``reads``. ``None`` where the procedure
            computes it itself.
        reads: Answers that the forget loss needs.
        retain: The retain term, or ``None``.
        needs_retain: Whether the method is nothing without retained facts.
        reference: Whether the forget loss reads log-probabilities of the untouched model.
        table: Whether it reads whole distributions of the untouched model.
        teacher: A kind of which only the untouched model's distributions are read.
        procedure: How an update's terms come about.
        trains: What is trained where ``weights`` is ``full``, if not everything: parameter names.
    """

    forget: Callable[[Mapping[Kind, Answers], GradientConfig], Tensor] | None = None
    reads: tuple[Kind, ...] = ("answer",)
    retain: RetainTerm | None = "nll"
    needs_retain: bool = False
    reference: bool = False
    table: bool = False
    teacher: Kind | None = None
    procedure: Callable[[], Procedure] = Procedure
    trains: Callable[[ModelHandle, GradientConfig], Sequence[str]] | None = None


@dataclass
class UnlearningTrainer(Passes):
    """Trains whatever of a model asks for gradients; ``notes`` says how it went.

    Attributes:
        handle: The model; ``fit`` decides what of it trains.
        objective: What is minimised.
        config: Settings.
        forget, retain: The facts; no retained ones, no retain term.
        seed: Of the order and of what is drawn.
        progress: Told about every update.
        others: Facts whose answers may stand for those of facts to forget.
        checkpoint: Keeps the state after every pass, and is gone on from.
        moments: For ``guard`` without retained facts, second moments of keys by the name of the down projection.
        notes: Every update's terms, and why training ended early, if it did.
        adam: The optimiser, from the first pass on.
    """

    handle: ModelHandle
    objective: Objective
    config: GradientConfig
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    seed: int
    progress: Progress | None = None
    others: Sequence[Fact] = ()
    checkpoint: Checkpoint | None = None
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    adam: Optimiser | None = None

    def __post_init__(self) -> None:
        config, objective = self.config, self.objective
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(config.refusals), (len(self.forget),), generator=generator).tolist()
        self.refusals = [config.refusals[index] for index in drawn]
        kinds: set[Kind] = {*objective.reads, *((objective.teacher,) if objective.teacher else ())}
        self.sides: dict[Kind, Side] = {
            kind: make_side(kind, self.handle, self.forget, self.others, self.refusals, config, self.seed)
            for kind in sorted(kinds)
        }
        self.retained = Side([(config.form.replace("{}", fact.text), fact.object) for fact in self.retain])
        self.procedure = objective.procedure()
        self._plan = self._planned(generator)
        self.subjects = Subjects(self.handle.tokenizer)

    def _planned(self, generator: torch.Generator) -> list[tuple[int, list[int], list[int]]]:
        """Of every update the pass, the facts to forget, and the retained ones beside them."""
        config, waiting = self.config, torch.empty(0, dtype=torch.long)
        plan: list[tuple[int, list[int], list[int]]] = []
        for epoch in range(config.epochs):
            order = torch.randperm(len(self.forget), generator=generator)
            for picked in order.split(config.batch_size):
                wanted = (config.retain_batch or len(picked)) if self.retain else 0
                while len(waiting) < wanted:
                    waiting = torch.cat([waiting, torch.randperm(len(self.retain), generator=generator)])
                beside, waiting = waiting[:wanted], waiting[wanted:]
                plan += [(epoch, picked.tolist(), beside.tolist())] * self.procedure.repeats
        return plan[: config.max_steps]

    def on(self, model: Any, reference: Reference) -> UnlearningTrainer:
        """As ``fit`` wants it; asks the untouched model everything that the losses will read."""
        objective = self.objective
        everything = range(len(self.forget))
        with reference():
            if objective.reference or objective.table:
                for kind in objective.reads:
                    self.remember(self.sides[kind], everything, table=objective.table)
            if objective.teacher:
                self.remember(self.sides[objective.teacher], everything, table=True)
            drawn = sorted({index for _, _, beside in self._plan for index in beside})
            self.remember(self.retained, drawn, table=objective.retain in ("kl", "pull"))
            self.procedure.prepare(self)
            if self.config.guard is not None:
                self._factors = {
                    name: damping(moment, self.config.guard) for name, moment in self._moments(drawn).items()
                }
        return self

    def _moments(self, drawn: Sequence[int]) -> Mapping[str, Tensor]:
        """Second moments of what the trained down projections read in retained facts, by name; else those that were given."""
        if not drawn:
            return self.moments
        sites = {
            self.handle.weight(Role.MLP_OUT, layer).name: Site(Role.MLP_OUT, layer, "in")
            for layer in self.config.layers
        }
        sums: dict[str, Tensor] = {}
        size = 4 * self.config.batch_size
        for start in range(0, len(drawn), size):
            found = self.retained_answers(drawn[start : start + size], grad=False, reads=list(sites.values()))
            for name, site in sites.items():
                keys = found.states[site][found.real].double()
                sums[name] = sums.get(name, 0) + keys.T @ keys
        return sums

    def restart(self) -> None:
        """A fresh optimiser, without memory of earlier updates."""
        config, parameters = self.config, self._trained()
        if config.guard is None:
            # Fused: one pass over the weights where the plain way makes ten.
            self.adam = torch.optim.AdamW(
                parameters.values(), lr=config.lr, weight_decay=config.weight_decay, fused=True
            )
            return
        weights = [self.handle.named_weight(name) for name in parameters]
        self.adam = GuardedAdam(
            [weight.parameter for weight in weights],
            [self._factors[weight.name] for weight in weights],
            [weight.transposed for weight in weights],
            config.lr,
        )

    def train(self) -> None:
        """Runs all updates, or fewer where the model breaks down or nothing is left to forget.

        Raises:
            NumericalError: A term became NaN or infinite.
        """
        with torch.enable_grad(), embedding_rows(self.handle.model) as rows:
            self._train(rows)

    def _train(self, rows: EmbeddingRows | None) -> None:
        self.restart()
        history: list[dict[str, float]] = []
        chances: list[float] = []
        stopped: str | None = None
        start = self._go_on(history, chances)
        last = -1
        for number, (epoch, drawn, beside) in enumerate(self._plan):
            if number < start:
                continue
            if epoch != last:
                if number > start:
                    self._keep(number, history, chances)
                if self._forgotten(chances):
                    stopped = "known"
                    break
                self.procedure.begin_epoch(self, epoch)
                last, chances = epoch, []
            picked, kept = self.procedure.choose(self, drawn, beside)
            picked = self._unfinished(picked)
            if picked:
                step = self.procedure.step(self, picked, kept)
                history.append(_figures(step, len(history)))
                stopped = self._collapse(step)
                chances += _chances(step.answer)
            if self.progress is not None:
                self.progress("steps", len(self._plan) if stopped else number + 1, len(self._plan))
            if stopped:
                break
            if not picked:
                continue
            loss = torch.stack([step.weights[name] * term for name, term in step.terms.items()]).sum()
            # Logits of a large vocabulary, which nobody reads from here on.
            del step
            assert self.adam is not None
            self.adam.zero_grad()
            loss.backward()
            if rows is not None:
                rows.add()
            self.procedure.before_update(self)
            if self.config.decay:
                for group in self.adam.param_groups:
                    group["lr"] = self.config.lr * (1 - number / len(self._plan))
            self.adam.step()
            # As large as the model; the next forward pass has no use for them.
            self.adam.zero_grad()
        # Its memory is as large as two models; the patch is made behind it.
        self.adam = None
        self.notes = {
            # What ends training in the middle of a pass is seen before an update that then is not made.
            "updates": len(history) - (stopped in ("forget", "retain")),
            "history": history,
            "stopped": stopped,
            "retained_facts": len(self.retained.reference),
            **self.procedure.notes(),
        }

    def retain_term(self, retained: Answers) -> Tensor:
        """The objective's retain term on some retained facts."""
        if self.objective.retain == "kl":
            return losses.retain_kl(retained.logits, retained.labels, retained.table)
        if self.objective.retain == "pull":
            return state_losses.bidirectional(
                retained.logits, retained.labels, retained.table, retained.table, top=self.config.top
            )
        return losses.answer_nll(retained.logits, retained.labels)

    def _trained(self) -> dict[str, Tensor]:
        return {name: each for name, each in self.handle.model.named_parameters() if each.requires_grad}

    def _keep(self, done: int, history: Sequence[dict[str, float]], chances: Sequence[float]) -> None:
        """Writes the checkpoint of a whole pass."""
        if self.checkpoint is None:
            return
        assert self.adam is not None
        self.checkpoint.write(
            {
                "done": done,
                "history": list(history),
                "chances": list(chances),
                "weights": copied(self._trained()),
                "adam": self.adam.state_dict(),
                "procedure": self.procedure.state(),
            }
        )

    @torch.no_grad()
    def _go_on(self, history: list[dict[str, float]], chances: list[float]) -> int:
        """Takes up the checkpoint, if there is one; returns how many updates of the plan lie behind it."""
        found = None if self.checkpoint is None else self.checkpoint.read()
        if found is None:
            return 0
        for name, parameter in self._trained().items():
            parameter.copy_(found["weights"][name])
        assert self.adam is not None
        self.adam.load_state_dict(found["adam"])
        self.procedure.restore(found["procedure"])
        history += found["history"]
        chances += found["chances"]
        return found["done"]

    def _unfinished(self, picked: Sequence[int]) -> Sequence[int]:
        """Those facts that are still likelier than ``done_below``."""
        limit = self.config.done_below
        if limit is None or self.procedure.repeats > 1 or not picked:
            return picked
        pairs = [(self.forget[index].text, self.forget[index].object) for index in picked]
        scores = score_targets(self.handle, pairs)
        return [index for index, score in zip(picked, scores, strict=True) if score.probability >= limit]

    def _forgotten(self, chances: Sequence[float]) -> bool:
        limit = self.config.stop_known
        return limit is not None and bool(chances) and math.fsum(chances) / len(chances) < limit

    @torch.no_grad()
    def _collapse(self, step: Step) -> str | None:
        """Why training should end here: ``"forget"``, ``"retain"``, or nothing."""
        config, answer, retained = self.config, step.answer, step.retained
        if config.stop_above is not None and answer is not None:
            limit = config.stop_above * math.log(answer.logits.shape[-1])
            if float(losses.answer_nll(answer.logits, answer.labels)) > limit:
                return "forget"
        if config.stop_retain is not None and retained is not None:
            counted = retained.labels != losses.IGNORED
            lost = retained.reference - losses.token_logprobs(retained.logits, retained.labels)
            if float(lost[counted].mean()) > config.stop_retain:
                return "retain"
        return None


@torch.no_grad()
def _chances(answer: Answers | None) -> list[float]:
    """Of every answer in a batch its length-normalised probability."""
    if answer is None:
        return []
    counted = answer.labels != losses.IGNORED
    return (losses.token_logprobs(answer.logits, answer.labels).sum(1) / counted.sum(1)).exp().tolist()


def _figures(step: Step, number: int) -> dict[str, float]:
    figures = {name: float(term.detach()) for name, term in step.terms.items()}
    if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
        raise NumericalError(f"the {bad[0]} term became {figures[bad[0]]} at step {number}; try a smaller lr")
    return figures
