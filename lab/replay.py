"""Replay: re-run only the blocks and positions that a change at one place can reach.

A batch of rows is run once in full. After that, a change to the output of one module at one column of each row needs only
the blocks above it and the columns from the change on: keys and values of everything before are kept, the blocks below are
skipped, and the head sees only the positions whose logits are wanted. The model's own forward drives each run, so masks,
rotary embeddings, sliding windows, norms and soft caps are the model's, and the result equals the full forward pass up to
rounding.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.prefill import Prefill, cache_of, prefill
from lab.tokens import Batch
from lab.trace import Site

TAP_ROLES = (Role.BLOCK, Role.MLP, Role.ATTN)


@dataclass(frozen=True)
class ReplayResult:
    """What one run gives.

    Attributes:
        logits: ``[wanted, vocab]``, the wanted positions of all rows, row by row.
        attention: Layer to ``[row, head, key]``: what the query column of each row attends to, for the blocks above the
            change; empty unless queries were given. Keys are in replay columns (see ``Replay.column``).
    """

    logits: Tensor
    attention: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Kept:
    """The first pass, and the queries in suffix columns."""

    pass_: Prefill
    queries: Tensor | None

    def select(self, rows: Tensor) -> _Kept:
        def pick(value: Tensor) -> Tensor:
            return value.index_select(0, rows)

        whole = self.pass_
        chosen = replace(
            whole,
            input_ids=pick(whole.input_ids),
            position_ids=pick(whole.position_ids),
            attention_mask=pick(whole.attention_mask),
            entering=pick(whole.entering),
            outputs={role: pick(value) for role, value in whole.outputs.items()},
            cache=tuple((pick(keys), pick(values)) for keys, values in whole.cache),
        )
        return _Kept(chosen, None if self.queries is None else pick(self.queries))

    def cut(self, first: int, width: int) -> _Kept:
        """Without the first columns of the prefixes, and with only the first ``width`` of the suffixes."""
        whole = self.pass_
        padding = whole.input_ids.shape[1] - width
        cut = replace(
            whole,
            input_ids=whole.input_ids[:, :width],
            position_ids=whole.position_ids[:, :width],
            attention_mask=whole.attention_mask[:, first : whole.attention_mask.shape[1] - padding],
            entering=whole.entering[:, :width],
            outputs={role: value[:, :width] for role, value in whole.outputs.items()},
            cache=tuple((keys[:, :, first:], values[:, :, first:]) for keys, values in whole.cache),
        )
        return replace(self, pass_=cut)


class Replay:
    """Runs a batch again and again under changes to one module's output at one column per row.

    Args:
        handle: The model, in evaluation mode.
        rows: Token ids of each row.
        change: For each row, the position whose value changes.
        tap: Where it changes: the output of ``Role.BLOCK``, ``Role.MLP`` or ``Role.ATTN`` of one layer; or several such
            sites of the same layer, each with a change of its own.
        wanted: For each row, the positions whose next-token logits are needed, none before its change.
        queries: For each row, the position whose attention row is needed, not before its change; ``None`` for no attention.

    Raises:
        ConfigError: A position lies outside its row or before the change, or the tap is of an unsupported kind.

    Example:
        >>> replay = Replay(handle, [ids], [3], Site(Role.MLP, 5), [[6]])
        >>> replay.run(torch.zeros(1, handle.hidden_size), torch.tensor([0])).logits.shape  # [1, vocab]
    """

    def __init__(
        self,
        handle: ModelHandle,
        rows: Sequence[Sequence[int]],
        change: Sequence[int],
        tap: Site | Sequence[Site],
        wanted: Sequence[Sequence[int]],
        queries: Sequence[int] | None = None,
    ) -> None:
        handle.stack.refuse_memories("a replay (value search, edits)")
        taps = (tap,) if isinstance(tap, Site) else tuple(tap)
        _check(rows, change, taps, wanted, queries)
        self._handle = handle
        self._layer = int(taps[0].layer or 0)
        self._roles = tuple(site.role for site in taps)
        self._column = max(change)
        self._wanted = tuple(
            torch.tensor([position - at for position in places], dtype=torch.long, device=handle.device)
            for places, at in zip(wanted, change, strict=True)
        )
        # What no wanted position and no query can see is cut off before anything runs.
        ends = [max([at, *places]) + 1 for at, places in zip(change, wanted, strict=True)]
        if queries is not None:
            ends = [max(end, query + 1) for end, query in zip(ends, queries, strict=True)]
        cut = [list(row[:end]) for row, end in zip(rows, ends, strict=True)]
        with handle.writing(), torch.no_grad():
            pass_ = prefill(handle, cut, change, self._layer, TAP_ROLES)
        offsets = None if queries is None else [query - at for query, at in zip(queries, change, strict=True)]
        self._kept = _Kept(pass_, None if offsets is None else torch.tensor(offsets, device=handle.device))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self._kept.pass_.input_ids.shape[0])

    @property
    def column(self) -> int:
        """Column of every row's change in the attention rows of a ``ReplayResult``."""
        return self._column

    @property
    def layer(self) -> int:
        """Layer of the change."""
        return self._layer

    @property
    def base(self) -> Tensor:
        """Unchanged output of the (first) tap at the change, ``[row, d]``."""
        return self._base(self._roles[0])[:, 0]

    @property
    def bases(self) -> Tensor:
        """Unchanged outputs of all taps at the change, ``[row, tap, d]``."""
        return torch.stack([self._base(role)[:, 0] for role in self._roles], dim=1)

    @property
    def logit_rows(self) -> Tensor:
        """Row of each line of ``ReplayResult.logits``, ``[wanted]``."""
        counts = torch.tensor([len(places) for places in self._wanted])
        return torch.repeat_interleave(torch.arange(self.rows), counts).to(self._handle.device)

    def keep(self, rows: Sequence[int], *, trim: bool = False) -> Replay:
        """The same replay with only ``rows``, in that order; the first pass is not run again.

        Args:
            rows: Which.
            trim: Drop the columns that hold nothing but padding then. Attention rows lose them too, so they cannot be compared with
                rows from before.
        """
        narrow = object.__new__(Replay)
        narrow._handle, narrow._layer, narrow._roles = self._handle, self._layer, self._roles
        narrow._column = self._column
        narrow._wanted = tuple(self._wanted[row] for row in rows)
        narrow._kept = self._kept.select(
            torch.tensor(list(rows), dtype=torch.long, device=self._handle.device)
        )
        if trim:
            narrow._trim()
        return narrow

    def _trim(self) -> None:
        used = self._kept.pass_.attention_mask.any(dim=0).nonzero()[:, 0]
        first, width = int(used[0]), int(used[-1]) + 1 - self._column
        self._kept = self._kept.cut(first, width)
        self._column -= first

    def run(self, delta: Tensor, owner: Tensor) -> ReplayResult:
        """One differentiable run with ``delta`` added to the tap.

        Args:
            delta: ``[edit, d]``, or ``[edit, tap, d]`` where there are several taps; zero gives the unchanged model.
            owner: ``[row]``, which edit's delta each row receives.

        Returns:
            Logits at the wanted positions and, where queries were given, attention rows.
        """
        shift = delta.reshape(delta.shape[0], len(self._roles), -1).index_select(0, owner)
        kept, pass_, model = self._kept, self._kept.pass_, self._handle.model
        with ExitStack() as stack:
            stack.enter_context(self._handle.writing())
            captured = (
                None if kept.queries is None else stack.enter_context(_captured(self._handle, kept.queries))
            )
            stack.enter_context(self._reduced(shift))
            inputs = self._handle.inputs(Batch(pass_.input_ids, pass_.attention_mask, pass_.position_ids))
            output = model(**inputs, past_key_values=self._cache(), use_cache=True)
            # Attention in the change's own block comes before the change.
            attention = (
                {} if captured is None else {at: rows for at, rows in captured.items() if at > self._layer}
            )
        # Not ``[0]``, whose gradient would be copied into zeros.
        return ReplayResult(output.logits.squeeze(0), attention)

    def _base(self, role: Role) -> Tensor:
        return self._kept.pass_.outputs[role]

    def _cache(self) -> DynamicCache:
        pass_ = self._kept.pass_
        # Skipped blocks never read their keys, but the masks ask layer 0 how much has been seen.
        blank = pass_.entering.new_zeros(()).expand(self.rows, 1, self._column, 1)
        return cache_of([*[(blank, blank)] * (self._layer + 1), *pass_.cache])

    @contextmanager
    def _reduced(self, shift: Tensor) -> Iterator[None]:
        """Skips the blocks below, answers the tap's block from memory with ``shift`` added, and cuts the head's input."""
        handle, layer = self._handle, self._layer
        moved = {role: shift[:, index] for index, role in enumerate(self._roles)}

        def answer(role: Role) -> Callable[..., Any]:
            value = self._base(role)
            if role in moved:
                value = _added(value, moved[role])
            size = self._kept.pass_.sizes[role]

            def forward(*args: Any, **kwargs: Any) -> Any:
                first = args[0] if args else kwargs["hidden_states"]
                shaped = value.reshape(*first.shape[:-1], value.shape[-1])
                return shaped if size is None else (shaped, *[None] * (size - 1))

            return forward

        def pass_on(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            size = self._kept.pass_.sizes[Role.BLOCK]
            return hidden if size is None else (hidden, *[None] * (size - 1))

        def enter(*args: Any, **kwargs: Any) -> Any:
            return pass_on(self._kept.pass_.entering)

        def add_to_mlp(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            shaped = output.reshape(self.rows, -1, output.shape[-1])
            return _added(shaped, moved[Role.MLP]).reshape(output.shape)

        def gather_wanted(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0][self.logit_rows, torch.cat(self._wanted)][None],)

        stubs: dict[nn.Module, Callable[..., Any]] = {
            handle.module(Role.BLOCK, below): pass_on if below < layer - 1 else enter
            for below in range(layer)
        }
        hooks = []
        try:
            hooks.append(handle.module(Role.UNEMBED).register_forward_pre_hook(gather_wanted))
            if Role.BLOCK in moved:
                stubs[handle.module(Role.BLOCK, layer)] = answer(Role.BLOCK)
            else:
                stubs[handle.module(Role.ATTN, layer)] = answer(Role.ATTN)
                if Role.ATTN not in moved:
                    stubs[handle.module(Role.MLP, layer)] = answer(Role.MLP)
                elif Role.MLP in moved:
                    # The MLP reads the changed attention here, so that its own change comes on top of a real run.
                    hooks.append(handle.module(Role.MLP, layer).register_forward_hook(add_to_mlp))
            with replaced_forwards(stubs):
                yield
        finally:
            for hook in hooks:
                hook.remove()


def _captured(handle: ModelHandle, queries: Tensor) -> AbstractContextManager[Mapping[int, Tensor]]:
    from lab.attention import capture_rows

    return capture_rows(handle, queries)


def _added(value: Tensor, shift: Tensor) -> Tensor:
    """``value[row, pos, d]`` with ``shift[row, d]`` added at position 0, out of place."""
    return torch.cat([value[:, :1] + shift.to(value.dtype)[:, None], value[:, 1:]], dim=1)


@contextmanager
def replaced_forwards(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replaces the forward of each module, and silences its hooks, for the length of a ``with``.

    What a stub answers was recorded behind the module's hooks (a patch's sidecar is one), so they must not act twice.
    """
    names = ("forward", "_forward_hooks", "_forward_pre_hooks")
    saved: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module, forward in stubs.items():
            saved.append((module, {name: module.__dict__[name] for name in names if name in module.__dict__}))
            module.__dict__.update(
                forward=forward, _forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict()
            )
        yield
    finally:
        for module, before in reversed(saved):
            module.__dict__.pop("forward", None)
            module.__dict__.update(before)


def _check(
    rows: Sequence[Sequence[int]],
    change: Sequence[int],
    taps: Sequence[Site],
    wanted: Sequence[Sequence[int]],
    queries: Sequence[int] | None,
) -> None:
    if not rows:
        raise ConfigError("a replay needs at least one row")
    if not len(rows) == len(change) == len(wanted) or (queries is not None and len(queries) != len(rows)):
        raise ConfigError("rows, change, wanted and queries must have one entry per row")
    if not taps or len({site.layer for site in taps}) != 1 or len({site.role for site in taps}) != len(taps):
        raise ConfigError("the taps of a replay are different modules of one layer")
    for site in taps:
        if site.role not in TAP_ROLES or site.side != "out":
            raise ConfigError(f"a replay taps the output of a block, an MLP or an attention, not {site}")
    if len(taps) > 1 and Role.BLOCK in {site.role for site in taps}:
        raise ConfigError("a change of the whole block's output cannot be combined with changes inside it")
    for index, (row, at, places) in enumerate(zip(rows, change, wanted, strict=True)):
        needed = [*places, *([] if queries is None else [queries[index]])]
        if not 0 <= at < len(row) or any(not at <= place < len(row) for place in needed):
            raise ConfigError(
                f"row {index} has {len(row)} tokens and changes at {at}; positions {needed} must lie in between"
            )
