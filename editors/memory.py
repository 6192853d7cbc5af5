"""What editors that make memories share: one projection of the model, their settings, and the patch."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from editors.base import EditorOptions, check_layers
from editors.presets import Preset, find_preset
from editors.rows import EditRow
from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.memory import Memory, MemoryPatch
from lab.patch import Provenance, library_versions
from lab.records import EditRequest
from lab.tokens import Batch, pad_rows

ConfigT = TypeVar("ConfigT")

Projection = Literal["mlp_in", "mlp_out"]
"""Where a memory stands: the MLP's first projection, or its down projection."""


def projection_role(name: Projection) -> Role:
    """The role of a projection.

    Raises:
        ConfigError: It is neither of the two.
    """
    if name not in ("mlp_in", "mlp_out"):
        raise ConfigError(f"a memory stands at mlp_in or mlp_out, not {name!r}")
    return Role(name)


def the_layer(handle: ModelHandle, layers: Sequence[int]) -> int:
    """The one layer of a memory.

    Raises:
        ConfigError: There are several, or it does not exist.
    """
    check_layers(handle, layers)
    if len(layers) != 1:
        raise ConfigError(f"a memory stands at one layer, not at {list(layers)}")
    return layers[0]


def settle_memory(
    handle: ModelHandle,
    options: EditorOptions,
    config: type[ConfigT],
    section: str = "",
    others: Sequence[str] = (),
) -> tuple[ConfigT, Preset | None]:
    """Combines preset and overrides for one model.

    Args:
        handle: The model.
        options: How to run.
        config: The method's settings, a dataclass.
        section: The method's section of the preset table; empty for methods that no model needs settings for.
        others: Overrides that are no field of ``config``.

    Raises:
        ConfigError: A setting does not exist or makes no sense.
    """
    known = {each.name for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name in options.overrides:
        if name not in known.union(others):
            near = difflib.get_close_matches(name, sorted(known), n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
            raise ConfigError(f"{options.spec!r} has no setting {name!r}; {hint}")
    if options.preset and not section:
        raise ConfigError(f"{options.spec!r} has no presets; give its settings one by one")
    preset = find_preset(handle, section, options.preset) if section else None
    chosen = {**(preset.values if preset else {}), **options.overrides}
    if unknown := sorted(set(chosen) - known.union(others)):
        raise ConfigError(f"the preset holds {unknown[0]!r}, which {section!r} does not have")
    # Lists come from TOML and command lines; configs are compared and hashed.
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    return config(**{name: value for name, value in plain.items() if name in known}), preset


def memory_patch(
    handle: ModelHandle,
    options: EditorOptions,
    config: Any,
    preset: Preset | None,
    requests: Sequence[EditRequest],
    memory: Memory,
    extra: Mapping[str, Any],
) -> MemoryPatch:
    """A patch with its provenance, on top of everything that is applied."""
    settings = dataclasses.asdict(config)
    provenance = Provenance(
        method=options.spec,
        config={name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        requests=tuple(request.to_json() for request in requests),
        seed=options.seed,
        versions=library_versions(),
        extra={**({"preset": preset.to_json()} if preset else {}), **extra},
    )
    parents = tuple(entry.patch.id for entry in handle.applied)
    return MemoryPatch(handle.fingerprint, memory, provenance, parents)


@dataclass(frozen=True)
class TargetBatch:
    """Prompts with their targets as one batch, and where the targets are predicted.

    Attributes:
        batch: The rows; it says where their prompts end.
        columns: Columns whose logits are needed.
        row, column, target: ``[target token]``: its row, its place in ``columns``, its id.
        weight: ``[target token]`` fp64, so that each row's tokens sum to 1.
    """

    batch: Batch
    columns: Tensor
    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor

    @classmethod
    def of(cls, handle: ModelHandle, rows: Sequence[EditRow]) -> TargetBatch:
        """The batch of some rows; a row without a target is only read."""
        device = handle.device
        prompts = [row.prompt_last + 1 for row in rows]
        batch = pad_rows([row.ids for row in rows], handle.pad_id, device=device, prompts=prompts)
        low = min(row.prompt_last for row in rows)
        lines = [
            (number, row.prompt_last - low + step, target, len(row.targets))
            for number, row in enumerate(rows)
            for step, target in enumerate(row.targets)
        ]
        row, column, target, length = (
            torch.tensor([line[part] for line in lines], dtype=torch.long, device=device) for part in range(4)
        )
        columns = torch.arange(low, batch.input_ids.shape[1], device=device)
        return cls(batch, columns, row, column, target, 1 / length.double())

    def nll(self, logits: Tensor) -> Tensor:
        """Mean negative log-likelihood of each row's target tokens, ``[row]``; 0 for a row without a target.

        Args:
            logits: ``[row, columns, vocabulary]``.
        """
        wide = torch.promote_types(logits.dtype, torch.float32)
        wanted = logits[self.row, self.column].to(wide)
        lines = torch.nn.functional.cross_entropy(wanted, self.target, reduction="none")
        rows = lines.new_zeros(self.batch.input_ids.shape[0])
        return rows.index_add(0, self.row, lines * self.weight.to(wide))
