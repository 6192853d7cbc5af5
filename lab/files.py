"""Writing a file or a folder so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.errors import OutputExistsError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path``, which takes its place when the ``with`` ends without an exception.

    Missing folders are made. On an exception (a full disk, for example) the temporary file goes and ``path`` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-", suffix=target.suffix)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        # mkstemp's file is private to its owner; the result should be like any other file of this user.
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_folder(folder: str | Path, fill: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Makes a folder in one step: ``fill`` writes into a temporary one beside it, which then takes its name.

    A failure (a full disk, an interrupt) leaves whatever was there before and nothing half-written.

    Raises:
        OutputExistsError: The folder holds something already and ``overwrite`` is off.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise OutputExistsError(f"{target} is a file, not a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputExistsError(f"{target} is not empty; choose another folder or overwrite it on purpose")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    old: Path | None = None
    try:
        fill(fresh)
        umask = os.umask(0)
        os.umask(umask)
        fresh.chmod(0o777 & ~umask)
        if target.is_dir():
            old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
            os.replace(target, old / "folder")
        os.replace(fresh, target)
    except BaseException:
        if old is not None and not target.exists():
            os.replace(old / "folder", target)
        shutil.rmtree(fresh, ignore_errors=True)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        raise
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
    return target
