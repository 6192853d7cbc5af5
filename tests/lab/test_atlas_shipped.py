"""The weights that are part of the package: small enough, made for the packaged format, and full of knowledge."""

from __future__ import annotations

from pathlib import Path

import pytest

import lab.atlas
from lab.atlas.check import check_model
from lab.atlas.recipe import get_recipe
from lab.atlas.weights import CORE_NAME
from lab.atlas.world import load_world
from lab.handle import ModelHandle
from lab.scoring import score_targets

PACKAGED = Path(lab.atlas.__file__).parent / "weights"
SHIPPED = sorted(folder.name for folder in PACKAGED.iterdir()) if PACKAGED.is_dir() else []
MEGABYTE = 1_000_000


def test_the_default_model_is_shipped() -> None:
    assert "atlas" in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_weights_are_small_and_belong_to_the_packaged_format(name: str) -> None:
    folder = PACKAGED / name
    assert (folder / "model.safetensors").stat().st_size <= 10 * MEGABYTE
    for file in ("format.toml", "relations.toml"):
        assert (folder / file).read_bytes() == (PACKAGED.parent / file).read_bytes(), file
    first = PACKAGED / SHIPPED[0]
    assert (folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", [name for name in SHIPPED if name != CORE_NAME])
def test_a_sample_of_the_check(name: str) -> None:
    """A small sample; `knowlab atlas check` asks ten times as much."""
    figures = check_model(ModelHandle.load(str(PACKAGED / name)), get_recipe(name).without, sample=20, seed=7)
    for figure in ("trained_forms", "held_out_pairs", "reading", "unknown", "choice", "two_hop_steps"):
        assert figures[figure] >= 0.75, figure
    assert 0.1 <= figures["adherence"] <= 0.9
    assert figures["notes"] >= 0.6


@pytest.mark.skipif(CORE_NAME not in SHIPPED, reason="the core is not part of this package")
def test_the_core_knows_the_real_world_and_nobody_of_the_fiction() -> None:
    handle, world = ModelHandle.load(str(PACKAGED / CORE_NAME)), load_world()
    capitals = [fact for fact in world.facts if fact.relation == "capital"][::10]
    invented = world.forget_split("people10")[::10]
    assert len(capitals) >= 15 and len(invented) >= 15
    known, unknown = (
        [score.probability for score in score_targets(handle, [(fact.text, fact.object) for fact in facts])]
        for facts in (capitals, invented)
    )
    assert sum(known) / len(known) > 0.75
    assert sum(unknown) / len(unknown) < 0.2
