"""Networks that editors need: how they are trained, saved (safetensors and JSON), and tied to the model they belong to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from editors.values import Progress
from lab.errors import BaseMismatchError, ConfigError, PatchFormatError
from lab.files import write_folder
from lab.handle import ModelHandle

if TYPE_CHECKING:
    from editors.lessons import Lesson

FORMAT = "knowlab-network"
FORMAT_VERSION = 1
CARD_FILE = "network.json"
WEIGHTS_FILE = "network.safetensors"


@dataclass(frozen=True)
class TrainedNetwork:
    """A network on disk.

    Attributes:
        folder: Where it is.
        card: Its card: ``format``, ``editor``, ``base``, ``config``, ``training``, and the editor's own fields.
    """

    folder: Path
    card: Mapping[str, Any]

    @property
    def id(self) -> str:
        """Names its weights; part of the provenance of every patch that it makes."""
        return str(self.card["sha256"])


class Train(Protocol):
    """Makes the network of an editor that must be trained once per model."""

    def __call__(
        self,
        handle: ModelHandle,
        lessons: Sequence[Lesson],
        out: str | Path,
        *,
        work: str | Path | None = None,
        preset: str | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
        resume: bool = True,
        overwrite: bool = False,
        progress: Progress | None = None,
    ) -> TrainedNetwork:
        """Trains, or goes on with an interrupted run.

        Args:
            handle: The model, with nothing applied to it; left as it was, also on exceptions.
            lessons: What to learn from; some subjects are held out for validation.
            out: Folder for the network.
            work: Folder for checkpoints; ``out`` with ``.work`` behind it by default.
            preset: A row of ``presets.toml`` by name; the model's shape chooses without it.
            settings: Settings that differ from the preset.
            seed: Seeds the network's start, the held-out subjects and the order of the lessons.
            resume: Go on from the checkpoint in ``work``, if there is one.
            overwrite: Write into ``out`` although it holds something.
            progress: As in ``Editor.edit``.

        Raises:
            ConfigError: A setting makes no sense, patches are applied, or the checkpoint belongs to another run.
            DataError: The lessons do not suffice.
            NumericalError: Training ended in NaN or infinity.
        """
        ...


def work_folder(out: str | Path, work: str | Path | None) -> Path:
    """Where checkpoints go."""
    return Path(work) if work is not None else Path(f"{Path(out)}.work")


def check_bare(handle: ModelHandle) -> None:
    """Raises ``ConfigError`` where patches are applied: a network belongs to the base model."""
    if handle.applied:
        raise ConfigError(
            f"{len(handle.applied)} patches are applied to {handle.name!r}; train the network on the bare model"
        )


def save_network(
    out: str | Path,
    editor: str,
    handle: ModelHandle,
    tensors: Mapping[str, Tensor],
    card: Mapping[str, Any],
    *,
    also: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> TrainedNetwork:
    """Writes a network in one step.

    Args:
        out: The folder.
        editor: Name of the editor that it is for.
        handle: The model that it belongs to.
        tensors: Its weights.
        card: Plain JSON values beside the common ones.
        also: Writes further files into the fresh folder.
        overwrite: Replace what ``out`` holds.

    Raises:
        OutputExistsError: The folder holds something already and ``overwrite`` is off.
    """
    from safetensors.torch import save_file

    whole: dict[str, Any] = {}

    def fill(fresh: Path) -> None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            fresh / WEIGHTS_FILE,
        )
        (fresh / WEIGHTS_FILE).chmod(0o644)
        whole.update(
            format=FORMAT,
            format_version=FORMAT_VERSION,
            editor=editor,
            base=handle.fingerprint,
            **card,
            sha256=_sha256(fresh / WEIGHTS_FILE),
        )
        (fresh / CARD_FILE).write_text(
            json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if also is not None:
            also(fresh)

    return TrainedNetwork(write_folder(out, fill, overwrite=overwrite), whole)


def read_network(
    folder: str | Path, editor: str, handle: ModelHandle
) -> tuple[TrainedNetwork, dict[str, Tensor]]:
    """Reads a network for an editor on a model.

    Raises:
        ConfigError: No folder was named.
        PatchFormatError: The folder is absent, damaged, or holds no network of this editor.
        BaseMismatchError: It was trained for another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    make = f"`knowlab train-editor {editor} --model MODEL --out FOLDER`"
    if not str(folder):
        raise ConfigError(f"{editor!r} needs a trained network: give network=FOLDER; make one with {make}")
    place = Path(folder)
    if not (place / CARD_FILE).is_file() or not (place / WEIGHTS_FILE).is_file():
        raise PatchFormatError(
            f"{place} holds no network ({CARD_FILE}, {WEIGHTS_FILE}); make one with {make}"
        )
    try:
        card = json.loads((place / CARD_FILE).read_text(encoding="utf-8"))
        kind, version, base, digest = (card[key] for key in ("editor", "format_version", "base", "sha256"))
        named = card["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise PatchFormatError(f"{place / CARD_FILE} does not describe a network: {error}") from error
    if named != FORMAT or version != FORMAT_VERSION:
        raise PatchFormatError(
            f"{place / CARD_FILE} is {named!r} version {version}; this KnowLab reads {FORMAT!r} version {FORMAT_VERSION}"
        )
    if kind != editor:
        raise PatchFormatError(f"{place} holds a network for {kind!r}, not for {editor!r}")
    if base != handle.fingerprint:
        raise BaseMismatchError(
            f"the network in {place} was trained for base {str(base)[:12]}, {handle.name!r} is "
            f"{handle.fingerprint[:12]}; train one for this model with {make}"
        )
    if _sha256(place / WEIGHTS_FILE) != digest:
        raise PatchFormatError(
            f"{place / WEIGHTS_FILE} does not match the checksum in {CARD_FILE}; it is damaged"
        )
    try:
        return TrainedNetwork(place, card), load_file(place / WEIGHTS_FILE)
    except SafetensorError as error:
        raise PatchFormatError(f"{place / WEIGHTS_FILE} cannot be read: {error}") from error


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
