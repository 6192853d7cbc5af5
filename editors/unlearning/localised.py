"""KLUE and ROKA: gradient times activation says which neurons a fact rests on, and which facts rest on the same."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editors.tuning import target_lines
from editors.unlearning import losses
from editors.unlearning.procedure import Procedure, Step
from editors.unlearning.sides import other_answers
from lab.arch import Role
from lab.errors import NumericalError, RequestError
from lab.handle import ModelHandle
from lab.records import Fact
from lab.scoring import score_targets
from lab.trace import Site, trace

if TYPE_CHECKING:
    from editors.unlearning.trainer import UnlearningTrainer


def contributions(
    handle: ModelHandle, pairs: Sequence[tuple[str, str]], layers: Sequence[int], size: int = 16
) -> Tensor:
    """``max_t a·∂P/∂a`` of every neuron: what it adds to the probability of a text behind a prompt.

    Args:
        handle: The model.
        pairs: Prompt and text; P is the text's length-normalised probability.
        layers: Blocks whose down projections' inputs are the neurons.
        size: Pairs per pass.

    Returns:
        ``[pair, layer, neuron]``, on the CPU.

    Raises:
        NumericalError: One is NaN or infinite.
    """
    sites = [Site(Role.MLP_OUT, layer, "in") for layer in layers]
    found = []
    for start in range(0, len(pairs), size):
        lines = target_lines(handle, pairs[start : start + size])
        hooks: dict[Site, Tensor] = {}

        def open_up(states: Tensor, site: Site, hooks: dict[Site, Tensor] = hooks) -> Tensor:
            # A zero that gradients reach, whatever of the model they do not reach.
            hooks[site] = torch.zeros_like(states, requires_grad=True)
            return states.detach() + hooks[site] if not states.requires_grad else states + hooks[site]

        writes = {site: (lambda states, site=site: open_up(states, site)) for site in sites}
        with torch.enable_grad(), trace(handle, sites, writes, detach=False) as recording:
            logits = recording.run(lines.batch, logits_to_keep=lines.keep)
            assert logits is not None  # no site stops the pass
            chance = (-lines.row_losses(lines.of(logits))).exp().sum()
            slopes = torch.autograd.grad(chance, [hooks[site] for site in sites])
            real = lines.batch.attention_mask.bool()[..., None]
            parts = [
                (recording[site].detach() * slope).masked_fill(~real, float("-inf")).amax(1)
                for site, slope in zip(sites, slopes, strict=True)
            ]
        found.append(torch.stack(parts, dim=1).cpu())
    table = torch.cat(found)
    if not bool(table.isfinite().all()):
        raise NumericalError("contributions of neurons are not finite; load the model in float32")
    return table


class Localised(Procedure):
    """KLUE: ascent on what is still known, with only the weights of the neurons that know it free to move."""

    def prepare(self, run: UnlearningTrainer) -> None:
        chooser = random.Random(f"klue:{run.seed}")
        self._options = []
        for fact in run.forget:
            try:
                wrong = other_answers(fact, [*run.forget, *run.others])
            except RequestError:
                wrong = []
            self._options.append(chooser.sample(wrong, min(len(wrong), run.config.options - 1)))
        others = [
            [other for other in (*run.others, *run.forget) if other.text != fact.text] for fact in run.forget
        ]
        self._mismatched = [
            [(other.text, fact.object) for other in chooser.sample(each, min(len(each), run.config.probes))]
            for fact, each in zip(run.forget, others, strict=True)
        ]
        self._active: list[int] = []
        self._notes: list[dict[str, int]] = []

    def begin_epoch(self, run: UnlearningTrainer, epoch: int) -> None:
        self._active = [
            index
            for index, fact in enumerate(run.forget)
            if not run.config.skip_forgotten or _picks(run.handle, fact, self._options[index])
        ]
        self._masks = self._select(run) if self._active else {}
        # Momentum of weights that were free before would go on moving them.
        run.restart()
        self._notes.append({"facts": len(self._active), "neurons": self._count if self._active else 0})

    def _select(self, run: UnlearningTrainer) -> dict[str, Tensor]:
        handle, layers = run.handle, range(run.handle.n_layers)
        facts = [run.forget[index] for index in self._active]
        own = contributions(handle, [(fact.text, fact.object) for fact in facts], layers)
        for place, index in enumerate(self._active):
            if self._mismatched[index]:
                surface = contributions(handle, self._mismatched[index], layers).mean(0)
                own[place] -= run.config.surface_weight * surface
        scores = own.mean(0)
        wanted = max(1, round(run.config.share * scores.numel()))
        chosen = torch.zeros(scores.numel(), dtype=torch.bool)
        chosen[scores.flatten().topk(wanted).indices] = True
        self._count = wanted
        return free_weights(handle, chosen.view_as(scores))

    def choose(
        self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        kept = [place for place, index in enumerate(picked) if index in self._active]
        return [picked[place] for place in kept], beside if kept else []

    def before_update(self, run: UnlearningTrainer) -> None:
        for name, parameter in run.handle.model.named_parameters():
            if parameter.grad is not None:
                parameter.grad *= self._masks[name].to(parameter.grad)

    def state(self) -> dict[str, Any]:
        return {"passes": self._notes}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._notes = state["passes"]

    def notes(self) -> dict[str, Any]:
        return {"passes": self._notes}


def free_weights(handle: ModelHandle, chosen: Tensor) -> dict[str, Tensor]:
    """Masks of the weights in and out of chosen neurons, in each parameter's own orientation.

    Args:
        handle: The model.
        chosen: ``[layer, neuron]``.
    """
    masks = {}
    for layer in range(handle.n_layers):
        own = chosen[layer]
        for role in (Role.MLP_IN, Role.MLP_UP, Role.MLP_OUT):
            if role not in handle.arch.paths:
                continue
            weight = handle.weight(role, layer)
            # Some families make gate and up in one projection, one below the other.
            lines = own if role is Role.MLP_OUT else own.repeat(weight.shape[0] // len(own))
            mask = lines[None, :] if role is Role.MLP_OUT else lines[:, None]
            mask = mask.expand(weight.shape)
            masks[weight.name] = (mask.T if weight.transposed else mask).float()
    return masks


def _picks(handle: ModelHandle, fact: Fact, wrong: Sequence[str]) -> bool:
    """Whether the model prefers the fact's answer to wrong ones; without any, whether it says it."""
    scores = score_targets(handle, [(fact.text, text) for text in (fact.object, *wrong)])
    if not wrong:
        return scores[0].all_correct
    return scores[0].mean_logprob > max(score.mean_logprob for score in scores[1:])


