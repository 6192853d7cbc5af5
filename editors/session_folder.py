"""A session on disk: finished edits, each with its patch and its scores, so that an interruption loses none of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, OutputExistsError
from lab.eval.journal import Step
from lab.files import write_folder
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from lab.handle import ModelHandle

FORMAT = "knowlab-session"
FORMAT_VERSION = 1
HEAD = "session.json"
STEPS = "steps"
_STEP = "step.json"


class SessionFolder:
    """The journal of one session: ``session.json`` says whose it is, ``steps/`` holds a folder per finished edit.

    Args:
        folder: New, empty, or a session's.
        identity: Everything that a finished edit depends on; a folder with another one is refused.
        handle: The model, to read patches for.

    Raises:
        OutputExistsError: The folder holds something else.
        ConfigError: It holds another session; says what differs.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], handle: ModelHandle) -> None:
        self.folder = Path(folder)
        self._handle = handle
        wanted = json.loads(json.dumps(dict(identity), default=str))
        if (self.folder / HEAD).is_file():
            _compare(self.folder, _read(self.folder / HEAD), wanted)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise OutputExistsError(f"{self.folder} is no session and not empty; choose another folder")
        else:
            head = {"format": FORMAT, "format_version": FORMAT_VERSION, "identity": wanted}
            text = json.dumps(head, indent=1, ensure_ascii=False) + "\n"
            write_text_atomically(self.folder / HEAD, text)
        places = self.folder / STEPS
        # What an interrupted write left begins with a dot.
        found = sorted(place for place in places.iterdir() if place.name[0] != ".") if places.is_dir() else []
        self._places = {str(_read(place / _STEP)["id"]): place for place in found}

    def __len__(self) -> int:
        return len(self._places)

    def recall(self, id: str) -> Step | None:
        """The finished step of this id with its patches, or ``None``."""
        from lab.patch_io import read_patch

        place = self._places.get(id)
        if place is None:
            return None
        row = _read(place / _STEP)
        return Step.from_json(row, [read_patch(place / name, self._handle) for name in row["patches"]])

    def write(self, step: Step) -> None:
        """Keeps a step in one rename: a reader finds all of it or nothing."""
        patches: dict[str, Any] = {f"patch-{number}": patch for number, patch in enumerate(step.patches)}

        def fill(fresh: Path) -> None:
            for name, patch in patches.items():
                patch.save(fresh / name)
            text = (
                json.dumps(step.to_json() | {"patches": list(patches)}, indent=1, ensure_ascii=False) + "\n"
            )
            (fresh / _STEP).write_text(text, encoding="utf-8")

        place = self.folder / STEPS / f"{len(self._places):05d}"
        self._places[step.id] = write_folder(place, fill)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}; the session is damaged") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file} is no JSON object; the session is damaged")
    return found


def _compare(folder: Path, head: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if head.get("format") != FORMAT or head.get("format_version") != FORMAT_VERSION:
        raise ConfigError(f"{folder / HEAD} is of another kind or version; choose another folder")
    there = head["identity"]
    for name in dict.fromkeys([*there, *wanted]):
        if there.get(name) != wanted.get(name):
            raise ConfigError(
                f"{folder} holds a session with another {name}: {_short(there.get(name))} there, {_short(wanted.get(name))} "
                "here; choose another folder"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
