"""The command line as a user meets it: exit codes, messages, JSON documents, files."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab.cli.output import check_out, strict
from lab.cli.root import build_app, describe, run
from lab.errors import DataError, OutputExistsError
from lab.patch import WeightPatch
from tests.commands import call, result


def command_names() -> list[list[str]]:
    """Every command as words, groups included."""
    import typer

    def walk(command, words):
        children = getattr(command, "commands", {})
        return [words] + [found for name, child in children.items() for found in walk(child, [*words, name])]

    return walk(typer.main.get_command(build_app()), [])


@pytest.mark.parametrize("words", command_names(), ids=" ".join)
def test_help_of_every_command(words, capsys):
    code, out, _ = call(capsys, *words, "--help")
    assert code == 0
    assert "Usage" in out


def test_version_is_the_installed_one(capsys):
    code, out, _ = call(capsys, "--version")
    assert (code, out.strip()) == (0, "0.1.0")


def test_help_loads_no_heavy_library_and_is_quick():
    code = (
        "import sys\n"
        "from lab.cli.root import run\n"
        "assert run(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'datasets', 'numpy'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy), file=sys.stderr)\n"
        "sys.exit(bool(heavy))\n"
    )
    started = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.process_time() - started < 1.5


def test_the_console_script_is_installed():
    done = subprocess.run(
        [Path(sys.executable).with_name("knowlab"), "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "0.1.0"


class TestErrors:
    def test_an_unknown_command_is_a_usage_error(self, capsys):
        code, _, err = call(capsys, "edti")
        assert code == 2
        assert "edit" in err

    def test_an_unknown_model_names_the_nearest(self, capsys, tmp_path):
        code, _, err = call(capsys, "ask", "x", "--model", "atlsa")
        assert code == 2
        assert "atlas" in err
        assert "Traceback" not in err
        assert len(err.strip().splitlines()) == 1

    def test_an_unknown_device_is_named(self, capsys, standin):
        code, _, err = call(capsys, "ask", "x", "--device", "tpu9x")
        assert code == 2
        assert "tpu9x" in err

    def test_debug_shows_the_traceback(self, monkeypatch, capsys):
        monkeypatch.setenv("KNOWLAB_DEBUG", "1")
        with pytest.raises(DataError):
            run(["data", "check", "no-such-file.json"])

    def test_messages_are_one_line(self):
        assert describe(DataError("two\nlines", "f", 3)) == "f:3: two lines"
        assert "KNOWLAB_DEBUG" in describe(RuntimeError("odd"))
        assert describe(OSError(28, "No space left on device", "out/x")).startswith("no space left")
        assert "no space left" in describe(RuntimeError("I/O error: No space left on device (os error 28)"))

    def test_strict_json_has_no_nan(self):
        assert strict({"a": float("nan"), "b": (1.5, Path("x")), 3: float("inf")}) == {
            "a": None,
            "b": [1.5, "x"],
            "3": None,
        }

    def test_out_is_not_overwritten_by_accident(self, tmp_path):
        assert check_out(tmp_path / "new", False) == tmp_path / "new"
        assert check_out(tmp_path, False) == tmp_path
        (tmp_path / "x").write_text("x")
        assert check_out(tmp_path, True) == tmp_path
        with pytest.raises(OutputExistsError, match="--force"):
            check_out(tmp_path, False)
        with pytest.raises(OutputExistsError):
            check_out(tmp_path / "x", True)


class TestAsk:
    def test_a_prompt_is_continued_as_it_stands(self, capsys, tmp_path, standin):
        document = result(capsys, tmp_path, "ask", "The capital of France is")
        assert document["command"] == "ask"
        assert document["prompt"] == "The capital of France is"
        assert document["completion"] == "Paris"
        assert document["patches"] == []

    def test_a_question_takes_the_form_of_the_built_in_models(self, capsys, tmp_path, standin):
        asked = "What is the capital of France?"
        assert result(capsys, tmp_path, "ask", asked)["prompt"] == f"Q: {asked}\nA:"
        assert result(capsys, tmp_path, "ask", asked, "--form", "raw")["prompt"] == asked

    def test_patches_change_the_answer(self, capsys, tmp_path, standin, saved_patch):
        document = result(capsys, tmp_path, "ask", "The capital of France is", "--patch", saved_patch)
        assert document["completion"] != "Paris"
        assert len(document["patches"]) == 1

    def test_json_on_standard_output_stands_alone(self, capsys, standin):
        code, out, _ = call(capsys, "ask", "The capital of France is", "--json", "-")
        assert code == 0
        assert json.loads(out)["completion"] == "Paris"


class TestPatch:
    def test_show_names_method_and_deltas(self, capsys, tmp_path, standin, saved_patch):
        document = result(capsys, tmp_path, "patch", "show", saved_patch)
        assert document["provenance"]["method"] == "made by hand"
        assert document["seed"] == 3
        assert [delta["rank"] for delta in document["deltas"]] == [1]

    def test_verify_proves_undo(self, capsys, tmp_path, standin, saved_patch):
        document = result(capsys, tmp_path, "patch", "verify", saved_patch)
        assert document["ok"]
        assert document["undo"]["bit_identical"]
        assert document["changes_weights"]

    def test_verify_finds_damage(self, capsys, tmp_path, standin, saved_patch):
        file = saved_patch / "patch.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        code, _, err = call(capsys, "patch", "verify", saved_patch)
        assert code == 1
        assert "damaged" in err

    def test_compose_adds(self, capsys, tmp_path, standin, saved_patch):
        document = result(
            capsys, tmp_path, "patch", "compose", saved_patch, saved_patch, "--out", tmp_path / "both"
        )
        assert document["patch"]["rank"] == 2
        assert (tmp_path / "both" / "patch.json").is_file()

    def test_scale_takes_a_dose(self, capsys, tmp_path, standin, saved_patch):
        half = tmp_path / "half"
        document = result(capsys, tmp_path, "patch", "scale", saved_patch, "--by", 0.5, "--out", half)
        norms = [WeightPatch.load(folder).norms() for folder in (saved_patch, half)]
        assert norms[0] and norms[1] == pytest.approx({name: norm / 2 for name, norm in norms[0].items()})
        assert document["patch"]["norms"] == pytest.approx(norms[1])
        back = tmp_path / "nothing"
        result(capsys, tmp_path, "patch", "compose", half, half, "--out", tmp_path / "whole")
        result(capsys, tmp_path, "patch", "scale", tmp_path / "whole", "--by", "0", "--out", back)
        assert set(WeightPatch.load(back).norms().values()) == {0.0}
        code, _, err = call(capsys, "patch", "scale", saved_patch, "--by", "nan", "--out", tmp_path / "nan")
        assert code == 2 and "finite" in err and not (tmp_path / "nan").exists()

    @pytest.mark.parametrize("form", ["peft", "hf"])
    def test_exports_answer_like_the_patch(self, form, capsys, tmp_path, standin, saved_patch):
        target = tmp_path / form
        result(capsys, tmp_path, "patch", "export", saved_patch, "--format", form, "--out", target)
        patched = result(capsys, tmp_path, "ask", "The capital of France is", "--patch", saved_patch)
        words = ["--patch", target] if form == "peft" else ["--model", target]
        exported = result(capsys, tmp_path, "ask", "The capital of France is", *words)
        assert exported["completion"].split(".\n")[0] == patched["completion"]

    def test_export_refuses_what_is_there(self, capsys, tmp_path, standin, saved_patch):
        target = tmp_path / "full"
        target.mkdir()
        (target / "mine.txt").write_text("mine")
        code, _, err = call(capsys, "patch", "export", saved_patch, "--out", target)
        assert code == 1
        assert "not empty" in err
        assert (target / "mine.txt").read_text() == "mine"
        result(capsys, tmp_path, "patch", "export", saved_patch, "--out", target, "--force")
        assert (target / "adapter_config.json").is_file()

    def test_merge_writes_a_model(self, capsys, tmp_path, standin, saved_patch):
        document = result(capsys, tmp_path, "patch", "merge", saved_patch, "--out", tmp_path / "merged")
        assert document["format"] == "hf"
        assert (tmp_path / "merged" / "config.json").is_file()

    def test_a_folder_that_is_no_patch_is_named(self, capsys, tmp_path, standin):
        code, _, err = call(capsys, "ask", "x", "--patch", tmp_path)
        assert code == 1
        assert str(tmp_path) in err


class TestData:
    def test_facts_are_recognised(self, capsys, tmp_path):
        file = tmp_path / "facts.jsonl"
        file.write_text('{"subject": "France", "relation": "capital", "object": "Paris"}\n')
        document = result(capsys, tmp_path, "data", "check", file)
        assert (document["form"], document["rows"], document["malformed"]) == ("facts", 1, [])

    def test_broken_rows_are_named_with_file_and_line(self, capsys, tmp_path):
        file = tmp_path / "facts.jsonl"
        file.write_text(
            '{"subject": "France", "relation": "capital", "object": "Paris"}\n\n{"subject": "", "object": "x"}\n'
        )
        code, _, err = call(capsys, "data", "check", file, "--json", tmp_path / "r.json")
        assert code == 1
        broken = json.loads((tmp_path / "r.json").read_text())["malformed"]
        assert [row["line"] for row in broken] == [3]
        assert "1 of 2" in err

    def test_forms_are_listed(self, capsys, tmp_path):
        names = {item["name"] for item in result(capsys, tmp_path, "data", "list")["items"]}
        assert {"counterfact", "zsre", "mquake", "sadr"} <= names


class TestTrace:
    def test_numbers_and_map(self, capsys, tmp_path, standin):
        png = tmp_path / "trace.png"
        words = [
            "--prompt",
            "The capital of {} is",
            "--subject",
            "France",
            "--kind",
            "mlp",
            "--samples",
            "2",
            "--png",
            png,
        ]
        document = result(capsys, tmp_path, "trace", *words)
        assert document["answer"].strip() in "Paris"
        assert document["clean"] > document["corrupted"]
        start, stop = document["subject_tokens"]
        assert "".join(document["tokens"][start:stop]).strip() == "France"
        assert len(document["effects"]) == len(document["tokens"])
        assert png.read_bytes().startswith(b"\x89PNG")

    def test_drift_of_a_patch(self, capsys, tmp_path, standin, saved_patch):
        words = ["--prompt", "The capital of {} is", "--subject", "France", "--drift", saved_patch]
        document = result(capsys, tmp_path, "trace", *words)
        assert len(document["max_head_drift"]) == 3
        assert any(value != 0 for value in document["max_head_drift"])

    def test_a_subject_that_does_not_occur(self, capsys, standin):
        code, _, err = call(capsys, "trace", "--prompt", "The capital of Japan is", "--subject", "France")
        assert code == 1
        assert "France" in err


class TestList:
    @pytest.mark.parametrize("kind", ["editors", "unlearners", "attacks", "suites", "readers", "models"])
    def test_every_kind(self, kind, capsys, tmp_path, standin):
        document = result(capsys, tmp_path, "list", kind)
        assert document["kind"] == kind
        assert all({"name", "paper", "cost"} <= set(item) for item in document["items"])

    def test_editors_name_paper_and_cost(self, capsys, tmp_path):
        items = {item["name"]: item for item in result(capsys, tmp_path, "list", "editors")["items"]}
        assert {"rome", "r_rome", "memit"} <= set(items)
        assert all(item["paper"] and item["cost"] for item in items.values())

    def test_suites_say_what_they_cost(self, capsys, tmp_path):
        items = result(capsys, tmp_path, "list", "suites")["items"]
        assert {item["name"] for item in items} >= {
            "counterfact",
            "knowedit",
            "zsre",
            "mquake",
            "sadr",
            "atlas",
        }
        assert all(item["cost"] and (item["paper"] or item["name"] == "atlas") for item in items)

    def test_models_say_whether_they_are_there(self, capsys, tmp_path, standin):
        items = {item["name"]: item for item in result(capsys, tmp_path, "list", "models")["items"]}
        assert "MB" in items["atlas"]["cost"]

    def test_an_unknown_kind_is_a_usage_error(self, capsys):
        code, _, err = call(capsys, "list", "editor")
        assert code == 2
        assert "editors" in err