class Healing(Procedure):
    """ROKA: ascent on facts drawn by how well they are known, with the retained facts that rest on the same neurons held."""

    def prepare(self, run: UnlearningTrainer) -> None:
        last = [run.handle.n_layers - 1]
        own, pool = (
            torch.nn.functional.normalize(
                contributions(run.handle, side.pairs, last).flatten(1).double(), dim=1
            )
            for side in (run.sides["answer"], run.retained)
        )
        count = min(run.config.neighbors, len(run.retain))
        self._siblings = (own @ pool.T).topk(count, dim=1).indices.tolist()
        scores = score_targets(run.handle, run.sides["answer"].pairs)
        self._chances = torch.tensor([score.probability for score in scores], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(run.seed)
        run.remember(run.retained, sorted({sibling for each in self._siblings for sibling in each}))

    def state(self) -> dict[str, Any]:
        return {"chances": self._chances, "generator": self._generator.get_state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._chances = state["chances"]
        self._generator.set_state(state["generator"])

    def choose(
        self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        drawn = torch.multinomial(
            self._chances.clamp_min(1e-9), len(picked), replacement=True, generator=self._generator
        ).tolist()
        return drawn, sorted({sibling for index in drawn for sibling in self._siblings[index]})

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        answer, siblings = run.answers("answer", picked), run.retained_answers(beside)
        chances = losses.token_logprobs(answer.logits.detach(), answer.labels)
        counts = (answer.labels != losses.IGNORED).sum(1)
        for index, chance in zip(picked, (chances.sum(1) / counts).exp().tolist(), strict=True):
            self._chances[index] = chance
        # Only the prompt's last position: behind it stands the label, which a healed fact needs not have.
        first = (siblings.labels != losses.IGNORED) & ((siblings.labels != losses.IGNORED).cumsum(1) == 1)
        said = torch.where(first, siblings.logits.detach().argmax(-1), losses.IGNORED)
        terms = {
            "forget": losses.gradient_ascent(answer.logits, answer.labels),
            "retain": losses.answer_nll(siblings.logits, said),
        }
        weights = {"forget": run.config.forget_weight, "retain": run.config.retain_weight}
        return Step(terms, weights, answer, siblings)
