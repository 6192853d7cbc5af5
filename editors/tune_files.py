"""What tuning keeps and shows: finished parts of a run as JSON, the preset as TOML, and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, OutputExistsError
from lab.files import replacing
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from editors.tune_records import Trial, Tuning

FORMAT = "knowlab-tune"
FORMAT_VERSION = 1
HEAD = "run.json"
PARTS = "parts"


class TuneFolder:
    """``run.json`` says what was tuned on what, ``parts/`` holds a file per finished part.

    Args:
        folder: New, empty, or a tuning run's.
        identity: Everything that a finished part depends on; a folder with another one is refused.

    Raises:
        OutputExistsError: The folder holds something else.
        ConfigError: It holds another run; says what differs.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        wanted = json.loads(json.dumps(dict(identity), default=str))
        head = self.folder / HEAD
        if head.is_file():
            found = _read(head)
            if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
                raise ConfigError(f"{head} is of another kind or version; choose another folder")
            for name, value in wanted.items():
                if found["identity"].get(name) != value:
                    raise ConfigError(
                        f"{self.folder} holds a tuning run with another {name}; choose another folder"
                    )
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputExistsError(f"{self.folder} is no tuning run and not empty; choose another folder")
        else:
            _save(head, {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": wanted})

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """The part of this name as it was kept; ``make`` makes it where it was not."""
        file = self.folder / PARTS / f"{name}.json"
        if not file.is_file():
            _save(file, make())
        return _read(file)


def preset_text(row: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> str:
    """One row in the form of ``presets.toml``.

    Args:
        row: What describes it: name, source, the shape of its models.
        sections: Values by section (``rome``, ``sadr.rome``); empty ones are left out.
    """
    lines = ["[[preset]]", *(f"{name} = {_toml(value)}" for name, value in row.items())]
    for section, values in sections.items():
        if values:
            lines += [f"[preset.{section}]", *(f"{name} = {_toml(value)}" for name, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Texts, numbers and truth values are written alike in JSON and TOML, but for this one control character.
    return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def plot_tuning(path: Path, result: Tuning) -> Path:
    """Draws where facts are recalled, by position class and layer, and the score of every candidate; writes PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(result.effects)
    layers = len(result.effects[names[0]])
    size = (min(9.0 + 0.2 * layers, 20.0), min(2.5 + 0.28 * max(len(names), len(result.trials)), 24.0))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    image = left.imshow(
        [list(result.effects[name]) for name in names],
        aspect="auto",
        cmap="Greens",
        vmin=0.0,
        vmax=max(1e-6, *(max(row) for row in result.effects.values())),
        interpolation="nearest",
    )
    left.set(title=f"MLP restored, mean of {len(result.traced)} facts", xlabel="layer")
    left.set_yticks(range(len(names)), labels=[name.replace("_", " ") for name in names])
    left.set_xticks(range(0, layers, max(1, -(-layers // 24))))
    figure.colorbar(image, ax=left, label="probability regained")
    ranked = sorted(result.trials, key=lambda trial: trial.rank)
    colors = ["tab:green" if trial is result.best else "0.6" for trial in ranked]
    right.barh(range(len(ranked)), [trial.score or 0.0 for trial in ranked], color=colors)
    right.set_yticks(range(len(ranked)), labels=[label(trial) for trial in ranked], fontsize=7)
    right.set(title=f"{result.editor}: score on {len(result.facts)} facts", xlabel="score", xlim=(0.0, 1.0))
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    return path


def label(trial: Trial) -> str:
    """A candidate in a few words: ``layers 3-5, clamp 4``."""
    layers = list(trial.settings["layers"])
    joined = layers == list(range(layers[0], layers[-1] + 1))
    where = f"{layers[0]}-{layers[-1]}" if joined and len(layers) > 1 else " ".join(map(str, layers))
    rest = [f"{name} {value:g}" for name, value in trial.settings.items() if name != "layers"]
    return ", ".join([f"layers {where}" if len(layers) > 1 else f"layer {where}", *rest])


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; delete it to have it made again") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is no JSON object; delete it to have it made again")
    return found


def _save(file: Path, content: Mapping[str, Any]) -> None:
    write_text_atomically(file, json.dumps(dict(content), indent=1, ensure_ascii=False, default=str) + "\n")
