"""Tuning's records: how to tune, one candidate, and what was found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editors.presets import Preset
from lab.errors import ConfigError


@dataclass(frozen=True)
class TuneOptions:
    """How to tune.

    Attributes:
        limit: Known facts that are traced and edited.
        places: Layers, or windows of layers, that tracing proposes.
        grids: Values by setting, beside or instead of the usual ones; an empty list leaves a setting as the preset has it.
        settings: Settings that all candidates share.
        preset: Where everything that is not tuned comes from; the model's own without it.
        corpus: Text for key statistics.
        samples: Noise samples of a trace.
        seed: Draws facts, noise and prefixes.
        batch_size: Rows in one forward pass.
    """

    limit: int = 8
    places: int = 3
    grids: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    corpus: str = "auto"
    samples: int = 4
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        for name in ("limit", "places", "samples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, it is {getattr(self, name)}")


@dataclass(frozen=True)
class Trial:
    """One candidate and what its edits were worth.

    Attributes:
        settings: What it differs in from the preset, ``layers`` among them.
        n: Facts that could be edited.
        score: The suite's harmonic mean over them; ``None`` where none could.
        parts: The means that enter the score.
        margin: Mean of the parts' magnitudes (by how much the right answer is ahead, or how probable it is), 0 without any.
        skipped: Why facts could not be edited.
        seconds: Wall time.
    """

    settings: Mapping[str, Any]
    n: int
    score: float | None
    parts: Mapping[str, float]
    margin: float
    skipped: tuple[str, ...]
    seconds: float

    @property
    def rank(self) -> tuple[int, float, float]:
        """Larger is better: more facts edited, then a larger score; over few facts scores are often equal, then the margin."""
        return self.n, -1.0 if self.score is None else self.score, self.margin

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Trial:
        """Inverse of ``to_json``."""
        return cls(**{**row, "skipped": tuple(row["skipped"])})


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        editor: Specification.
        suite: Name of the suite whose score decided.
        source: Where the facts come from.
        facts: Ids of the facts.
        base: The preset that the candidates vary.
        effects: Position class to the mean effect of restoring an MLP at each layer.
        traced: Ids of the facts whose answer the noise takes away, which ``effects`` is the mean of.
        trials: All candidates in the order of trial.
        best: The one that was written.
        values: All settings of the written preset.
        folder: Holds ``preset.toml``, ``tune.json`` and ``tune.png``.
        seed: Of the draw.
    """

    editor: str
    suite: str
    source: str
    facts: tuple[str, ...]
    base: Preset
    effects: Mapping[str, Sequence[float]]
    traced: tuple[str, ...]
    trials: tuple[Trial, ...]
    best: Trial
    values: Mapping[str, Any]
    folder: Path
    seed: int

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return {
            "editor": self.editor,
            "suite": self.suite,
            "source": self.source,
            "facts": list(self.facts),
            "base": self.base.to_json(),
            "trace": {
                "kind": "mlp",
                "facts": list(self.traced),
                "effects": {name: list(row) for name, row in self.effects.items()},
            },
            "candidates": [trial.to_json() for trial in self.trials],
            "best": self.best.to_json(),
            "values": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in self.values.items()
            },
            "preset": str(self.folder / "preset.toml"),
        }
