"""Trains small models on a stream of texts: several processes on a CPU, one on a GPU, resumable to the step.

On a CPU, two processes with one thread each are far faster than one process with two threads as soon as anything else runs,
because they meet twice a step and not a thousand times. They share parameters, gradients and optimizer state in memory.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lab.atlas import lean
from lab.atlas.checkpoint import load_checkpoint
from lab.atlas.optimizer import initial_state, share_out, update
from lab.atlas.packing import Batch, Shard, TextWithAnswers, encode_documents, make_batch, pack
from lab.atlas.progress import Log
from lab.atlas.recipe import Recipe
from lab.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Source(Protocol):
    """What a run trains on. It travels to other processes, so it holds no open files and no generators."""

    def documents(self, stream: int) -> Iterator[TextWithAnswers]:
        """Endless texts; another stream gives other texts, the same stream the same."""
        ...

    def probes(self) -> Mapping[str, list[tuple[str, str]]]:
        """Named sets of (prompt, answer with its stop) whose recall is measured now and then."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a run is carried out; none of it changes what the recipe means.

    Attributes:
        work: Folder of checkpoints, log and tokenizer, outside the source tree.
        processes: Processes on a CPU; 0 takes one per core, at most as many as the recipe has workers.
        device: ``cpu`` or ``cuda``.
        compile: Whether to compile the pass; needs a C++ compiler on a CPU.
        precision: ``bf16``, ``fp32`` or ``auto``: bf16 where the machine multiplies it fast.
        shard_texts: Texts that are drawn, tokenised and packed at a time.
        probe_seconds: Seconds between probes; 0 for none.
        report: Receives one line of progress.
    """

    work: Path
    processes: int = 0
    device: str = "cpu"
    compile: bool = True
    precision: str = "auto"
    shard_texts: int = 32768
    probe_seconds: float = 180.0
    report: Callable[[str], None] = print

    @property
    def dtype(self) -> torch.dtype:
        """The working type of matrices."""
        if self.precision == "auto":
            fast = self.device != "cpu" or torch.backends.cpu.get_cpu_capability() == "AVX512"
            if self.device == "cpu" and fast:
                fast = bool(torch.cpu._is_avx512_bf16_supported())
            return torch.bfloat16 if fast else torch.float32
        if self.precision not in ("bf16", "fp32"):
            raise ConfigError(f"precision {self.precision!r} is not one of auto, bf16, fp32")
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass
class Shared:
    """What the processes of a run have in common; all tensors lie in shared memory."""

    params: dict[str, Tensor]
    state: dict[str, Tensor]
    grads: list[Tensor]
    # Rows: one per worker; columns: shard, and batch within it, that come next.
    places: Tensor
    # Part of the budget used, stop flag, step, seconds used, tokens seen.
    control: Tensor
    losses: Tensor
    barrier: Any = field(default=None)


def train(
    recipe: Recipe,
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    resume: bool = True,
    max_steps: int = 0,
    start: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Trains a model, or goes on with an interrupted run.

    Args:
        recipe: Model, batches, rates, budget.
        source: Texts and probes.
        tokenizer: Must not change between the parts of a run.
        settings: Work folder and machine.
        resume: Go on from the checkpoint in the work folder when there is one.
        max_steps: Stop after this many steps of this call, with a checkpoint; 0 for the whole budget.
        start: Parameters to start a new run from; drawn with the recipe's seed without.

    Returns:
        The fp32 parameters by Hugging Face name.

    Raises:
        ConfigError: The checkpoint belongs to another recipe, or a setting is off.
        RuntimeError: A process of the run ended early.
    """
    import torch.multiprocessing as mp

    if len(tokenizer) > recipe.shape.vocab:
        raise ConfigError(
            f"{len(tokenizer)} tokens do not fit a model of {recipe.shape.vocab} embedding rows"
        )
    settings.work.mkdir(parents=True, exist_ok=True)
    processes = 1
    if settings.device == "cpu":
        processes = min(settings.processes or os.cpu_count() or 1, recipe.workers)
    shared = _begin(recipe, settings, resume, start)
    if processes == 1:
        _run(0, 1, recipe, source, tokenizer, settings, shared, max_steps)
        return shared.params
    context = mp.get_context("spawn")
    shared.barrier = context.Barrier(processes)
    helpers = [
        context.Process(
            target=_helper,
            args=(rank, processes, recipe, source, tokenizer, _silent(settings), shared, max_steps),
            daemon=True,
        )
        for rank in range(1, processes)
    ]
    for helper in helpers:
        helper.start()
    try:
        _run(0, processes, recipe, source, tokenizer, settings, shared, max_steps)
        for helper in helpers:
            helper.join(60)
    finally:
        for helper in helpers:
            if helper.is_alive():
                helper.kill()
    return shared.params


