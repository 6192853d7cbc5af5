"""The folder of public benchmark files that may stand beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

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
