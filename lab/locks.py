"""A read/write lock: many may generate and score at once, nobody while weights change."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from lab.errors import BusyError


class ReadWriteLock:
    """Re-entrant per thread; a waiting writer keeps new readers out, so that writers never starve."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers: Counter[int] = Counter()
        self._writer: int | None = None
        self._depth = 0
        self._waiting = 0

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Holds the lock for reading; the writing thread may read as well."""
        me = threading.get_ident()
        with self._condition:
            if self._writer != me and not self._readers[me]:
                self._condition.wait_for(lambda: self._writer is None and not self._waiting)
            self._readers[me] += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers[me] -= 1
                if not self._readers[me]:
                    del self._readers[me]
                self._condition.notify_all()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the lock alone.

        Raises:
            BusyError: This thread only reads; waiting for itself would never end.
        """
        me = threading.get_ident()
        with self._condition:
            if self._writer != me:
                if self._readers[me]:
                    raise BusyError("weights cannot change inside `with handle.reading()`; leave it first")
                self._waiting += 1
                try:
                    self._condition.wait_for(lambda: self._writer is None and not +self._readers)
                finally:
                    self._waiting -= 1
                self._writer = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._writer = None
                self._condition.notify_all()
