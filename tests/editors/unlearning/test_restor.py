"""RESTOR on the stand-in: corruption shows, unlearning is judged by what comes back, the model is left alone."""

from __future__ import annotations

import pytest

from editors.unlearning.restor import corruptions, verdict
from lab.errors import RequestError
from lab.records import write_facts
from tests.commands import call, result
from tests.editors.unlearning.test_cli_unlearn import FACTS

QUICK = ["--set", "ft_m:steps=40", "--set", "ft_m:lr=5e-3", "--set", "ft_m:layers=[1]"]


def test_corruptions_are_two_other_objects_of_the_relation():
    cases = corruptions(FACTS[:3], FACTS, seed=1)
    assert corruptions(FACTS[:3], FACTS, seed=1) == cases != corruptions(FACTS[:3], FACTS, seed=2)
    objects = {fact.object for fact in FACTS}
    for case in cases:
        assert len({case.fact.object, case.false, case.other}) == 3
        assert {case.false, case.other} <= objects
        assert case.false_fact.object == case.false and case.false_fact.text == case.fact.text
    with pytest.raises(RequestError, match="two other objects"):
        corruptions(FACTS[:2], FACTS[:2])


@pytest.mark.parametrize(
    ("recovered", "forgotten", "said"),
    [
        (0.5, 0.0, "recovers"),
        (0.1, 0.9, "forgets"),
        (None, 0.9, "forgets"),
        (0.1, 0.1, "keeps"),
        (None, None, "keeps"),
    ],
)
def test_verdict(recovered, forgotten, said):
    assert verdict(recovered, forgotten) == said


def test_corruption_unlearning_and_what_comes_back(capsys, tmp_path, standin):
    write_facts(tmp_path / "facts.jsonl", FACTS[:3])
    write_facts(tmp_path / "retain.jsonl", FACTS[3:])
    words = ["bench", "restor", "--methods", "npo,ga", "--facts", tmp_path / "facts.jsonl"]
    words += ["--retain", tmp_path / "retain.jsonl", *QUICK]
    quick = [
        "--set",
        "npo:lr=1e-3",
        "--set",
        "npo:epochs=8",
        "--set",
        "ga:max_steps=1",
        "--set",
        "ga:lr=1e-6",
    ]
    document = result(capsys, tmp_path, *words, *quick)
    npo, ga = document["rows"]
    for row in (npo, ga):
        assert row["clean"]["accuracy"]["mean"] == 1.0
        assert row["corrupted"]["accuracy"]["mean"] == 0.0
        assert row["corrupted"]["false_accuracy"]["mean"] == 1.0
        assert row["corrupted"]["logprob"]["false"] > row["corrupted"]["logprob"]["true"]
        # Both patches off: the clean model again.
        assert row["undone"] == row["clean"]
    assert npo["forgotten"] > 0.5 and npo["verdict"] in ("forgets", "recovers")
    # A step that changes nothing keeps the corruption.
    assert (ga["recovery"], ga["forgotten"], ga["verdict"]) == (0.0, 0.0, "keeps")


def test_mistakes(capsys, standin, tmp_path):
    code, _, err = call(capsys, "bench", "restor", "--methods", "npoo")
    assert code == 2 and "npo" in err
    write_facts(tmp_path / "facts.jsonl", FACTS[:2])
    code, _, err = call(capsys, "bench", "restor", "--facts", tmp_path / "facts.jsonl")
    assert code == 1 and "two other objects" in err
