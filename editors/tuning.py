"""What methods that train share: their settings, prompts and targets as rows with explicit loss lines, a patch's provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from editors.base import EditorOptions, check_names
from editors.prefixes import Prefixes
from editors.presets import Preset, find_preset
from lab.errors import ConfigError, NumericalError
from lab.handle import ModelHandle
from lab.patch import Provenance, library_versions
from lab.records import EditRequest
from lab.scoring import log_probs
from lab.tokens import Batch, join_target, pad_rows

ConfigT = TypeVar("ConfigT")

Place = Literal["each", "last"]
"""Where a target token is predicted: after the prompt and the target tokens before it, or at the prompt's last token."""


def settle_plain(
    handle: ModelHandle, options: EditorOptions, section: str, config: type[ConfigT]
) -> tuple[ConfigT, Preset]:
    """Combines preset and overrides for a method that searches no value.

    Args:
        handle: The model.
        options: How to run.
        section: The method's section of the preset table.
        config: The method's settings, a dataclass.

    Raises:
        ConfigError: A setting does not exist or makes no sense, or prefixes are given to a method that has none.
    """
    if isinstance(options.prefixes, Prefixes):
        raise ConfigError(f"{options.spec!r} trains on the bare prompt; it takes no prefixes")
    return configured(handle, options.spec, section, config, options.preset, options.overrides)


def configured(
    handle: ModelHandle,
    spec: str,
    section: str,
    config: type[ConfigT],
    preset_name: str | None,
    overrides: Mapping[str, Any],
) -> tuple[ConfigT, Preset]:
    """The settings of one method on one model, from its preset and what the caller overrules."""
    preset = find_preset(handle, section, preset_name)
    known = {each.name for each in dataclasses.fields(config)}  # type: ignore[arg-type]
    check_names(spec, overrides, known)
    if unknown := sorted(set(preset.values) - known):
        raise ConfigError(f"preset {preset.name!r} holds {unknown[0]!r}, which {section!r} does not have")
    chosen = {**preset.values, **overrides}
    # Lists come from TOML and command lines; configs are compared and hashed.
    return config(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
    ), preset


def settle_bare(options: EditorOptions, config: type[ConfigT]) -> ConfigT:
    """The settings of an edit whose method was settled when its network was trained.

    Raises:
        ConfigError: A setting does not exist or makes no sense, or a preset or prefixes are given.
    """
    if options.preset is not None or isinstance(options.prefixes, Prefixes):
        raise ConfigError(
            f"{options.spec!r} takes neither preset nor prefixes; its trained network settles both"
        )
    check_names(options.spec, options.overrides, {each.name for each in dataclasses.fields(config)})  # type: ignore[arg-type]
    return config(**options.overrides)


def plain_settings(config: Any) -> dict[str, Any]:
    """A config as JSON values."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(config).items()
    }


def provenance(
    options: EditorOptions,
    config: Mapping[str, Any],
    preset: Preset,
    requests: Sequence[EditRequest],
    extra: Mapping[str, Any],
) -> Provenance:
    """Where a patch of a method that trains comes from."""
    return Provenance(
        method=options.spec,
        config=dict(config),
        requests=tuple(request.to_json() for request in requests),
        seed=options.seed,
        versions=library_versions(),
        extra={"preset": preset.to_json(), **extra},
    )


@dataclass(frozen=True)
class TargetLines:
    """Prompts with targets as one padded batch; a line is one predicted target token.

    Attributes:
        batch: Token rows.
        keep: ``[kept]`` columns whose logits are made.
        row: ``[line]`` index of the line's row.
        column: ``[line]`` index into ``keep`` of the position that predicts it.
        label: ``[line]`` the target token.
    """

    batch: Batch
    keep: Tensor
    row: Tensor
    column: Tensor
    label: Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.input_ids.shape[0]

    def of(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the lines, ``[line, vocabulary]``, from ``logits[row, kept, vocabulary]``; fp32 or wider."""
        return log_probs(logits[self.row, self.column])

    def split(self, sizes: Sequence[int]) -> list[TargetLines]:
        """Cuts the batch after so many rows each; columns and padding stay those of the whole.

        Args:
            sizes: Rows of each part, in order; together all of them.
        """
        found, start = [], 0
        for size in sizes:
            end = start + size
            inside = (self.row >= start) & (self.row < end)
            found.append(
                TargetLines(
                    self.batch.rows(slice(start, end)),
                    self.keep,
                    self.row[inside] - start,
                    self.column[inside],
                    self.label[inside],
                )
            )
            start = end
        return found

    def row_losses(self, table: Tensor) -> Tensor:
        """Mean negative log-probability of each row's target tokens, ``[row]``, from what ``of`` gave."""
        lines = -table.gather(1, self.label[:, None])[:, 0]
        total = lines.new_zeros(self.rows).index_add(0, self.row, lines)
        return total / torch.bincount(self.row, minlength=self.rows).to(total.dtype)


