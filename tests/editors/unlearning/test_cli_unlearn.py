"""``knowlab unlearn`` on the stand-in for the shipped models."""

from __future__ import annotations

import shutil

import pytest

from editors.unlearning.material import gather, oracle_name
from lab.atlas.world import load_world
from lab.errors import UnknownNameError
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.standin import CAPITALS

FACTS = [
    Fact(country, "capital", city, "The capital of {} is", id=f"capital/{country}")
    for country, city in CAPITALS.items()
]
GROUPS = {"forget", "retain", "neighbor", "utility"}


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{name}.jsonl" for name in ("forget", "retain", "utility")]
    for path, facts in zip(paths, (FACTS[:2], FACTS[2:7], FACTS[7:]), strict=True):
        write_facts(path, facts)
    return paths


def test_facts_are_lost_and_others_stay(capsys, tmp_path, standin, files):
    forget, retain, utility = files
    out = tmp_path / "patch"
    words = ["--forget", forget, "--retain", retain, "--utility", utility, "--out", out]
    quick = ["--set", "lr=1e-3", "--set", "epochs=8"]
    document = result(capsys, tmp_path, "unlearn", "--method", "npo", *words, *quick)
    assert set(document["forget"]) == {"before", "after", "oracle"}
    assert document["forget"]["before"]["accuracy"] == 1.0
    assert document["forget"]["after"]["probability"] < 0.3 < document["forget"]["before"]["probability"]
    assert document["retain"]["after"]["probability"] > 0.7
    for group in GROUPS:
        assert document[group]["oracle"] is None
        assert 0 <= document[group]["after"]["probability"] <= 1
    assert document["facts"] == {
        "trained_to_keep": 3, "forget": 2, "retain": 3, "neighbor": 2, "utility": 1
    }  # fmt: skip
    assert document["seconds"] > 0 and document["peak_mb"] > 0
    assert document["undo"]["bit_identical"] is True
    shown = result(capsys, tmp_path, "patch", "show", out)
    assert shown["provenance"]["method"] == "npo"
    assert [request["id"] for request in shown["provenance"]["requests"]] == [f.id for f in FACTS[:2]]
    assert document["patch"]["path"] == str(out)


def test_a_split_of_the_world_is_compared_with_the_oracle_where_there_is_one(
    capsys, tmp_path, standin_folder, monkeypatch
):
    folder = tmp_path / "models"
    for name in ("atlas", "atlas-oracle"):
        shutil.copytree(standin_folder / "atlas", folder / name)
    monkeypatch.setenv("KNOWLAB_ATLAS_DIR", str(folder))
    words = ["unlearn", "--method", "ga", "--limit", "3", "--set", "max_steps=1", "--set", "stop_above=9"]
    document = result(capsys, tmp_path, *words, "--forget", "atlas:people01")
    assert document["forget"]["oracle"] is None
    assert document["updates"] == 1
    assert document["forget"]["after"]["nll"] > document["forget"]["before"]["nll"]
    assert oracle_name("atlas", "atlas:people05") == "atlas-oracle"
    document = result(capsys, tmp_path, *words, "--forget", "atlas:people05")
    for group in GROUPS:
        # The oracle is the same stand-in here.
        assert document[group]["oracle"] == pytest.approx(document[group]["before"])
        assert group == "forget" or document["facts"][group] == 3


def test_an_oracle_can_be_named(capsys, tmp_path, standin, files):
    words = ["unlearn", "--method", "ga", "--set", "max_steps=1", "--forget", files[0], "--retain", files[1]]
    document = result(capsys, tmp_path, *words, "--oracle", standin / "atlas")
    # The oracle is the same stand-in here.
    assert document["forget"]["oracle"] == pytest.approx(document["forget"]["before"])
    assert document["neighbor"]["oracle"] == pytest.approx(document["neighbor"]["before"])


def test_no_oracle_without_its_weights_or_for_another_model(standin):
    assert oracle_name("atlas", "atlas:people05") is None
    assert oracle_name("some/model", "atlas:people05") is None


def test_groups_share_no_fact_and_asked_ones_are_not_trained():
    material = gather("atlas:people05", limit=50, seed=1)
    world = load_world()
    assert material.forget == world.forget_split("people05")
    groups = [set(group) for group in (material.forget, material.kept, material.neighbor, material.utility)]
    assert sum(map(len, groups)) == len(set().union(*groups)) == len(world.facts)
    assert set(material.retain) <= groups[1]
    assert [len(group) for group in (material.retain, material.neighbor, material.utility)] == [50] * 3
    relations = {fact.relation for fact in material.forget}
    assert all(fact.relation in relations for fact in material.neighbor)
    assert all(world.entity(fact.subject).real for fact in material.utility)
    assert gather("atlas:people05", limit=50, seed=1) == material
    assert gather("atlas:people05", limit=50, seed=2) != material
    with pytest.raises(UnknownNameError, match="people05"):
        gather("atlas:people06")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--forget", "absent.jsonl"], 1, "absent.jsonl"),
        (["--forget", "atlas:people06"], 2, "people05"),
        (["--forget", "FILE", "--method", "npoo"], 2, "npo"),
        (["--forget", "FILE", "--set", "epoch=3"], 2, "epochs"),
        (["--forget", "FILE", "--method", "graddiff"], 1, "retained"),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing(words, code, said, capsys, tmp_path, standin, files):
    words = [files[0] if word == "FILE" else word for word in words]
    found, _, err = call(capsys, "unlearn", *words, "--out", tmp_path / "x")
    assert found == code
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_help_shows_examples(capsys):
    code, out, _ = call(capsys, "unlearn", "--help")
    assert code == 0
    assert "atlas:people05" in out
    assert "--retain" in out
