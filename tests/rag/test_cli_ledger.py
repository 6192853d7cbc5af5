"""The commands over the ledger, from end to end on the built-in model."""

from __future__ import annotations

import json

from tests.commands import call, result


def test_change_look_and_take_back(atlas, capsys, tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("The capital of France is Paris.")
    fact = ["--subject", "France", "--relation", "capital"]
    place = ["--ledger", tmp_path / "ledger", "--documents", documents]
    code, out, _ = call(
        capsys,
        "ledger",
        "edit",
        *fact,
        "--target",
        "Rome",
        *place,
        "--on-conflict",
        "doc_wins",
        "--json",
        "-",
    )
    assert code == 1 and json.loads(out)["reason"].startswith("documents say otherwise")
    made = result(
        capsys, tmp_path, "ledger", "edit", *fact, "--target", "Rome", *place, "--editor", "rome_identity"
    )
    assert made["done"] and made["entry"] == 1 and made["conflicts"][0]["scorer"] == "match"
    shown = result(capsys, tmp_path, "ledger", "list", "--ledger", tmp_path / "ledger")
    assert [(one["new"], one["status"]) for one in shown["entries"]] == [("Rome", "active")]
    assert (tmp_path / "ledger" / "patches" / shown["entries"][0]["patch"] / "patch.safetensors").is_file()
    # The folder of documents holds what it held, so that a start over it has to hide the chunk again.
    code, out, _ = call(capsys, "ledger", "check", *place)
    assert code == 1 and "not as the ledger says" in out
    agreed = result(capsys, tmp_path, "ledger", "reconcile", *place, "--model", "atlas")
    assert len(agreed["repaired"]) == 1
    assert result(capsys, tmp_path, "ledger", "restore", *fact, *place)["entry"] == 2
    assert result(capsys, tmp_path, "ledger", "rollback", 2, *place)["entry"] == 2
    code, _, err = call(capsys, "ledger", "rollback", 7, *place)
    assert code == 1 and "no entry 7" in err
    forgotten = result(capsys, tmp_path, "ledger", "forget", *fact, *place, "--method", "none")
    assert forgotten["entry"] == 3 and forgotten["changed"]


def test_mistakes_are_named(atlas, capsys, tmp_path):
    code, _, err = call(capsys, "ledger", "list", "--ledger", tmp_path)
    assert code == 1 and "no ledger" in err
    words = ["--subject", "France", "--relation", "capital", "--target", "Rome", "--ledger", tmp_path]
    code, _, err = call(capsys, "ledger", "edit", *words, "--on-conflict", "loudest")
    assert code == 2 and "edit_wins" in err
    code, _, err = call(capsys, "serve", "--host", "0.0.0.0", "--ledger", tmp_path)
    assert code == 2 and "give a token" in err


def test_a_file_of_changes_and_what_a_question_then_hears(atlas, capsys, tmp_path):
    changes = tmp_path / "changes.jsonl"
    rows = [
        {"subject": "France", "relation": "capital", "object": "Rome"},
        {"op": "forget", "subject": "Japan", "relation": "capital"},
        {"op": "restore", "subject": "Japan", "relation": "capital"},
    ]
    changes.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = ["--ledger", tmp_path / "ledger"]
    words = ["--editor", "rome_identity", "--method", "none"]
    done = result(capsys, tmp_path, "ledger", "apply", changes, *place, *words)
    assert [(one["op"], one["done"]) for one in done["outcomes"]] == [
        ("edit", True), ("forget", True), ("restore", True)
    ]  # fmt: skip
    question = "What is the capital of France?"
    asked = ["rag", "ask", question, "-d", "The capital of France is Paris.", "--reader", "direct"]
    asked += ["--max-new-tokens", "4"]
    said = result(capsys, tmp_path, *asked, *place, "--policy", "ledger")
    assert said["answer"] == said["verdict"]["answer"] == "Rome"
    assert (said["verdict"]["winner"], said["verdict"]["policy"]) == ("ledger", "ledger")
    assert said["verdict"]["ledger"]["answer"] == "Rome"
    assert len(said["patches"]) == 1
    assert result(capsys, tmp_path, *asked)["patches"] == []
    result(capsys, tmp_path, "ledger", "forget", "--subject", "France", "--relation", "capital", *place,
           "--method", "none")  # fmt: skip
    hidden = result(capsys, tmp_path, *asked, *place)
    assert "paris" not in hidden["answer"].casefold() and hidden["verdict"]["context"] == []


def test_a_refused_change_stops_the_file_and_a_broken_line_is_named(atlas, capsys, tmp_path):
    changes, documents = tmp_path / "changes.jsonl", tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("The capital of France is Paris.")
    row = {"subject": "France", "relation": "capital", "object": "Rome"}
    changes.write_text(json.dumps(row) + "\n" + json.dumps({**row, "subject": "Japan"}) + "\n")
    words = ["ledger", "apply", changes, "--ledger", tmp_path / "l", "--editor", "rome_identity"]
    code, out, _ = call(capsys, *words, "--documents", documents, "--on-conflict", "doc_wins", "--json", "-")
    found = json.loads(out)
    assert code == 1 and [one["done"] for one in found["outcomes"]] == [False] and found["changes"] == 2
    for broken, part in (({**row, "op": "delete"}, "unknown op"), ({**row, "object": ""}, "'object'")):
        changes.write_text(json.dumps(row) + "\n" + json.dumps(broken) + "\n")
        code, _, err = call(capsys, *words, "--model", "no-such-model")
        assert code == 1 and part in err and "changes.jsonl" in err and "2" in err