def target_lines(handle: ModelHandle, pairs: Sequence[tuple[str, str]], place: Place = "each") -> TargetLines:
    """Encodes prompts and targets; no loss ever falls on a prompt's or a padding token.

    Args:
        handle: Gives tokenizer and device.
        pairs: Filled prompt and target; the space between them follows ``tokens.join_target``.
        place: ``"each"``: teacher forced, every token from the ones before it (FT-M). ``"last"``: all tokens from the
            prompt alone (FT-L); rows then hold no target.

    Raises:
        EmptyTargetError: A target has no tokens.
    """
    rows: list[list[int]] = []
    prompts: list[int] = []
    lines: list[tuple[int, int, int]] = []
    for index, (prompt, target) in enumerate(pairs):
        head, tail = join_target(handle.tokenizer, prompt, target)
        last = len(head) - 1
        rows.append([*head, *tail[:-1]] if place == "each" else head)
        prompts.append(len(head))
        lines += [(index, last + step if place == "each" else last, token) for step, token in enumerate(tail)]
    batch = pad_rows(rows, handle.pad_id, device=handle.device, prompts=prompts)
    keep = sorted({column for _, column, _ in lines})
    where = {column: index for index, column in enumerate(keep)}

    def integers(values: Sequence[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=handle.device)

    return TargetLines(
        batch,
        integers(keep),
        integers([row for row, _, _ in lines]),
        integers([where[column] for _, column, _ in lines]),
        integers([label for _, _, label in lines]),
    )


def functional_logits(handle: ModelHandle, lines: TargetLines, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits ``[row, kept, vocabulary]`` of the model with some weights replaced; no weight is written.

    The caller holds the write lock: other threads would see the replaced weights while the pass runs.

    Args:
        handle: The model.
        lines: What to run.
        weights: Parameter name to a tensor in the orientation and type that the module stores; may carry a graph.
    """
    arguments = {**handle.inputs(lines.batch), "use_cache": False, "logits_to_keep": lines.keep}
    with handle.stack.routing.prompts(lines.batch.prompt_last):
        return torch.func.functional_call(handle.model, dict(weights), (), arguments).logits


def chunks(requests: Sequence[EditRequest], size: int) -> list[Sequence[EditRequest]]:
    """Requests in groups of at most ``size``, in order."""
    return [requests[start : start + size] for start in range(0, len(requests), size)]


def check_finite(
    losses: Tensor,
    requests: Sequence[EditRequest],
    step: int,
    advice: str = "try a smaller lr, or load the model in float32",
) -> None:
    """Refuses a loss that is NaN or infinite.

    Args:
        losses: ``[request]``.
        requests: Whose they are.
        step: For the message.
        advice: For the message.

    Raises:
        NumericalError: Names the request and the step.
    """
    for request, loss in zip(requests, losses.tolist(), strict=True):
        if not math.isfinite(loss):
            raise NumericalError(f"request {request.id!r}: the loss became {loss} at step {step}; {advice}")


def check_positive(config: Any, *names: str) -> None:
    """Raises ``ConfigError`` unless the named settings are above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} must be positive, not {getattr(config, name)}")
