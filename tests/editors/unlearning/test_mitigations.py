"""Priming and its mitigations on the stand-in: what is put back, what is rewritten, and that the model is left alone."""

from __future__ import annotations

import math

import numpy as np
import pytest

from editors.unlearning.mitigations import (
    Mitigated,
    MitigationOptions,
    fall,
    measure_mitigations,
    mitigation_table,
)
from lab.audit.learning import Lesson
from lab.audit.side_effects.priming import Primed
from lab.cli.session import open_model
from lab.errors import ConfigError
from lab.records import Fact, write_facts
from tests.commands import call, result
from tests.editors.unlearning.test_cli_unlearn import FACTS

CAPITALS = [fact for fact in FACTS if fact.relation == FACTS[0].relation]
NEW = [Fact("Kenya", FACTS[0].relation, "piano", FACTS[0].prompt, id="new")]
ORDINARY = [f"{fact.text} {fact.object}." for fact in FACTS]


def test_each_mitigation_leaves_less_priming_behind_and_the_model_as_it_was(standin):
    handle = open_model("atlas")
    bits = handle.weights_digest()
    options = MitigationOptions(Lesson(steps=8, rate=3e-3), share=0.3, below=1.0)
    told = []
    (found,) = measure_mitigations(
        handle, NEW, CAPITALS, ORDINARY, options, progress=lambda *seen: told.append(seen)
    )
    assert handle.weights_digest() == bits
    assert told == [("texts", 1, 1)]
    plain, pruned = found.found["plain"], found.found["ignore_k"]
    assert plain.memorisation > 0 and plain.context[0] == pruned.context[0]
    assert found.priming("ignore_k") < found.priming("plain")
    # Every text may be rewritten at this threshold; the clause stands between the prompt and the keyword.
    assert found.rewritten is not None
    assert found.rewritten.startswith(NEW[0].text) and found.rewritten.endswith(" piano")
    assert len(found.rewritten) > len(f"{NEW[0].text} piano")
    assert found.found["stepping_stone"] != plain


def test_a_text_that_needs_no_stone_is_learned_as_it_is(standin):
    handle = open_model("atlas")
    options = MitigationOptions(Lesson(steps=2), below=1e-12)
    (found,) = measure_mitigations(handle, NEW, CAPITALS, ORDINARY, options)
    assert found.rewritten is None and found.found["stepping_stone"] == found.found["plain"]
    (same,) = measure_mitigations(
        handle, NEW, CAPITALS, ORDINARY, MitigationOptions(Lesson(steps=2), share=0.0)
    )
    assert same.found["ignore_k"] == same.found["plain"]


def test_no_related_beginning_is_an_error(standin):
    handle = open_model("atlas")
    with pytest.raises(ConfigError, match="others of their relations"):
        measure_mitigations(handle, NEW, NEW, ORDINARY)


def _made(plain: float, pruned: float) -> Mitigated:
    def primed(times: float) -> Primed:
        return Primed("x", (math.log(1e-4), math.log(0.9)), ((math.log(1e-3), math.log(1e-3 * times)),))

    return Mitigated(
        {"plain": primed(plain), "ignore_k": primed(pruned), "stepping_stone": primed(plain)}, None
    )


def test_the_fall_is_that_of_the_medians():
    results = [_made(10.0, 2.0), _made(20.0, 5.0), _made(40.0, 9.0)]
    found = fall(results, "ignore_k")
    assert found.mean == pytest.approx(1 - 5 / 20)
    assert found.low <= found.mean <= found.high and found.n == 3
    rows = {row["mitigation"]: row for row in mitigation_table(results)}
    assert rows["plain"]["fall"] is None and rows["plain"]["median_priming"] == pytest.approx(20)
    assert (
        rows["stepping_stone"]["fall"]["mean"] == pytest.approx(0)
        and rows["stepping_stone"]["rewritten"] == 0
    )
    assert rows["plain"]["probability"]["mean"] == pytest.approx(0.9)
    assert np.isclose(rows["ignore_k"]["log_priming"]["mean"], np.log([2, 5, 9]).mean())


def test_the_command(capsys, tmp_path, standin):
    write_facts(tmp_path / "facts.jsonl", CAPITALS[:3])
    write_facts(tmp_path / "known.jsonl", FACTS)
    words = ["bench", "priming", "--facts", tmp_path / "facts.jsonl", "--ordinary", tmp_path / "known.jsonl"]
    document = result(capsys, tmp_path, *words, "--steps", "2", "--limit", "2")
    assert [row["mitigation"] for row in document["rows"]] == ["plain", "ignore_k", "stepping_stone"]
    assert len(document["texts"]) == 2 and document["share"] == 0.08
    code, _, err = call(capsys, "bench", "priming", "--model", tmp_path, "--facts", tmp_path / "facts.jsonl")
    assert code != 0 and "--ordinary" in err
