"""One writer at a time: a lock on an index folder that ends with the process that holds it."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from lab.errors import BusyError

LOCK_FILE = "writer.lock"


class WriterLock:
    """Holds an index folder for writing until ``release``.

    The operating system frees the lock with the process, however it ends, so no lock is ever left over. The file tells who holds it.

    Args:
        folder: The index folder; it exists.

    Raises:
        BusyError: Somebody else writes; says who.
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        self._file: IO[str] = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = _holder(self._file.read())
            self._file.close()
            raise BusyError(
                f"the index {folder} is being written by {holder}; wait until it is done, or open the index for reading"
            ) from None
        self._file.seek(0)
        self._file.truncate()
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "program": Path(sys.argv[0]).name,
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        self._file.write(json.dumps(content))
        self._file.flush()

    def release(self) -> None:
        """Lets others write; does nothing the second time."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()


def _holder(text: str) -> str:
    try:
        row = json.loads(text)
        return (
            f"{row['program'] or 'a program'} (process {row['pid']} on {row['host']}, since {row['since']})"
        )
    except (ValueError, KeyError, TypeError):
        # The holder has the lock and has not written its name yet.
        return "another process"
