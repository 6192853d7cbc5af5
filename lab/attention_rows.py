"""Single attention rows: what one query of each sample looks at, read or replaced while the model runs.

Stock sdpa attention returns no weights, and asking for them gives an empty tuple and one line in a log. So KnowLab registers
an attention function of its own: sdpa for the output, and beside it the one row per sample that is wanted, at the cost of a
row instead of a map. Families without sdpa run eager and hand out their maps. Where no row can be had, an error says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lab.arch import Role
from lab.errors import AttentionUnavailableError, ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle

IMPLEMENTATION = "knowlab_rows"
"""Name of our function among transformers' attention functions."""


class AttentionRows(Mapping[int, Tensor]):
    """Rows of the last forward pass: layer to ``[batch, head, key]``, softmax in fp32 or wider, with gradients.

    Keys are those the attention saw: what a cache held, then the current block. Only layers whose attention ran are in it.

    Attributes:
        positions: ``[batch]``, index of the wanted query within the current block; may be set anew between passes.
    """

    def __init__(
        self, positions: Tensor, layers: Mapping[nn.Module, int], replace: Mapping[int, Tensor]
    ) -> None:
        self.positions = positions
        self._layers = layers
        self._replace = replace
        self._rows: dict[int, Tensor] = {}

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._rows:
            raise AttentionUnavailableError(
                f"no attention row of layer {layer}: no forward pass has run it inside the `with`"
            )
        return self._rows[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, layer: object) -> bool:
        return layer in self._rows

    def stack(self) -> Tensor:
        """All layers as ``[batch, layer, head, key]``.

        Raises:
            AttentionUnavailableError: A layer is missing.
            ConfigError: The layers saw different numbers of keys (a cache that slides).
        """
        rows = [self[layer] for layer in range(len(self._layers))]
        if len({row.shape[-1] for row in rows}) > 1:
            raise ConfigError(
                "the layers saw different numbers of keys; take them one by one instead of stacked"
            )
        return torch.stack(rows, dim=1)

    def layer_of(self, module: nn.Module) -> int | None:
        """Layer of an attention module of the traced model."""
        return self._layers.get(module)

    def forget(self) -> None:
        """Drops the rows of the pass before."""
        self._rows.clear()

    def keep(self, layer: int, row: Tensor) -> None:
        """Stores a row; used by the attention function and the hooks."""
        self._rows[layer] = row

    def replacement(self, layer: int) -> Tensor | None:
        """Row that this layer must use in place of its own."""
        return self._replace.get(layer)

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """Picks each sample's wanted query out of ``values`` along ``dim``.

        Raises:
            ConfigError: Positions and batch do not fit.
        """
        places = self.positions.to(values.device)
        batch, length = values.shape[0], values.shape[dim]
        if places.shape != (batch,) or int(places.min()) < 0 or int(places.max()) >= length:
            raise ConfigError(
                f"attention positions {places.tolist()} do not fit a batch of {batch} rows with {length} queries each"
            )
        shape = [1] * values.dim()
        shape[0] = batch
        index = places.view(shape).expand(
            *(1 if axis == dim else size for axis, size in enumerate(values.shape))
        )
        return values.gather(dim, index).squeeze(dim)


_ACTIVE: ContextVar[AttentionRows | None] = ContextVar("knowlab_attention_rows", default=None)


@contextmanager
def capture_rows(handle: ModelHandle, positions: Tensor | Sequence[int]) -> Iterator[AttentionRows]:
    """Records one attention row per sample and layer in every forward pass inside the ``with``.

    Holds the handle's write lock: the attention implementation belongs to the whole model.

    Args:
        handle: The model.
        positions: For each row of the coming batch, the index of the query within the block of tokens that is fed
            (with a key/value cache: within the new tokens only).

    Yields:
        The rows; they are those of the latest pass.

    Raises:
        AttentionUnavailableError: From inside a forward pass, when an attention module runs without giving its row.
        ConfigError: From inside a forward pass, when the positions do not fit the batch.
    """
    with _rows(handle, positions, {}) as rows:
        yield rows


@contextmanager
def replace_rows(
    handle: ModelHandle, positions: Tensor | Sequence[int], rows: Mapping[int, Tensor]
) -> Iterator[AttentionRows]:
    """Forces attention rows: at ``positions``, the layers in ``rows`` mix their values by the given weights.

    Args:
        handle: The model.
        positions: As in ``capture_rows``.
        rows: Layer to ``[batch, head, key]``.

    Yields:
        The rows the model would have used.

    Raises:
        AttentionUnavailableError: The family runs eager attention only, which cannot be replaced.
    """
    if handle.arch.eager_only:
        raise AttentionUnavailableError(
            f"{handle.config.model_type!r} has eager attention only; its rows can be read but not replaced"
        )
    with _rows(handle, positions, rows) as captured:
        yield captured


