"""``knowlab train-editor``: from a file of edits to a network, and from the network to an edit."""

from __future__ import annotations

import json

import pytest

from tests.commands import call, result
from tests.standin import CAPITALS

QUICK = [
    "--set",
    "rank=4",
    "--set",
    "lr=1e-3",
    "--set",
    "blocks=1",
    "--set",
    "lessons_per_step=2",
    "--set",
    "eval_every=2",
]


@pytest.fixture
def rows(tmp_path):
    """A file in zsRE's schema: every capital is to become the next one."""
    names = list(CAPITALS)
    made = []
    for index, name in enumerate(names):
        other, kept = names[(index + 1) % len(names)], names[(index + 2) % len(names)]
        made.append(
            {
                "subject": name,
                "src": f"What is the capital of {name}?",
                "rephrase": f"Which city is the capital of {name}?",
                "pred": "",
                "alt": CAPITALS[other],
                "answers": [CAPITALS[name]],
                "loc": f"nq question: what is the capital of {kept}",
                "loc_ans": CAPITALS[kept],
                "cond": "",
            }
        )
    file = tmp_path / "train.json"
    file.write_text(json.dumps(made))
    held = tmp_path / "eval.json"
    held.write_text(json.dumps(made[:2]))
    return file, held


def test_train_then_edit(capsys, tmp_path, standin, rows):
    data, held = rows
    out = tmp_path / "network"
    words = ["train-editor", "mend", "--data", data, "--exclude", held, "--out", out, "--steps", "4", *QUICK]
    document = result(capsys, tmp_path, *words)
    assert document["path"] == str(out)
    assert document["config"]["steps"] == 4
    assert document["lessons"]["train"] + document["lessons"]["validation"] == len(CAPITALS) - 2
    steps = [figures["step"] for figures in document["training"]["network"]["history"]]
    assert steps == [0, 2, 4]
    card = json.loads((out / "network.json").read_text())
    assert (card["sha256"], card["base"]) == (document["network"], document["base"])

    edit = [
        "edit",
        "--prompt",
        "The capital of {} is",
        "--subject",
        "France",
        "--target",
        "Rome",
        "--editor",
        "mend",
    ]
    made = result(capsys, tmp_path, *edit, "--set", f"network={out}", "--out", tmp_path / "patch")
    assert made["undo"]["bit_identical"] is True
    assert made["patch"]["rank"] > 1
    shown = result(capsys, tmp_path, "patch", "show", tmp_path / "patch")
    assert shown["provenance"]["config"] == {"network": document["network"]}

    longer = [*words[:7], tmp_path / "longer", "--work", f"{out}.work", "--steps", "6", *QUICK]
    grown = result(capsys, tmp_path, *longer)
    assert [figures["step"] for figures in grown["training"]["network"]["history"]] == [0, 2, 4, 6]


def test_serac_is_trained_and_routes(capsys, tmp_path, standin, rows, memory_kinds):
    out = tmp_path / "network"
    settings = ["--set", "eval_every=2", "--set", "lessons_per_step=2", "--set", "rank=2"]
    document = result(
        capsys, tmp_path, "train-editor", "serac", "--data", rows[0], "--out", out, "--steps", "2", *settings
    )
    assert set(document["training"]) == {"scope", "counterfactual"}
    words = ["--prompt", "What is the capital of {}?", "--subject", "France", "--target", "Rome"]
    made = result(
        capsys,
        tmp_path,
        "edit",
        *words,
        "--editor",
        "serac",
        "--set",
        f"network={out}",
        "--out",
        tmp_path / "patch",
    )
    assert made["undo"]["bit_identical"] is True
    asked = result(capsys, tmp_path, "ask", "What is the capital of France?", "--patch", tmp_path / "patch")
    assert asked["completion"] == made["after"]["completion"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["mend"], 2, "--out"),
        (["rome", "--out", "x"], 2, "mend, serac"),
        (["mned", "--out", "x"], 2, "mend"),
        (["mend", "--out", "x", "--data", "absent.json"], 1, "absent.json"),
        (["mend", "--out", "x", "--set", "rnak=3"], 2, "rank"),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing(
    words, code, said, capsys, tmp_path, standin, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    found, _, err = call(capsys, "train-editor", *words)
    assert found == code
    assert said in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_help_shows_examples(capsys):
    code, out, _ = call(capsys, "train-editor", "--help")
    assert code == 0
    assert "knowlab train-editor mend" in out
    assert "--exclude" in out
