"""Where the runs of the built-in models start."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lab.atlas.train
from lab.atlas.recipe import get_recipe
from lab.atlas.runs import train_atlas, world_tokenizer
from lab.atlas.weights import CORE_NAME, MODEL_NAMES, core_path, weights_path

SHIPPED = weights_path("atlas")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What runs are begun with, instead of training; caches lie in a fresh folder."""
    calls: list[dict[str, Any]] = []

    def note(recipe: Any, source: Any, tokenizer: Any, settings: Any, **rest: Any) -> None:
        del source, settings
        calls.append({"recipe": recipe.name, "tokenizer": tokenizer, **rest})

    monkeypatch.setattr(lab.atlas.train, "train", note)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def give_core(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert SHIPPED is not None
    shutil.copytree(SHIPPED, root / CORE_NAME)
    monkeypatch.setenv("KNOWLAB_ATLAS_DIR", str(root))
    return root / CORE_NAME


def test_a_model_starts_from_the_core_that_is_shipped(
    begun: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = give_core(tmp_path / "weights", monkeypatch)
    lines: list[str] = []
    train_atlas("atlas-oracle-b", tmp_path / "run", report=lines.append)
    (call,) = begun
    assert call["recipe"] == "atlas-oracle-b"
    expected = load_file(core / "model.safetensors")
    assert set(call["start"]) == set(expected)
    assert all(torch.equal(call["start"][name], value) for name, value in expected.items())
    assert (tmp_path / "run" / "tokenizer" / "tokenizer.json").is_file()
    assert any("shipped" in line for line in lines)


def test_a_core_that_is_named_comes_before_the_shipped_one(
    begun: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_core(tmp_path / "weights", monkeypatch)
    train_atlas("atlas-oracle-b", tmp_path / "run", core=tmp_path / "core", report=lambda line: None)
    # The named core is not finished, so it is trained first; the stand-in trains nothing and the run stops there.
    assert [call["recipe"] for call in begun] == [CORE_NAME]


def test_without_a_core_it_is_trained_first(
    begun: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNOWLAB_ATLAS_DIR", str(tmp_path / "empty"))
    assert core_path(CORE_NAME) is None
    train_atlas("atlas", tmp_path / "run", report=lambda line: None)
    assert [call["recipe"] for call in begun] == [CORE_NAME]


def test_the_core_is_no_model_to_choose() -> None:
    assert CORE_NAME not in MODEL_NAMES


def test_all_models_of_the_world_read_with_one_tokenizer() -> None:
    assert SHIPPED is not None
    expected = (SHIPPED / "tokenizer.json").read_text(encoding="utf-8")
    for name in MODEL_NAMES:
        assert world_tokenizer(get_recipe(name)).get_vocab() == json.loads(expected)["model"]["vocab"]
        folder = weights_path(name)
        assert folder is None or (folder / "tokenizer.json").read_text(encoding="utf-8") == expected
    core = core_path(CORE_NAME)
    assert core is None or (core / "tokenizer.json").read_text(encoding="utf-8") == expected


def test_another_number_of_tokens_is_another_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lab.atlas.runs._TOKENIZER_TEXTS", 200)
    recipe = get_recipe("atlas")
    fewer = replace(recipe, shape=replace(recipe.shape, vocab=400))
    assert len(world_tokenizer(fewer)) == 400
