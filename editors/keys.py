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
from lab.prefill import (
    Behind,
    KeysValues,
    begin,
    heads_of,
    join_caches,
    shared_lengths,
    stored_keys_values,
    token_chunks,
)
from lab.trace import Recording, Site, trace


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
    handle: ModelHandle, rows: Sequence[EditRow], sites: Sequence[Site], stop: Site
) -> Mapping[Site, Tensor]:
    """Reads sites at the edited token of each row; contexts that several rows have in common are run once.

    Args:
        handle: The model.
        rows: What to run; only the tokens up to the change are.
        sites: What to read.
        stop: Where the forward pass ends; not before any site.

    Returns:
        Site to ``[row, width]``, fp64 on the CPU.

    Raises:
        NumericalError: A value is NaN or infinite.
    """
    prompts = [list(row.prompt) for row in rows]
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with trace(handle, reads=tuple(sites), stop=stop) as recording:
        shared, heads, above = _beginnings(handle, recording, prompts)
        tails = [prompt[length:] for prompt, length in zip(prompts, shared, strict=True)]
        order = sorted(range(len(tails)), key=lambda index: len(tails[index]))
        for chunk in token_chunks(handle, [tails[index] for index in order]):
            chosen = [order[place] for place in chunk]
            behind = Behind([shared[i] for i in chosen], [heads[i] for i in chosen], above) if above else None
            batch, cache, _, _ = begin(handle, [tails[index] for index in chosen], behind)
            recording.run(batch, **({"past_key_values": cache, "use_cache": True} if above else {}))
            lines = torch.arange(len(chosen), device=batch.input_ids.device)
            last = torch.tensor([len(tails[index]) - 1 for index in chosen], device=lines.device)
            for site in sites:
                parts[site].append(recording[site][lines, last].to(device="cpu", dtype=torch.float64))
    places = torch.tensor(order).argsort()
    found = {site: torch.cat(pieces)[places] for site, pieces in parts.items()}
    for site, values in found.items():
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(
                f"the model gives NaN or infinity at {site.role} of layer {site.layer}; load it in fp32 or bf16"
            )
    return found


def _beginnings(
    handle: ModelHandle, recording: Recording, prompts: Sequence[Sequence[int]]
) -> tuple[list[int], list[int], list[KeysValues]]:
    """How much of each prompt other prompts have too, whose keys and values those are, and all of them, up to where the pass ends."""
    shared = shared_lengths(prompts, [len(prompt) - 1 for prompt in prompts])
    # A memory decides on what it sees of the whole prompt in one pass.
    if handle.stack.memory_inside:
        shared = [0] * len(prompts)
    heads, head_of = heads_of(prompts, shared)
    parts = []
    for chunk in token_chunks(handle, heads) if heads else []:
        batch, cache, _, _ = begin(handle, [heads[index] for index in chunk], None)
        recording.run(batch, past_key_values=cache, use_cache=True)
        parts.append([stored_keys_values(layer) for layer in cache.layers])
    return shared, head_of, join_caches(parts, max(map(len, heads))) if heads else []


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
