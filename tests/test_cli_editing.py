"""The commands that edit and measure: exit codes, messages, JSON documents, files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import call, result
from tests.standin import CAPITALS

ONE_EDIT = ["--prompt", "The capital of {} is", "--subject", "France", "--target", "Rome"]


class TestEdit:
    def test_before_after_and_undo(self, capsys, tmp_path, standin):
        out = tmp_path / "patch"
        document = result(capsys, tmp_path, "edit", *ONE_EDIT, "--out", out)
        assert document["before"]["completion"] == "Paris"
        assert 0 < document["before"]["p_target"] < document["after"]["p_target"] <= 1
        assert document["undo"]["bit_identical"] is True
        assert document["patch"]["path"] == str(out)
        assert document["patch"]["rank"] == 1
        asked = result(capsys, tmp_path, "ask", "The capital of France is", "--patch", out)
        assert asked["completion"] == document["after"]["completion"]
        assert asked["patches"] == [{"id": document["patch"]["id"], "method": "rome"}]

    def test_p_target_is_exp_of_the_mean_log_probability(self, capsys, tmp_path, standin):
        import math

        import torch

        from lab.handle import ModelHandle
        from lab.tokens import join_target, pad_rows

        document = result(capsys, tmp_path, "edit", *ONE_EDIT[:-1], "Nairobi")
        handle = ModelHandle.load("atlas")
        head, tail = join_target(handle.tokenizer, "The capital of France is", "Nairobi")
        assert len(tail) > 1
        logits = handle.logits(pad_rows([head + tail], 0))[0].log_softmax(-1)
        steps = [float(logits[len(head) - 1 + index, token]) for index, token in enumerate(tail)]
        assert document["before"]["p_target"] == pytest.approx(math.exp(sum(steps) / len(steps)), rel=1e-4)
        assert torch.is_grad_enabled()

    def test_a_filled_prompt_is_understood(self, capsys, tmp_path, standin):
        words = ["--prompt", "The capital of France is", "--subject", "France", "--target", "Rome"]
        document = result(capsys, tmp_path, "edit", *words)
        assert document["items"][0]["prompt"] == "The capital of {} is"
        assert document["after"]["p_target"] > document["before"]["p_target"]
        assert document["patch"]["path"] is None

    def test_a_file_of_requests_makes_one_patch(self, capsys, tmp_path, standin):
        file = tmp_path / "facts.jsonl"
        rows = [("France", "Rome"), ("Japan", "Lima")]
        template = "The capital of {} is"
        lines = [
            json.dumps(
                {
                    "id": subject,
                    "subject": subject,
                    "relation": "capital",
                    "object": target,
                    "prompt": template,
                }
            )
            for subject, target in rows
        ]
        file.write_text("\n".join(lines))
        document = result(
            capsys, tmp_path, "edit", "--editor", "memit", "--requests", file, "--out", tmp_path / "batch"
        )
        assert document["before"]["completion"] == ["Paris", "Tokyo"]
        assert [item["target_new"] for item in document["items"]] == ["Rome", "Lima"]
        assert document["after"]["p_target"] > document["before"]["p_target"]
        assert document["undo"]["bit_identical"]

    @pytest.mark.parametrize(
        ("editor", "kind", "settings"),
        [
            ("grace", "grace", ["--set", "steps=20", "--set", "layers=[1]"]),
            (
                "wise",
                "wise",
                ["--set", "steps=10", "--set", "layers=[1]", "--set", "prefix_lengths=[[2, 1]]"],
            ),
            ("ice", "in_context", []),
        ],
    )
    def test_memories_are_made_asked_shown_and_verified(
        self, editor, kind, settings, capsys, tmp_path, standin
    ):
        out = tmp_path / "patch"
        document = result(capsys, tmp_path, "edit", *ONE_EDIT, "--editor", editor, *settings, "--out", out)
        assert document["before"]["completion"] == "Paris"
        assert document["before"]["p_target"] != document["after"]["p_target"]
        assert document["undo"]["bit_identical"] is True
        assert document["patch"] == {"path": str(out), "id": document["patch"]["id"], "kind": kind}
        asked = result(capsys, tmp_path, "ask", "The capital of France is", "--patch", out)
        assert asked["completion"].startswith(document["after"]["completion"])
        assert asked["patches"] == [{"id": document["patch"]["id"], "method": editor}]
        shown = result(capsys, tmp_path, "patch", "show", out)
        assert (shown["id"], shown["kind"]) == (document["patch"]["id"], kind)
        assert shown["provenance"]["requests"][0]["subject"] == "France"
        proof = result(capsys, tmp_path, "patch", "verify", out)
        assert (proof["ok"], proof["changes_weights"]) == (True, False)
        assert proof["undo"]["bit_identical"] is True
        for words in (["export", out], ["merge", out]):
            code, _, err = call(capsys, "patch", *words, "--out", tmp_path / "other")
            assert code == 1
            assert "weights" in err

    def test_settings_reach_the_method(self, capsys, tmp_path, standin):
        out = tmp_path / "patch"
        result(
            capsys,
            tmp_path,
            "edit",
            *ONE_EDIT,
            "--editor",
            "rome+sadr",
            "--set",
            "steps=3",
            "--set",
            "gamma=0.5",
            "--out",
            out,
        )
        config = result(capsys, tmp_path, "patch", "show", out)["provenance"]["config"]
        assert config["steps"] == 3
        assert config["sadr"]["gamma"] == 0.5

    @pytest.mark.parametrize(
        ("words", "code", "named"),
        [
            (["--prompt", "The capital of Japan is", "--subject", "France", "--target", "Rome"], 1, "France"),
            ([*ONE_EDIT[:-1], "  "], 1, "empty"),
            ([*ONE_EDIT, "--editor", "roem"], 2, "rome"),
            ([*ONE_EDIT, "--editor", "rome+sdr"], 2, "sadr"),
            ([*ONE_EDIT, "--set", "stpes=3"], 2, "steps"),
            ([*ONE_EDIT, "--set", "steps"], 2, "name=value"),
            (ONE_EDIT[:4], 2, "--target"),
            ([*ONE_EDIT, "--requests", "x.jsonl"], 2, "--requests"),
            (["--requests", "absent.jsonl"], 1, "absent.jsonl"),
        ],
        ids=["subject", "target", "editor", "penalty", "setting", "word", "missing", "both", "file"],
    )
    def test_mistakes_are_one_clear_line_and_leave_nothing(
        self, words, code, named, capsys, tmp_path, standin
    ):
        out = tmp_path / "patch"
        found, _, err = call(capsys, "edit", *words, "--out", out)
        assert found == code
        assert named in err
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
        assert not out.exists()

    def test_nan_in_the_search_is_an_error(self, capsys, tmp_path, standin):
        out = tmp_path / "patch"
        code, _, err = call(capsys, "edit", *ONE_EDIT, "--set", "lr=inf", "--out", out)
        assert code in (1, 2)
        assert "Traceback" not in err
        assert not out.exists()

    def test_a_full_out_folder_is_refused_before_any_work(self, capsys, tmp_path, standin):
        out = tmp_path / "patch"
        out.mkdir()
        (out / "mine").write_text("mine")
        code, _, err = call(capsys, "edit", *ONE_EDIT, "--out", out)
        assert code == 1
        assert "--force" in err
        assert (out / "mine").read_text() == "mine"

    def test_a_full_disk_leaves_nothing_half_written(self, tmp_path, standin):
        """A limit on the size of files stands for the full disk: the write of the factors breaks off in the middle."""
        out = tmp_path / "patches" / "patch"
        out.parent.mkdir()
        code = (
            "import resource, sys\n"
            "from lab.cli.root import run\n"
            "import editors.base\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))\n"
            "sys.exit(run(sys.argv[1:]))\n"
        )
        words = [
            sys.executable,
            "-c",
            code,
            "edit",
            *ONE_EDIT,
            "--editor",
            "rome_identity",
            "--out",
            str(out),
        ]
        done = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert list(out.parent.iterdir()) == []


def counterfact_row(number: int, country: str, target: str) -> dict:
    """One record in CounterFact's own schema, about what the stand-in knows."""
    true = CAPITALS[country]
    others = [name for name in CAPITALS if name != country][:2]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "relation_id": "P36",
            "target_new": {"str": target, "id": "Q1"},
            "target_true": {"str": true, "id": "Q2"},
            "subject": country,
        },
        "paraphrase_prompts": [f"{country} has its capital in"],
        "neighborhood_prompts": [f"The capital of {name} is" for name in others],
        "attribute_prompts": [],
        "generation_prompts": [f"{country} has its capital in"],
    }


