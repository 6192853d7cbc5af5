"""Keys: what a down projection reads at the edited token, and the hidden states that go with them.

One forward pass serves all wanted layers; it ends at the highest of them and never sees a token behind the edited one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editors.rows import EditRow
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.tokens import pad_rows
from lab.trace import Site, trace


@dataclass(frozen=True)
class KeyValue:
    """Input and output of one layer's down projection at the edited token, fp64 on the CPU.

    Attributes:
        keys: ``[row, in]``.
        values: ``[row, d]``.
    """

    keys: Tensor
    values: Tensor


def read_sites(
    handle: ModelHandle, rows: Sequence[EditRow], sites: Sequence[Site], stop: Site, *, max_rows: int = 256
) -> Mapping[Site, Tensor]:
    """Reads sites at the edited token of each row.

    Args:
        handle: The model.
        rows: What to run; only the tokens up to the change are.
        sites: What to read.
        stop: Where the forward pass ends; not before any site.
        max_rows: Rows per forward pass.

    Returns:
        Site to ``[row, width]``, fp64 on the CPU.

    Raises:
        NumericalError: A value is NaN or infinite.
    """
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with trace(handle, reads=tuple(sites), stop=stop) as recording:
        for begin in range(0, len(rows), max_rows):
            batch = pad_rows(
                [row.prompt for row in rows[begin : begin + max_rows]], handle.pad_id, "right", handle.device
            )
            recording.run(batch)
            lines = torch.arange(len(batch.last), device=batch.last.device)
            for site in sites:
                parts[site].append(recording[site][lines, batch.last].to(device="cpu", dtype=torch.float64))
    found = {site: torch.cat(pieces) for site, pieces in parts.items()}
    for site, values in found.items():
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"the model gives NaN or infinity at {site.role} of layer {site.layer}; load it in fp32 or bf16"
            )
    return found


def read_keys(handle: ModelHandle, rows: Sequence[EditRow], layers: Sequence[int]) -> dict[int, KeyValue]:
    """Keys and values of several layers at the edited token of each row, in one pass."""
    if not layers:
        raise ConfigError("no layer to read keys from")
    inputs = {layer: Site(Role.MLP_OUT, layer, "in") for layer in layers}
    outputs = {layer: Site(Role.MLP_OUT, layer, "out") for layer in layers}
    found = read_sites(handle, rows, [*inputs.values(), *outputs.values()], outputs[max(layers)])
    return {layer: KeyValue(found[inputs[layer]], found[outputs[layer]]) for layer in layers}


def mean_over_contexts(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over each request's contexts.

    Args:
        values: ``[request * context, width]``, a request's contexts in a row.
        weights: ``[context]``, summing to 1.

    Returns:
        ``[request, width]``.
    """
    return torch.einsum("rcw,c->rw", values.reshape(-1, len(weights), values.shape[-1]), weights)
