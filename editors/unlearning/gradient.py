"""``GradientUnlearner``: minimises a forget loss, with or without a retain term, and gives back what changed as a patch.

One class serves every method of the kind; a method is an ``Objective`` and its settings (``methods.py``). Losses fall on answer
tokens only. What the untouched model says is computed once, before the first update, on that very model: there is no second one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from editors.base import check_layers
from editors.lora import adapter
from editors.tuning import TargetLines, plain_settings, target_lines
from editors.unlearning import losses
from editors.unlearning.settings import GradientConfig
from editors.values import Progress
from lab.arch import Role
from lab.errors import ConfigError, NumericalError, RequestError
from lab.handle import ModelHandle
from lab.patch import Provenance, WeightPatch, library_versions
from lab.records import Fact
from lab.training import Reference, fit

Kind = Literal["answer", "refusal"]
RetainTerm = Literal["nll", "kl"]


@dataclass(frozen=True)
class Answers:
    """One batch of answers of one kind, in the form that ``losses`` reads.

    Attributes:
        logits: ``[batch, pos, vocabulary]`` of the model in training.
        labels: ``[batch, pos]``, -100 outside answers.
        reference: ``[batch, pos]`` log-probabilities of the labels under the untouched model, 0 outside answers.
        table: ``[answer token, vocabulary]`` log-probabilities of the untouched model; without rows where no term reads it.
    """

    logits: Tensor
    labels: Tensor
    reference: Tensor
    table: Tensor


@dataclass(frozen=True)
class Objective:
    """A gradient method as its terms.

    Attributes:
        forget: The forget loss of one batch; reads the kinds of answers named in ``reads``.
        reads: Answers that the forget loss needs.
        retain: The retain term, or ``None``.
        needs_retain: Whether the method is nothing without retained facts.
        table: Whether the forget loss reads whole distributions of the untouched model.
    """

    forget: Callable[[Mapping[Kind, Answers], GradientConfig], Tensor]
    reads: tuple[Kind, ...] = ("answer",)
    retain: RetainTerm | None = "nll"
    needs_retain: bool = False
    table: bool = False


@dataclass(frozen=True)
class GradientUnlearner:
    """A method that trains; make one with ``get_unlearner``.

    Attributes:
        name: The method.
        objective: Its terms.
        config: Its settings.
        settings: Names of the settings that it takes, for the provenance.
        seed: Seeds everything that is drawn.
    """

    name: str
    objective: Objective
    config: GradientConfig
    settings: frozenset[str]
    seed: int = 0

    def unlearn(
        self,
        handle: ModelHandle,
        forget: Sequence[Fact],
        retain: Sequence[Fact] = (),
        *,
        progress: Progress | None = None,
    ) -> WeightPatch:
        """One patch for all facts together. See ``Unlearner.unlearn``."""
        config, objective = self.config, self.objective
        _check_facts(self.name, forget, retain, objective)
        if config.layers:
            check_layers(handle, config.layers)
        trainer = UnlearningTrainer(
            handle,
            objective,
            config,
            forget=forget,
            retain=retain if objective.retain is not None and config.retain_weight > 0 else (),
            seed=self.seed,
            progress=progress,
        )
        if config.weights == "lora":
            lora = adapter(handle, config.modules, config.layers, config.rank, config.alpha, 0.0)
            patch = fit(handle, trainer.on, lora=lora, seed=self.seed)
        else:
            patch = fit(handle, trainer.on, weights=_trained(handle, config.layers), seed=self.seed)
        plain = {name: value for name, value in plain_settings(config).items() if name in self.settings}
        requests = tuple(fact.to_json() for fact in forget)
        made = Provenance(self.name, plain, requests, self.seed, library_versions(), trainer.notes)
        return replace(patch, provenance=made)


def _check_facts(name: str, forget: Sequence[Fact], retain: Sequence[Fact], objective: Objective) -> None:
    if not forget:
        raise RequestError("no facts to forget were given")
    if objective.needs_retain and not retain:
        raise RequestError(f"{name!r} holds retained facts in place; give some")
    wanted = {(fact.text, fact.object) for fact in forget}
    for fact in retain:
        if (fact.text, fact.object) in wanted:
            raise RequestError(f"the fact {fact.text!r} is both to be forgotten and to be retained")


def _trained(handle: ModelHandle, layers: Sequence[int]) -> list[str]:
    """Names of all floating-point parameters, or of those in some blocks; a tied one comes once."""
    if handle.quantized:
        raise ConfigError(
            f"{handle.name!r} is quantised, so that most of its weights cannot be trained; load it without quantisation"
        )
    blocks = [handle.module(Role.BLOCK, layer) for layer in layers]
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    names = []
    for name, parameter in handle.model.named_parameters():
        if parameter.is_floating_point() and (not layers or id(parameter) in inside):
            if parameter.element_size() < 4:
                raise ConfigError(
                    f"{name!r} is {parameter.dtype}, which rounds small updates away; load the model in float32 "
                    'or set weights="lora"'
                )
            names.append(name)
    return names


@dataclass
class _Side:
    """Prompts with one kind of answer, and what the untouched model says about those that were asked for.

    Attributes:
        pairs: Prompt and answer of each fact.
        reference: Of a fact, log-probabilities of its answer's tokens, ``[token]`` on the CPU.
        table: Of a fact, the distributions there, ``[token, vocabulary]`` on the CPU.
    """

    pairs: Sequence[tuple[str, str]]
    reference: dict[int, Tensor] = field(default_factory=dict)
    table: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class UnlearningTrainer:
    """Trains whatever of a model asks for gradients; ``notes`` says how it went.

    Attributes:
        handle: The model; ``fit`` decides what of it trains.
        objective: What is minimised.
        config: Settings.
        forget, retain: The facts; no retained ones, no retain term.
        seed: Of the order and of what is drawn.
        progress: Told about every update.
        notes: Every update's terms, and why training ended early, if it did.
    """

    handle: ModelHandle
    objective: Objective
    config: GradientConfig
    forget: Sequence[Fact]
    retain: Sequence[Fact]
    seed: int
    progress: Progress | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randint(len(self.config.refusals), (len(self.forget),), generator=generator).tolist()
        self._sides: dict[Kind, _Side] = {
            "answer": _Side([(fact.text, fact.object) for fact in self.forget]),
            "refusal": _Side(
                [(fact.text, self.config.refusals[i]) for fact, i in zip(self.forget, drawn, strict=True)]
            ),
        }
        self._retained = _Side([(fact.text, fact.object) for fact in self.retain])
        self._plan: list[tuple[list[int], list[int]]] = []
        for _ in range(self.config.epochs):
            order = torch.randperm(len(self.forget), generator=generator)
            for picked in order.split(self.config.batch_size):
                beside = (
                    torch.randint(len(self.retain), picked.shape, generator=generator).tolist()
                    if self.retain
                    else []
                )
                self._plan.append((picked.tolist(), beside))
        self._plan = self._plan[: self.config.max_steps]

    def on(self, model: Any, reference: Reference) -> UnlearningTrainer:
        """As ``fit`` wants it; asks the untouched model everything that the losses will read."""
        objective = self.objective
        with reference():
            for kind in objective.reads:
                self._remember(self._sides[kind], range(len(self.forget)), objective.table)
            drawn = sorted({index for _, beside in self._plan for index in beside})
            self._remember(self._retained, drawn, objective.retain == "kl")
        return self

    def _remember(self, side: _Side, wanted: Sequence[int], table: bool) -> None:
        size = self.config.batch_size
        for start in range(0, len(wanted), size):
            picked = wanted[start : start + size]
            lines, logits = self._run(side, picked, grad=False)
            found = lines.of(logits)
            chosen = found.gather(1, lines.label[:, None])[:, 0]
            lengths = torch.bincount(lines.row, minlength=lines.rows).tolist()
            side.reference |= zip(picked, chosen.cpu().split(lengths), strict=True)
            if table:
                side.table |= zip(picked, found.cpu().split(lengths), strict=True)
            if self.progress is not None:
                self.progress("reference", start + len(picked), len(wanted))

    def _run(self, side: _Side, picked: Sequence[int], *, grad: bool) -> tuple[TargetLines, Tensor]:
        lines = target_lines(self.handle, [side.pairs[index] for index in picked])
        return lines, self.handle.logits(lines.batch, grad=grad, logits_to_keep=lines.keep)

    def _answers(self, side: _Side, picked: Sequence[int]) -> Answers:
        lines, logits = self._run(side, picked, grad=True)
        labels = torch.full(logits.shape[:2], losses.IGNORED, device=logits.device)
        labels[lines.row, lines.column] = lines.label
        known = torch.cat([side.reference[index] for index in picked]).to(logits.device)
        reference = torch.zeros(labels.shape, dtype=known.dtype, device=logits.device)
        reference[lines.row, lines.column] = known
        tables = [side.table[index] for index in picked if index in side.table]
        table = torch.cat(tables).to(logits.device) if tables else known.new_zeros(0, logits.shape[-1])
        return Answers(logits, labels, reference, table)

    @torch.enable_grad()
    def train(self) -> None:
        """Runs all updates, or fewer where the model breaks down.

        Raises:
            NumericalError: A term became NaN or infinite.
        """
        config, model = self.config, self.handle.model
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        adam = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        history: list[dict[str, float]] = []
        stopped: str | None = None
        for step, (picked, beside) in enumerate(self._plan):
            batch: dict[Kind, Answers] = {
                kind: self._answers(self._sides[kind], picked) for kind in self.objective.reads
            }
            retained = self._answers(self._retained, beside) if beside else None
            terms = {"forget": self.objective.forget(batch, config)}
            if retained is not None:
                terms["retain"] = self._retain_term(retained)
            figures = {name: float(term.detach()) for name, term in terms.items()}
            if bad := [name for name, value in figures.items() if not math.isfinite(value)]:
                raise NumericalError(
                    f"the {bad[0]} term became {figures[bad[0]]} at step {step}; try a smaller lr"
                )
            history.append(figures)
            stopped = self._collapse(batch, retained)
            if self.progress is not None:
                self.progress("steps", len(self._plan) if stopped else step + 1, len(self._plan))
            if stopped:
                break
            loss = losses.combined(
                terms["forget"],
                terms.get("retain"),
                forget_weight=config.forget_weight,
                retain_weight=config.retain_weight,
            )
            adam.zero_grad()
            loss.backward()
            adam.step()
        self.notes = {
            "updates": len(history) - bool(stopped),
            "history": history,
            "stopped": stopped,
            "retained_facts": len(self._retained.reference),
        }

    def _retain_term(self, retained: Answers) -> Tensor:
        if self.objective.retain == "kl":
            return losses.retain_kl(retained.logits, retained.labels, retained.table)
        return losses.answer_nll(retained.logits, retained.labels)

    @torch.no_grad()
    def _collapse(self, batch: Mapping[Kind, Answers], retained: Answers | None) -> str | None:
        """Why training should end here: ``"forget"``, ``"retain"``, or nothing."""
        config = self.config
        if config.stop_above is not None and "answer" in batch:
            answer = batch["answer"]
            limit = config.stop_above * math.log(answer.logits.shape[-1])
            if float(losses.answer_nll(answer.logits, answer.labels)) > limit:
                return "forget"
        if config.stop_retain is not None and retained is not None:
            counted = retained.labels != losses.IGNORED
            lost = retained.reference - losses.token_logprobs(retained.logits, retained.labels)
            if float(lost[counted].mean()) > config.stop_retain:
                return "retain"
        return None
