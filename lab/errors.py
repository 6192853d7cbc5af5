"""Every exception that KnowLab raises on purpose.

    KnowLabError
    ├── ConfigError (ValueError)                a bad option, preset or combination
    │   └── UnknownNameError (LookupError)      a name that no registry knows; names its neighbours
    ├── UnsupportedModelError (ValueError)      a model family that the architecture table cannot describe
    ├── RequestError (ValueError)               an edit or forget request that cannot be carried out
    │   ├── SubjectNotFoundError                the subject does not occur in the prompt
    │   ├── EmptyTargetError                    the target has no tokens
    │   └── BudgetError                         the edit would change more around it than it may
    ├── DataError (ValueError)                  a malformed row or file; knows file and line
    ├── PatchError (ValueError)
    │   ├── BaseMismatchError                   the patch was made for another model
    │   ├── MissingParentsError                 patches it was computed on top of are not applied
    │   └── PatchFormatError                    a patch folder that cannot be read
    ├── NumericalError (ArithmeticError)        NaN, infinity or a singular system
    ├── AttentionUnavailableError (RuntimeError) attention weights were asked for and would have come back empty
    ├── BusyError (RuntimeError)                a lock is held by somebody else
    ├── MissingDependencyError (ImportError)    an optional library is not installed
    └── OutputExistsError (FileExistsError)     an output folder that holds something already

Each one also derives from the built-in kind a caller would expect, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class KnowLabError(Exception):
    """Root of the tree; the command line prints these as one line without a traceback."""


class ConfigError(KnowLabError, ValueError):
    """An option, preset or combination of options that makes no sense."""


class UnknownNameError(ConfigError, LookupError):
    """A name that a registry does not hold.

    Attributes:
        name: What was asked for.
        near: Known names that look similar, best first.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        self.name = name
        choices = sorted(known)
        self.near = tuple(difflib.get_close_matches(name, choices, n=3, cutoff=0.5))
        hint = (
            f"did you mean {' or '.join(self.near)}?"
            if self.near
            else f"known: {', '.join(choices) or 'none'}"
        )
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class UnsupportedModelError(KnowLabError, ValueError):
    """A model whose family, layout or kind the surgery floor cannot work on."""


class RequestError(KnowLabError, ValueError):
    """A request that cannot be carried out as it stands."""


class SubjectNotFoundError(RequestError):
    """The subject of a request does not occur in its prompt."""


class EmptyTargetError(RequestError):
    """The target of a request has no tokens."""


class BudgetError(RequestError):
    """An edit whose side effects exceed the budget of its session."""


class DataError(KnowLabError, ValueError):
    """A malformed row or file.

    Attributes:
        file: Path of the file, where there is one.
        line: 1-based line of the row, where there is one.
    """

    def __init__(self, message: str, file: str | Path | None = None, line: int | None = None) -> None:
        self.file = None if file is None else str(file)
        self.line = line
        where = "" if file is None else f"{file}:{line}: " if line is not None else f"{file}: "
        super().__init__(f"{where}{message}")


class PatchError(KnowLabError, ValueError):
    """A patch that cannot be used here."""


class BaseMismatchError(PatchError):
    """The patch names another base model than the one it was given."""


class MissingParentsError(PatchError):
    """Patches that were applied when this one was computed are not applied now."""


class PatchFormatError(PatchError):
    """A patch folder that is incomplete, corrupted or of another kind."""


class NumericalError(KnowLabError, ArithmeticError):
    """NaN, infinity or a singular system where a number was needed."""


class AttentionUnavailableError(KnowLabError, RuntimeError):
    """Attention weights were asked for, and the model would silently have returned none."""


class BusyError(KnowLabError, RuntimeError):
    """Somebody else holds a lock that is needed."""


class MissingDependencyError(KnowLabError, ImportError):
    """An optional library is needed and not installed."""

    def __init__(self, library: str, purpose: str, extra: str) -> None:
        super().__init__(f"{purpose} needs {library}; install it with: pip install 'knowlab[{extra}]'")


class OutputExistsError(KnowLabError, FileExistsError):
    """An output folder that holds something already."""
