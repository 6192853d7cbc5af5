"""Methods on hidden states: RMU, and training under a perturbation that brings the answers back (LAU, LAT).

A perturbation is added to a block's output inside a ``with`` and never to padding; its gradients are taken with
``torch.autograd.grad``, so that no parameter collects any on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editors.unlearning import losses, state_losses
from editors.unlearning.procedure import Answers, Procedure, Step, real_norms
from editors.unlearning.settings import GradientConfig
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.trace import Site, Write

if TYPE_CHECKING:
    from editors.unlearning.trainer import UnlearningTrainer


def the_block(handle: ModelHandle, config: GradientConfig, share: float) -> int:
    """The block that a method works on: ``layer``, or this share of the depth, never the first where there are several.

    Raises:
        ConfigError: The block does not exist.
    """
    if config.layer is None:
        return min(handle.n_layers - 1, max(1, round(share * handle.n_layers)))
    if not 0 <= config.layer < handle.n_layers:
        raise ConfigError(
            f"layer {config.layer} does not exist; {handle.name!r} has 0 to {handle.n_layers - 1}"
        )
    return config.layer


RMU_DEPTH, ADVERSARY_DEPTH, LAT_DEPTH = 0.4, 0.125, 0.25


def rmu_weights(handle: ModelHandle, config: GradientConfig) -> list[str]:
    """The down projections of RMU's block and of the one below."""
    layer = the_block(handle, config, RMU_DEPTH)
    return [handle.weight(Role.MLP_OUT, each).name for each in range(max(0, layer - 1), layer + 1)]


class Misdirect(Procedure):
    """RMU: states of facts to forget are sent to one random direction, those of retained facts stay."""

    perturbed = False

    def prepare(self, run: UnlearningTrainer) -> None:
        layer = the_block(run.handle, run.config, RMU_DEPTH)
        self._site = Site(Role.BLOCK, layer)
        self._below = Site(Role.BLOCK, max(0, layer - 1))
        width = run.handle.weight(Role.MLP_OUT, layer).shape[0]
        drawn = torch.rand(width, generator=torch.Generator().manual_seed(run.seed), dtype=torch.float64)
        size = run.config.batch_size
        self._kept: dict[int, Tensor] = {}
        lengths: list[Tensor] = []
        for start in range(0, len(run.retain), size):
            picked = list(range(start, min(start + size, len(run.retain))))
            found = run.retained_answers(picked, grad=False, reads=(self._site,))
            for row, index in enumerate(picked):
                self._kept[index] = found.states[self._site][row][found.real[row]].cpu()
            lengths += [torch.linalg.vector_norm(self._kept[index].double(), dim=-1) for index in picked]
        if not run.retain:
            found = run.answers("answer", range(min(size, len(run.forget))), grad=False, reads=(self._site,))
            lengths = [torch.linalg.vector_norm(found.states[self._site][found.real].double(), dim=-1).cpu()]
        length = torch.cat(lengths).mean()
        if not bool(length.isfinite()):
            raise NumericalError(f"states of block {layer} are not finite; load the model in float32")
        self._goal = run.config.scale * length * drawn / torch.linalg.vector_norm(drawn)

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        writes: Mapping[Site, Write] = {}
        if self.perturbed:
            writes = ball_search(run, picked, self._below)
        answer = run.answers("answer", picked, reads=(self._site,), writes=writes)
        goal = self._goal.to(answer.logits.device)
        terms = {"forget": state_losses.misdirection(answer.states[self._site], answer.real, goal)}
        weights = {"forget": run.config.forget_weight}
        if not beside:
            return Step(terms, weights, answer)
        retained = run.retained_answers(beside, reads=(self._site,))
        before = torch.cat([self._kept[index] for index in beside]).to(answer.logits.device)
        terms["retain"] = state_losses.misdirection(retained.states[self._site], retained.real, before)
        weights["retain"] = run.config.retain_weight
        return Step(terms, weights, answer, retained)


class MisdirectPerturbed(Misdirect):
    """AdvRMU: RMU under a perturbation one block below."""

    perturbed = True


class Perturbed(Procedure):
    """LAU: the forget loss under the perturbation that most restores the answers; retained facts without it."""

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        site = Site(Role.BLOCK, the_block(run.handle, run.config, ADVERSARY_DEPTH))
        answer = run.answers("answer", picked, writes=ball_search(run, picked, site))
        assert run.objective.forget is not None  # both objectives of LAU have one
        forget = run.objective.forget({"answer": answer}, run.config)
        return self.with_retained(run, {"forget": forget}, answer, beside)


