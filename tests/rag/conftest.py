"""An empty index for a test."""

from __future__ import annotations

import pytest

from rag.index import open_index
from tests.rag.hashed import HashedWords


@pytest.fixture
def index(tmp_path):
    with open_index(tmp_path / "index", embeddings=HashedWords(), write=True) as opened:
        yield opened