@contextmanager
def _rows(
    handle: ModelHandle, positions: Tensor | Sequence[int], replace: Mapping[int, Tensor]
) -> Iterator[AttentionRows]:
    places = torch.as_tensor(positions, dtype=torch.long)
    modules = {handle.module(Role.ATTN, layer): layer for layer in range(handle.n_layers)}
    rows = AttentionRows(places, modules, replace)
    before = str(handle.config._attn_implementation)
    with ExitStack() as cleanup:
        cleanup.enter_context(handle.writing())
        if handle.arch.eager_only:
            implementation, read = "eager", _row_from_output
        else:
            _register()
            implementation, read = IMPLEMENTATION, _check_captured
        cleanup.callback(_ACTIVE.reset, _ACTIVE.set(rows))
        cleanup.callback(handle.model.set_attn_implementation, before)
        handle.model.set_attn_implementation(implementation)
        if str(handle.config._attn_implementation) != implementation:
            raise AttentionUnavailableError(
                f"{handle.name!r} keeps attention {before!r} and cannot give its rows"
            )
        cleanup.callback(handle.model.register_forward_pre_hook(lambda *_: rows.forget()).remove)
        for module, layer in modules.items():
            cleanup.callback(module.register_forward_hook(read(rows, layer)).remove)
        yield rows


def _row_from_output(rows: AttentionRows, layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, (tuple, list)) and len(output) > 1 else None
        if not isinstance(weights, Tensor):
            raise AttentionUnavailableError(
                f"the attention of layer {layer} returned no weights although it runs eager"
            )
        rows.keep(layer, rows.gather(weights, 2))

    return hook


def _check_captured(rows: AttentionRows, layer: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(*_: Any) -> None:
        if layer not in rows:
            raise AttentionUnavailableError(
                f"the attention of layer {layer} ran without our attention function; is another thread or a compiled "
                "copy running the model?"
            )

    return hook


def _register() -> None:
    """Makes our function known to transformers, once; its state travels in a context variable, not in the registry."""
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    if IMPLEMENTATION not in AttentionInterface():
        AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
        AttentionInterface.register(IMPLEMENTATION, rows_attention)


def rows_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, plus the row that the surrounding ``capture_rows`` wants.

    Args:
        module: The attention module; outside ``capture_rows``, or for a module of another model, this is plain sdpa.
        query: ``[batch, head, query, width]``.
        key: ``[batch, key/value head, key, width]``.
        value: The same.
        attention_mask: ``[batch or 1, head or 1, query, key]``, bool or additive; ``None`` is causal.
        **options: As for sdpa (``scaling``, ``dropout``, ...).

    Returns:
        ``[batch, query, head, width]`` and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows = _ACTIVE.get()
    layer = None if rows is None else rows.layer_of(module)
    if rows is None or layer is None:
        return output, None
    weights = _one_row(rows, query, key, attention_mask, options.get("scaling"))
    rows.keep(layer, weights)
    forced = rows.replacement(layer)
    if forced is None:
        return output, None
    mixed = _per_group(forced.to(device=value.device, dtype=value.dtype), value.shape[1]) @ value
    index = torch.arange(output.shape[0], device=output.device), rows.positions.to(output.device)
    return output.index_put(index, mixed.reshape(output.shape[0], *output.shape[2:])), None


def _one_row(
    rows: AttentionRows, query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """``softmax(scaling * q Kᵀ + mask)`` for the wanted query: ``[batch, head, key]``."""
    wanted = rows.gather(query, 2)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Heads that share keys are multiplied as one block; repeating the keys would only copy them.
    scores = _per_group(wanted, key.shape[1]) @ key.transpose(-1, -2) * scale
    scores = scores.reshape(*wanted.shape[:2], key.shape[2]).to(
        torch.promote_types(query.dtype, torch.float32)
    )
    lowest = torch.finfo(scores.dtype).min
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        # sdpa is then causal from the first key on, except that a single query sees everything.
        if queries > 1:
            seen = torch.arange(keys, device=key.device)[None] <= rows.positions.to(key.device)[:, None]
            scores = scores.masked_fill(~seen[:, None], lowest)
    else:
        row = rows.gather(mask.expand(query.shape[0], -1, -1, -1), 2)[..., :keys]
        scores = (
            scores.masked_fill(~row, lowest) if row.dtype == torch.bool else scores + row.to(scores.dtype)
        )
    return scores.softmax(-1)


def _per_group(rows: Tensor, groups: int) -> Tensor:
    """``[batch, head, n]`` as ``[batch, group, head of the group, n]``."""
    return rows.reshape(rows.shape[0], groups, rows.shape[1] // groups, rows.shape[2])