def counterfact_file(tmp_path: Path, rows: list[dict]) -> Path:
    file = tmp_path / "counterfact.json"
    file.write_text("[" + ",\n".join(json.dumps(row) for row in rows) + "]", encoding="utf-8")
    return file


ROWS = [
    counterfact_row(1, "France", "Rome"),
    counterfact_row(2, "Kenya", "Lima"),
    counterfact_row(3, "Peru", "Tokyo"),
]
QUICK = ["--editor", "rome_identity", "--set", "steps=3", "--no-fluency"]


class TestEval:
    def test_document_and_reports(self, capsys, tmp_path, standin):
        file = counterfact_file(tmp_path, ROWS)
        out = tmp_path / "out"
        words = ["--data", file, *QUICK, "--limit", "2", "--seed", "5", "--out", out]
        document = result(capsys, tmp_path, "eval", "counterfact", *words)
        assert (document["command"], document["seed"], document["suite"]) == ("eval", 5, "counterfact")
        assert (document["editor"], document["model"], document["n"], document["known"]) == (
            "rome_identity",
            "atlas",
            2,
            2,
        )
        assert {"efficacy", "paraphrase", "neighborhood", "score"} <= set(document["metrics"])
        assert set(document["metrics"]) == set(document["before"])
        for table in (document["metrics"], document["before"]):
            for metric in table.values():
                assert set(metric) == {"mean", "low", "high", "n"}
        assert document["before"]["efficacy"]["mean"] == 0
        assert document["skipped"] == []
        assert document["seconds"] > 0
        assert {path.suffix for path in out.iterdir()} == {".json", ".html", ".md", ".csv", ".tex"}

    def test_a_broken_row_stops_the_run_with_file_and_line(self, capsys, tmp_path, standin):
        broken = {key: value for key, value in ROWS[1].items() if key != "neighborhood_prompts"} | {
            "paraphrase_prompts": 7
        }
        file = counterfact_file(tmp_path, [ROWS[0], broken, ROWS[2]])
        code, _, err = call(
            capsys, "eval", "counterfact", "--data", file, *QUICK, "--json", tmp_path / "r.json"
        )
        assert code == 1
        assert f"{file}:2:" in err
        assert not (tmp_path / "r.json").exists()

    def test_broken_rows_can_be_reported_instead_and_too_many_fail_the_run(self, capsys, tmp_path, standin):
        broken = {key: value for key, value in ROWS[1].items() if key != "neighborhood_prompts"} | {
            "paraphrase_prompts": 7
        }
        file = counterfact_file(tmp_path, [ROWS[0], broken, ROWS[2]])
        target = tmp_path / "r.json"
        code, _, err = call(
            capsys, "eval", "counterfact", "--data", file, *QUICK, "--skip-malformed", "--json", target
        )
        document = json.loads(target.read_text())
        assert code == 3
        assert "5 %" in err
        assert document["n"] == 2
        assert [(row["file"], row["line"]) for row in document["skipped"]] == [(str(file), 2)]
        assert document["skipped"][0]["reason"]

    def test_only_known_cases_when_asked(self, capsys, tmp_path, standin):
        unknown = counterfact_row(9, "Spain", "Rome")
        unknown["requested_rewrite"]["target_true"]["str"] = "Lima"
        file = counterfact_file(tmp_path, [*ROWS, unknown])
        every = result(capsys, tmp_path, "eval", "counterfact", "--data", file, *QUICK)
        known = result(capsys, tmp_path, "eval", "counterfact", "--data", file, *QUICK, "--known-only")
        assert (every["n"], every["known"]) == (4, 3)
        assert (known["n"], known["known"]) == (3, 3)

    def test_a_model_as_it_is(self, capsys, tmp_path, standin):
        file = counterfact_file(tmp_path, ROWS)
        document = result(capsys, tmp_path, "eval", "counterfact", "--data", file, "--no-fluency")
        assert document["editor"] == ""
        assert document["metrics"]["efficacy"]["mean"] == 0

    @pytest.mark.parametrize(
        ("words", "code", "named"),
        [
            (["contrafact"], 2, "counterfact"),
            (["zsre", "--editor", "rome"], 2, "--data"),
            (["atlas", "--data", "x.json"], 2, "--split"),
            (["counterfact", "--data", "absent.json"], 1, "absent.json"),
            (["counterfact", "--data", "absent.json", "--set", "steps=3"], 2, "--editor"),
        ],
        ids=["suite", "no data", "data", "absent", "settings"],
    )
    def test_mistakes(self, words, code, named, capsys, standin):
        found, _, err = call(capsys, "eval", *words)
        assert found == code
        assert named in err
        assert len(err.strip().splitlines()) == 1