def ball_search(run: UnlearningTrainer, picked: Sequence[int], site: Site) -> Mapping[Site, Write]:
    """LAU's inner search (arXiv 2408.10682; verified): normalised descent on the answers' loss, within a ball per sample.

    The ball's radius is ``radius`` times the Frobenius norm of the sample's clean states; states stay within what the clean
    batch spans. The start is a random direction of random length.

    Returns:
        The perturbation as a write, detached.
    """
    config = run.config
    clean = run.answers("answer", picked, grad=False, reads=(site,))
    states, real = clean.states[site].detach(), clean.real
    counted = states[real]
    low, high = counted.amin(), counted.amax()
    limit = config.radius * real_norms(states, real)
    # A stream of its own for each update: equal runs are equal, whatever else is drawn.
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + sum(picked) + len(picked))
    drawn = torch.randn(states.shape, generator=generator).to(states) * real[..., None]
    share = torch.rand(len(states), generator=generator).to(states)
    delta = drawn * (share * limit / real_norms(drawn, real).clamp_min(1e-12))[:, None, None]
    for _ in range(config.inner_steps):
        variable = delta.requires_grad_()
        found = run.answers("answer", picked, writes={site: added(variable, low, high)})
        (slope,) = torch.autograd.grad(losses.answer_nll(found.logits, found.labels), variable)
        slope = slope * real[..., None]
        size = real_norms(slope, real).clamp_min(1e-12)
        delta = (variable - (limit / config.inner_steps / size)[:, None, None] * slope).detach()
        delta = delta * (limit / real_norms(delta, real).clamp_min(1e-12)).clamp_max(1)[:, None, None]
    return {site: added(delta.detach(), low, high)}


def added(delta: Tensor, low: Tensor, high: Tensor) -> Write:
    """A write that adds a perturbation and keeps what it changes within limits."""

    def write(states: Tensor) -> Tensor:
        return torch.where(delta == 0, states, (states + delta).clamp(low, high)) + 0 * delta

    return write


class Latent(Procedure):
    """LAT: refusals are learned under a perturbation of the prompt's states, which is searched anew for every few updates."""

    def __init__(self, repeats: int = 4) -> None:
        self.repeats = repeats
        self._left = 0

    def step(self, run: UnlearningTrainer, picked: Sequence[int], beside: Sequence[int]) -> Step:
        config = run.config
        if not self._left:
            self._site = Site(Role.BLOCK, the_block(run.handle, config, LAT_DEPTH))
            self._delta = self._search(run, picked)
            self._left = self.repeats
        self._left -= 1
        answer, refusal = self._both(run, picked, self._delta)
        away = state_losses.improbable(answer.logits, answer.labels)
        towards = losses.answer_nll(refusal.logits, refusal.labels)
        return self.with_retained(run, {"forget": towards + away}, answer, beside)

    def _both(self, run: UnlearningTrainer, picked: Sequence[int], delta: Tensor) -> tuple[Answers, Answers]:
        writes = {self._site: on_prompts(delta)}
        return run.answers("answer", picked, writes=writes), run.answers("refusal", picked, writes=writes)

    def _search(self, run: UnlearningTrainer, picked: Sequence[int]) -> Tensor:
        """The perturbation ``[batch, prompt, d]``, each token's within its ball."""
        config = run.config
        clean = run.answers("answer", picked, grad=False, reads=(self._site,))
        last = clean.lines.batch.prompt_last
        assert last is not None  # target_lines says where prompts end
        width = int(last.max()) + 1
        states = clean.states[self._site][:, :width].detach()
        inside = torch.arange(width, device=states.device) <= last[:, None]
        limit = config.radius * torch.linalg.vector_norm(states[inside], dim=-1).mean()
        if not bool(limit.isfinite()):
            raise NumericalError(
                f"states of block {self._site.layer} are not finite; load the model in float32"
            )
        generator = torch.Generator().manual_seed(run.seed)
        start = torch.randn(states.shape, generator=generator).to(states)
        delta = (1e-3 * limit * start * inside[..., None]).requires_grad_()
        adam = torch.optim.AdamW([delta], lr=0.1 * float(limit), weight_decay=0.0)
        for _ in range(config.inner_steps):
            answer, refusal = self._both(run, picked, delta)
            if config.targeted:
                wanted = losses.answer_nll(answer.logits, answer.labels)
                wanted = wanted + state_losses.improbable(refusal.logits, refusal.labels)
            else:
                wanted = -losses.answer_nll(refusal.logits, refusal.labels)
            (slope,) = torch.autograd.grad(wanted, delta)
            delta.grad = slope * inside[..., None]
            adam.step()
            with torch.no_grad():
                size = torch.linalg.vector_norm(delta, dim=-1, keepdim=True).clamp_min(1e-12)
                delta.mul_((limit / size).clamp_max(1))
        return delta.detach()


def on_prompts(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """A write that adds ``[batch, prompt, d]`` to the first columns of rows that are padded on the right."""

    def write(states: Tensor) -> Tensor:
        rest = states.shape[1] - delta.shape[1]
        return states + torch.nn.functional.pad(delta, (0, 0, 0, rest))

    return write