def _silent(settings: Settings) -> Settings:
    from dataclasses import replace

    return replace(settings, report=_ignore, probe_seconds=0.0)


def _ignore(line: str) -> None:
    del line


def _begin(
    recipe: Recipe, settings: Settings, resume: bool, start: Mapping[str, Tensor] | None = None
) -> Shared:
    found = load_checkpoint(settings.work) if resume else None
    control, places = torch.zeros(5, dtype=torch.float64), torch.zeros(recipe.workers, 2, dtype=torch.int64)
    if found is None:
        params = lean.initial_params(recipe.shape, torch.Generator().manual_seed(recipe.seed))
        if start is not None:
            wrong = {name for name in params if name not in start or start[name].shape != params[name].shape}
            if wrong:
                raise ConfigError(f"{recipe.name} cannot start from weights of another shape ({min(wrong)})")
            params = {name: start[name].float().clone() for name in params}
        state = initial_state(params, recipe)
    else:
        params, state, progress = found
        before = Recipe.from_json(progress["recipe"])
        if (before.shape, before.without, before.seed) != (recipe.shape, recipe.without, recipe.seed):
            raise ConfigError(
                f"{settings.work} holds a run of another recipe ({before.name}); choose another work folder"
            )
        places = torch.tensor(progress["places"], dtype=torch.int64)
        control[2:] = torch.tensor([progress["step"], progress["seconds"], progress["tokens"]])
        settings.report(f"resuming {recipe.name} at step {progress['step']}")
    # One order whatever the source: sums over all parameters must not depend on how a file lists them.
    params = dict(sorted(params.items()))
    size = sum(value.numel() for value in params.values())
    device = torch.device(settings.device)

    def place(value: Tensor) -> Tensor:
        return value.to(device) if device.type != "cpu" else value.contiguous().share_memory_()

    return Shared(
        params={name: place(value) for name, value in params.items()},
        state={name: place(value) for name, value in state.items()},
        grads=[place(torch.zeros(size)) for _ in range(recipe.workers)],
        places=places.share_memory_(),
        control=control.share_memory_(),
        losses=torch.zeros(recipe.workers, 2).share_memory_(),
    )


def _helper(rank: int, processes: int, *rest: Any) -> None:
    # The first process decides when a run ends; a signal to the whole group must not leave it waiting alone.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _run(rank, processes, *rest)


class _Feed:
    """The batches of one worker, drawn shard by shard; its place is two numbers."""

    def __init__(
        self, worker: int, place: Tensor, recipe: Recipe, source: Source, tokenizer: Any, settings: Settings
    ) -> None:
        self.worker, self._shared_place, self.place = worker, place, place.clone()
        self.recipe, self.source, self.tokenizer, self.settings = recipe, source, tokenizer, settings
        self._shard: Shard | None = None
        self._number = -1

    def next(self) -> Batch:
        """The next batch; the place moves on."""
        number, index = (int(value) for value in self.place)
        if self._shard is None or number != self._number:
            self._shard, self._number = self._draw(number), number
        if index >= len(self._shard):
            # The texts or the layout changed since the checkpoint, and this shard is now shorter.
            self.place.copy_(torch.tensor([number + 1, 0]))
            return self.next()
        seed = (self.recipe.seed, self.worker, number, index)
        batch = make_batch(self._shard, index, self.recipe, seed, torch.device(self.settings.device))
        last = index + 1 >= len(self._shard)
        self.place.copy_(torch.tensor([number + 1, 0] if last else [number, index + 1]))
        return batch

    def publish(self) -> None:
        """Makes the place known to the others; only between the two meetings of a step, when nobody saves."""
        self._shared_place.copy_(self.place)

    def _draw(self, number: int) -> Shard:
        stream = number * self.recipe.workers + self.worker
        documents = list(islice(self.source.documents(stream), self.settings.shard_texts))
        coded = encode_documents(self.tokenizer, documents, [form for form, _ in self.recipe.stressed])
        rng = Random(f"pack:{self.recipe.seed}:{stream}")
        return pack(coded, self.recipe, self.tokenizer.pad_token_id, rng)


