"""GRACE: a codebook beside one projection (Hartvigsen et al., NeurIPS 2023, arXiv 2211.11031).

An edit stores what the projection reads at the prompt's last token (the key), and a value in place of its output, searched so
that the model continues with the target. A prompt whose last token lies within a key's radius gets that key's value; all
others pass unchanged. Keys that come close share: equal targets widen the older radius and search its value on, different
targets split the space between them (section 3.2). What a codebook does is in ``editors.codebook``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from editors.base import Editor, EditorOptions, Method
from editors.codebook import Codebook, GraceMemory, Replacement, replaced
from editors.memory import (
    Projection,
    TargetBatch,
    memory_patch,
    projection_role,
    settle_memory,
    the_layer,
)
from editors.rows import EditRow, check_requests, request_rows
from editors.values import Progress, frozen
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.memory import MemoryPatch, memories_of
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.routing import Pass
from lab.tokens import pad_rows
from lab.trace import Recording, Site, trace

_ROWS = 64


@dataclass(frozen=True)
class GraceConfig:
    """Settings.

    Attributes:
        layers: The one block of the codebook.
        projection: ``mlp_out`` or ``mlp_in``.
        epsilon: Radius of a new key.
        steps: Updates of a value at most.
        lr: Learning rate of Adam.
        init: ``cold``: uniform in [0, 1); ``warm``: the projection's own output.
        replacement: Which tokens get the value: the prompt's last, all of the prompt, or all, generated ones included.
        stop_below: A value whose loss (mean negative log-likelihood of the target's tokens) falls below this is finished.
    """

    layers: tuple[int, ...] = (27,)
    projection: Projection = "mlp_out"
    epsilon: float = 1.0
    steps: int = 100
    lr: float = 1.0
    init: Literal["cold", "warm"] = "cold"
    replacement: Replacement = "last"
    stop_below: float = 0.01

    def __post_init__(self) -> None:
        projection_role(self.projection)
        if self.replacement not in ("last", "prompt", "all"):
            raise ConfigError(f"replacement is last, prompt or all, not {self.replacement!r}")
        if self.init not in ("cold", "warm"):
            raise ConfigError(f"init is cold or warm, not {self.init!r}")
        for name in ("epsilon", "steps", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, not {getattr(self, name)}")


class ValueSearch:
    """Values at one projection, one per row, and the loss of each.

    Args:
        handle: The model.
        rows: Prompts with their targets.
        replacement: Which tokens get the value.
    """

    def __init__(self, handle: ModelHandle, rows: Sequence[EditRow], replacement: Replacement) -> None:
        self._current = torch.empty(0)
        self._targets = TargetBatch.of(handle, rows)
        batch = self._targets.batch
        self._where = replaced(
            Pass(batch.input_ids, batch.attention_mask.bool(), batch.prompt_last), replacement
        )

    def losses(self, recording: Recording, values: Tensor) -> Tensor:
        """Mean negative log-likelihood of each row's target tokens, ``[row]``, differentiable in ``values[row, out]``.

        Args:
            recording: A trace whose write is ``self.write``.
            values: ``[row, out]``.
        """
        self._current = values
        logits = recording.run(self._targets.batch, logits_to_keep=self._targets.columns)
        return self._targets.nll(cast(Tensor, logits))

    def write(self, output: Tensor) -> Tensor:
        """Puts the values of the running ``losses`` call in place of ``output[row, pos, out]``, out of place."""
        return torch.where(self._where[..., None], self._current[:, None].to(output.dtype), output)


@dataclass(frozen=True)
class FoundValue:
    """What the search found for one edit: ``value`` ``[out]``, and the loss of every pass."""

    value: Tensor
    losses: tuple[float, ...]


def search_values(
    handle: ModelHandle,
    requests: Sequence[EditRequest],
    rows: Sequence[EditRow],
    starts: Tensor,
    site: Site,
    config: GraceConfig,
) -> list[FoundValue]:
    """Searches one value per row by gradient; rows do not see each other.

    Args:
        handle: The model; left as it was.
        requests: One per row, for messages.
        rows: Prompts with their targets.
        starts: ``[row, out]``.
        site: Output of the projection.
        config: Steps, learning rate and the rest.

    Raises:
        NumericalError: A loss is not finite; names the request.
    """
    search = ValueSearch(handle, rows, config.replacement)
    values = starts.clone().requires_grad_()
    adam = torch.optim.Adam([values], lr=config.lr)
    traces: list[list[float]] = [[] for _ in rows]
    with frozen(handle.model), trace(handle, writes={site: search.write}, detach=False) as recording:
        going = torch.ones(len(rows), 1, dtype=torch.bool, device=handle.device)
        for step in range(config.steps):
            losses = search.losses(recording, values)
            for number in going[:, 0].nonzero()[:, 0].tolist():
                traces[number].append(float(losses[number].detach()))
                if not math.isfinite(traces[number][-1]):
                    raise NumericalError(
                        f"request {requests[number].id!r}: the loss of the value search became "
                        f"{traces[number][-1]} at step {step}; try a smaller lr, or load the model in float32"
                    )
            going &= (losses.detach() >= config.stop_below)[:, None]
            if not bool(going.any()):
                break
            # Adam's momentum would move finished values too, so only the others take its step.
            before = values.detach().clone()
            (values.grad,) = torch.autograd.grad(losses.sum(), values)
            adam.step()
            with torch.no_grad():
                values.copy_(torch.where(going, values, before))
    return [
        FoundValue(value.clone(), tuple(losses))
        for value, losses in zip(values.detach(), traces, strict=True)
    ]


@dataclass(frozen=True)
class GraceEditor:
    """GRACE; see the module. Make one with ``get_editor``."""

    options: EditorOptions

    def edit(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        *,
        history: Sequence[WeightPatch] | None = None,
        progress: Progress | None = None,
    ) -> MemoryPatch:
        """One patch for all requests, in their order, after those of the codebook that is applied. See ``Editor.edit``."""
        check_requests(requests, one_per_subject=False)
        (patch,) = self._patches(handle, [list(requests)], progress)
        return patch

    def edit_many(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, progress: Progress | None = None
    ) -> list[MemoryPatch]:
        """One patch per request, their values searched together. See ``ManyEditor``."""
        return self._patches(handle, [[request] for request in requests], progress) if requests else []

    def _patches(
        self, handle: ModelHandle, lists: Sequence[list[EditRequest]], progress: Progress | None
    ) -> list[MemoryPatch]:
        config, preset = settle_memory(handle, self.options, GraceConfig, "grace")
        layer = the_layer(handle, config.layers)
        group = (layer, config.projection, config.replacement)
        flat = [request for requests in lists for request in requests]
        sizes = [len(requests) for requests in lists]
        with handle.writing():
            log: Any = next(iter(memories_of(handle, "grace", group)), None)
            with handle.stack.aside("grace", group):
                edits = _Edits(handle, flat, layer, config, self.options.seed)
                done = 0
                for part in edits.plan(log, sizes):
                    edits.search(part)
                    done += len(part)
                    if progress is not None:
                        progress("values", done, len(flat))
            patches = []
            for requests, end in zip(lists, itertools.accumulate(sizes), strict=True):
                places = range(end - len(requests), end)
                extra = {"values": [edits.note(place) for place in places]}
                memory = edits.memory(places)
                patches.append(memory_patch(handle, self.options, config, preset, requests, memory, extra))
            return patches


class _Edits:
    """Keys, targets and values of a list of requests."""

    def __init__(
        self,
        handle: ModelHandle,
        requests: Sequence[EditRequest],
        layer: int,
        config: GraceConfig,
        seed: int,
    ) -> None:
        self.handle, self.requests, self.config = handle, requests, config
        self.dtype = torch.promote_types(handle.dtype, torch.float32)
        self.rows = [request_rows(handle, request, ["{}"], "last")[0] for request in requests]
        role = projection_role(config.projection)
        self.site = Site(role, layer)
        self.keys, outputs = self._read(Site(role, layer, "in"))
        cold = torch.rand(
            outputs.shape[1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        start = outputs if config.init == "warm" else cold.to(outputs).expand_as(outputs)
        self.values = start.clone()
        self.found: dict[int, FoundValue] = {}
        # Place in this list of the request whose value a search goes on from; negative: one that is applied already.
        self.goes_on_from: dict[int, int] = {}

    def _read(self, source: Site) -> tuple[Tensor, Tensor]:
        keys, outputs = [], []
        with trace(self.handle, (source, self.site), stop=self.site) as recording:
            for begin in range(0, len(self.rows), _ROWS):
                chunk = self.rows[begin : begin + _ROWS]
                batch = pad_rows([row.prompt for row in chunk], self.handle.pad_id, device=self.handle.device)
                recording.run(batch)
                lines = torch.arange(len(chunk), device=self.handle.device)
                keys.append(recording[source][lines, batch.last].to(self.dtype))
                outputs.append(recording[self.site][lines, batch.last].to(self.dtype))
        found = torch.cat(keys), torch.cat(outputs)
        for request, key in zip(self.requests, found[0], strict=True):
            if not bool(key.isfinite().all()):
                raise NumericalError(f"request {request.id!r}: its key holds NaN or infinity, before step 0")
        return found

    def plan(self, log: GraceMemory | None, sizes: Sequence[int]) -> list[list[int]]:
        """Which requests are searched together: those that go on from another's value wait for it.

        Args:
            log: What is applied already.
            sizes: Lengths of the lists of requests; no list sees another.
        """
        applied = Codebook(self.keys[:0].cpu()) if log is None else log.codebook()
        offset = 0 if log is None else len(log.ids)
        waves: list[list[int]] = []
        wave_of: dict[int, int] = {}
        for place in range(sum(sizes)):
            if place in itertools.accumulate(sizes, initial=0):
                book = applied
            before, label = book, self.rows[place].targets
            key = self.keys[place].to(applied.keys)
            book, slot = before.with_edit(key, label, self.config.epsilon, offset + place)
            wave = 0
            if slot < len(before.source) and before.labels[slot] == label:
                owner = before.source[slot]
                self.goes_on_from[place] = owner - offset
                if owner >= offset:
                    wave = wave_of[owner - offset] + 1
                elif log is not None:
                    self.values[place] = log.values[owner].to(self.values)
            wave_of[place] = wave
            if wave == len(waves):
                waves.append([])
            waves[wave].append(place)
        return [wave[at : at + _ROWS] for wave in waves for at in range(0, len(wave), _ROWS)]

    def search(self, places: Sequence[int]) -> None:
        """Searches the values of some requests, each from where ``plan`` let it begin."""
        for place in places:
            if self.goes_on_from.get(place, -1) >= 0:
                self.values[place] = self.values[self.goes_on_from[place]]
        found = search_values(
            self.handle,
            [self.requests[place] for place in places],
            [self.rows[place] for place in places],
            self.values[list(places)],
            self.site,
            self.config,
        )
        for place, each in zip(places, found, strict=True):
            self.values[place] = each.value
            self.found[place] = each

    def memory(self, places: range) -> GraceMemory:
        chosen = list(places)
        return GraceMemory(
            int(self.site.layer or 0),
            self.config.projection,
            self.config.replacement,
            self.keys[chosen],
            self.values[chosen],
            tuple(self.requests[place].id for place in chosen),
            tuple(self.rows[place].targets for place in chosen),
            (self.config.epsilon,) * len(chosen),
        )

    def note(self, place: int) -> dict[str, Any]:
        losses = self.found[place].losses
        return {
            "id": self.requests[place].id,
            "steps": len(losses),
            "losses": list(losses),
            "goes_on": place in self.goes_on_from,
        }


def _build(options: EditorOptions) -> Editor:
    return GraceEditor(options)


GRACE = Method(
    "grace",
    "A codebook beside one projection; only prompts like the edited ones are answered from it",
    "Hartvigsen et al. 2023, arXiv 2211.11031",
    "one forward pass and one shallow backward pass per step, many facts at once",
    False,
    _build,
)
