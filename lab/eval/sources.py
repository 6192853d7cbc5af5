"""Where the cases of a suite come from: a file, the built-in world, or the hub."""

from __future__ import annotations

from lab.data import HUB, ReadOptions, load_cases
from lab.data.cases import CaseSet
from lab.errors import ConfigError
from lab.eval.atlas import atlas_cases
from lab.eval.atlas_chains import atlas_chain_cases

BUILT_IN = {"atlas": atlas_cases, "atlas_chains": atlas_chain_cases}
"""Suites that need no file."""


def suite_cases(
    suite: str,
    data: str | None = None,
    *,
    split: str = "test",
    seed: int = 0,
    skip_malformed: bool = False,
    convention: str = "easyedit",
) -> CaseSet:
    """The cases of a suite.

    Args:
        suite: Its name.
        data: Its file, or a hub id; the suite's own place on the hub without it.
        split: For built-in suites: ``test`` or ``dev``.
        seed: For built-in suites: draws wrong objects and neighbors. For ConvSent: draws wordings.
        skip_malformed: Collects rows that break the schema instead of raising.
        convention: For zsRE: which answer is taught.

    Raises:
        ConfigError: The suite needs a file and none was given, or takes none.
        DataError: The source cannot be read or breaks its schema.
    """
    if suite in BUILT_IN:
        if data is not None:
            raise ConfigError(f"the suite {suite} is built in; it takes --split, not --data")
        return BUILT_IN[suite](seed=seed, split="dev" if split == "dev" else "test")
    source = data if data is not None else HUB.get(suite)
    if source is None:
        raise ConfigError(f"the suite {suite!r} has no official place on the hub; give its file with --data")
    options = ReadOptions(convention=convention, seed=seed)
    return load_cases(source, suite=suite, skip_malformed=skip_malformed, options=options)
