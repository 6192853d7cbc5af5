"""The folder of public benchmark files that may stand beside the repository."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder; its absence skips a test, and fails it where the environment says ``CI=true``."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"the benchmark files are missing: {SHARED_DATA}")
        pytest.skip("the public benchmark files are not beside the repository")
    return SHARED_DATA


@pytest.fixture
def memory_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of memory as ``pyproject.toml`` declares them, also where the installed metadata is older than the tree."""
    from lab import registry

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["knowlab.memories"]
    known, installed = (
        [SimpleNamespace(name=name, value=value) for name, value in points.items()],
        registry.entry_points,
    )
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: known if group == "knowlab.memories" else installed(group=group),
    )