def _run(
    rank: int,
    processes: int,
    recipe: Recipe,
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    settings: Settings,
    shared: Shared,
    max_steps: int,
) -> None:
    if settings.device == "cpu":
        torch.set_num_threads(1 if processes > 1 else max(1, torch.get_num_threads()))
    compute = torch.compile(lean.loss, dynamic=False) if settings.compile else lean.loss
    feeds = [
        _Feed(worker, shared.places[worker], recipe, source, tokenizer, settings)
        for worker in range(rank, recipe.workers, processes)
    ]
    mine = share_out(shared.params, recipe, processes)[rank]
    views = _views(shared)
    log = Log(recipe, source, tokenizer, settings, shared) if rank == 0 else None
    done = 0

    def meet() -> None:
        if shared.barrier is not None:
            shared.barrier.wait(1800)

    with _halting(log):
        meet()
        while not _step(recipe, settings, shared, compute, feeds, mine, views, log, meet, done, max_steps):
            done += 1


@contextmanager
def _halting(log: Log | None) -> Iterator[None]:
    """While inside, the first interrupt ends the run after its step, with a checkpoint; a second one ends it at once."""
    if log is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def halt(number: int, frame: object) -> None:
        del frame
        log.halted = True
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, halt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _step(
    recipe: Recipe,
    settings: Settings,
    shared: Shared,
    compute: Callable[..., tuple[Tensor, Tensor]],
    feeds: Sequence[_Feed],
    mine: Sequence[str],
    views: Sequence[Mapping[str, Tensor]],
    log: Log | None,
    meet: Callable[[], None],
    done: int,
    max_steps: int,
) -> bool:
    """One step of one process; returns whether it was the last."""
    for feed in feeds:
        _gradient(compute, recipe, settings, shared, views[feed.worker], feed)
    if log is not None:
        log.clock(bool(max_steps and done + 1 >= max_steps))
    meet()
    for feed in feeds:
        feed.publish()
    grads, step = _mean_gradient(shared, recipe), int(shared.control[2])
    factor = recipe.rate_at(float(shared.control[0]), step)
    stop = bool(shared.control[1])
    update(shared.params, _split(grads, shared.params), shared.state, mine, recipe, factor, step)
    meet()
    if log is not None:
        log.after_step(factor, stop)
    if stop:
        meet()
    return stop


def _views(shared: Shared) -> list[dict[str, Tensor]]:
    return [_split(flat, shared.params) for flat in shared.grads]


def _split(flat: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    views, start = {}, 0
    for name, value in params.items():
        views[name] = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    return views


def _gradient(
    compute: Callable[..., tuple[Tensor, Tensor]],
    recipe: Recipe,
    settings: Settings,
    shared: Shared,
    views: Mapping[str, Tensor],
    feed: _Feed,
) -> None:
    batch = feed.next()
    leaves = lean.working_copy(shared.params, recipe.shape, settings.dtype)
    loss, each = compute(
        leaves,
        recipe.shape,
        recipe.layout,
        batch.ids,
        batch.positions,
        batch.masks,
        batch.chosen,
        batch.labels,
        batch.weights,
        batch.keep,
    )
    loss.backward()
    for name, leaf in leaves.items():
        if leaf.grad is not None:
            views[name].copy_(leaf.grad)
    inside = (each * batch.answers).sum() / batch.answers.sum().clamp(min=1)
    shared.losses[feed.worker] = torch.stack([loss.detach(), inside]).cpu()


def _mean_gradient(shared: Shared, recipe: Recipe) -> Tensor:
    # Summed in one fixed order, so that the number of processes changes no bit.
    total = shared.grads[0].clone()
    for other in shared.grads[1:]:
        total += other
    total /= len(shared.grads)
    return total.mul_(torch.clamp(recipe.clip / (total.norm() + 1e-6), max=1.0))