class TestDemo:
    def test_shows_and_proves(self, capsys, tmp_path, standin):
        out = tmp_path / "demo"
        words = ["--limit", "2", "--editor", "rome_identity", "--editor", "rome_identity+sadr", "--out", out]
        document = result(capsys, tmp_path, "demo", *words)
        assert document["n"] == 2
        assert set(document["editors"]) == {"rome_identity", "rome_identity+sadr"}
        for found in document["editors"].values():
            assert found["undo"]["bit_identical"] is True
            assert len(found["attention_drift"]["max_head_drift"]) == 3
            assert found["metrics"]["efficacy"]["n"] == 2
        kinds = [line["kind"] for line in document["completions"]]
        assert set(kinds) == {"prompt", "paraphrase", "neighbor", "distracted neighbor"}
        assert all(set(line["after"]) == set(document["editors"]) for line in document["completions"])
        page = (out / "demo.html").read_text(encoding="utf-8")
        assert page.count("data:image/png;base64,") >= 3
        assert "http" not in re.sub(r"base64,[^\"]*", "", page).replace("http-equiv", "")
        assert all(edit["id"] in page for edit in document["edits"])
        code, _, err = call(capsys, "demo", "--out", out)
        assert code == 1
        assert "--force" in err


class TestAtlas:
    def test_the_data_set_is_written_byte_for_byte(self, capsys, tmp_path):
        document = result(capsys, tmp_path, "atlas", "export", "--out", tmp_path / "atlas")
        assert document["facts"] >= 1500
        for file in (tmp_path / "atlas").iterdir():
            assert (
                file.read_bytes()
                == (Path(__file__).parents[1] / "datasets" / "atlas" / file.name).read_bytes()
            )

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            (["train", "atlsa"], "atlas"),
            (["train", "--from", "counterfact"], "--data"),
            (["train", "--from", "counterfact", "--data", "x.json"], "--out"),
            (["train", "atlas", "--limit", "3"], "--from"),
            (["export"], "--out"),
            (["check", "atlsa"], "atlas"),
            (["check", "--folder", "x"], "exactly one"),
        ],
    )
    def test_mistakes(self, words, named, capsys, standin):
        code, _, err = call(capsys, "atlas", *words)
        assert code == 2
        assert named in err
