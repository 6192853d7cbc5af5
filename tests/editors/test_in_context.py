"""IKE and ICE: wording, demonstrations, the choice of a fact, and what fits into a context."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import lab.atlas.forms
from editors import get_editor
from editors.demonstrations import PoolCache, demonstrate, layout_for, retrieval_text
from editors.in_context import InContextFact, InContextMemory
from lab.atlas.forms import load_format
from lab.data.cases import CaseProbe, EditCase
from lab.errors import ConfigError
from lab.eval import SuiteOptions, atlas_cases, evaluate_editing, get_suite
from lab.memory import MemoryPatch
from lab.patch import Provenance
from lab.records import EditRequest
from tests.fakes import WordEmbedder
from tests.tiny import tiny_handle

FRANCE = EditRequest("france", "The capital of {} is", "France", "Rome")
OBAMA = EditRequest("obama", "{}'s wife is", "Barack Obama", "Marie Curie")


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """No sentence model is loaded."""
    monkeypatch.setattr("editors.in_context.Embedder", WordEmbedder)


@pytest.fixture
def native(tmp_path):
    """A handle on a model whose folder brings the packaged prompt format."""
    handle = tiny_handle("llama")
    home = Path(lab.atlas.forms.__file__).parent
    for name in ("format.toml", "relations.toml"):
        shutil.copy(home / name, tmp_path / name)
    handle.folder = tmp_path
    return handle


def case_of(number, subject, *, paraphrases=1, neighbours=1):
    request = EditRequest(f"case/{number}", "The capital of {} is", subject, f"New{number}", f"Old{number}")
    probes = [CaseProbe("paraphrase", f"{subject} has its capital in", (f"New{number}",))] * paraphrases
    probes += [CaseProbe("neighborhood", "The capital of Peru is", ("Lima",))] * neighbours
    return EditCase(request.id, "test", (request,), tuple(probes))


# -- wording ------------------------------------------------------------------------------------------------------


def test_the_plain_layout_is_the_papers():
    handle = tiny_handle("llama")
    patch = get_editor("ice").edit(handle, [FRANCE])
    with patch.applied(handle):
        assert handle.rewrite(["France has its capital in"]) == [
            "New Fact: The capital of France is Rome\nPrompt: France has its capital in"
        ]
    assert patch.provenance.extra["layout"] == "plain"
    layout = layout_for(handle)
    assert layout.demonstration("The capital of Peru is Oslo", "Peru's capital is ", " Oslo") == (
        "New Fact: The capital of Peru is Oslo\nPrompt: Peru's capital is Oslo\n\n"
    )


def test_models_with_a_format_of_their_own_get_documents(native):
    patch = get_editor("ike", k=0).edit(native, [FRANCE])
    asked = load_format().render("qa", question="What is the capital of France?").prompt
    with patch.applied(native):
        (found,) = native.rewrite([asked])
    document = "Document 1: The capital of France is Rome.\n"
    assert found == f"{document}The capital of France is Rome.\n{document}{asked}"
    question = load_format().render(
        "documents", documents=["The capital of France is Rome."], question="What is the capital of France?"
    )
    assert found.endswith(question.prompt)
    assert layout_for(native).demonstrations < layout_for(native, "plain").demonstrations == 32
    assert layout_for(tiny_handle("llama"), "documents").fact("A is B") == "Document 1: A is B.\n"
    with pytest.raises(ConfigError, match="plain"):
        layout_for(native, "plane")


# -- demonstrations -----------------------------------------------------------------------------------------------


def test_thirty_two_demonstrations_are_four_copies_twelve_updates_and_sixteen_retained():
    pool = PoolCache().get("atlas", 60, 0, WordEmbedder())
    (vector,) = WordEmbedder().encode([retrieval_text(FRANCE, answered=False)])
    found = demonstrate(FRANCE, pool, vector, layout_for(tiny_handle("llama")), 32, 0)
    assert Counter(each.kind for each in found) == {"copy": 4, "update": 12, "retain": 16}
    assert found == demonstrate(FRANCE, pool, vector, layout_for(tiny_handle("llama")), 32, 0)
    likeness = dict(zip([case.id for case in pool.cases], pool.vectors @ vector, strict=True))
    ranked = [float(likeness[each.case]) for each in found]
    assert ranked == sorted(ranked)
    assert min(ranked) >= sorted(map(float, likeness.values()))[-33]
    for each in found:
        (case,) = [case for case in pool.cases if case.id == each.case]
        (request,) = case.requests
        assert each.text.startswith(f"New Fact: {request.text} {request.target_new}\nPrompt: ")
        answer = each.text.rstrip("\n")
        assert answer.endswith(request.target_new) == (each.kind != "retain")


def test_cases_about_the_edited_subject_are_left_out_and_poor_cases_copy():
    cases = (case_of(0, "france"), case_of(1, "Japan", paraphrases=0, neighbours=0), case_of(2, "Kenya"))
    texts = [retrieval_text(case.requests[0], answered=True) for case in cases]
    pool = type(PoolCache().get("atlas", 1, 0, WordEmbedder()))(cases, WordEmbedder().encode(texts))
    found = demonstrate(FRANCE, pool, pool.vectors[0], layout_for(tiny_handle("llama")), 5, 1)
    assert {each.case for each in found} == {"case/1", "case/2"}
    assert {each.kind for each in found if each.case == "case/1"} == {"copy"}


def test_demonstrations_come_from_a_benchmark_file_and_are_read_once(tmp_path, monkeypatch):
    row = {
        "case_id": 7,
        "requested_rewrite": {
            "prompt": "The capital of {} is",
            "subject": "Japan",
            "target_new": {"str": "Lima"},
            "target_true": {"str": "Tokyo"},
            "relation_id": "P36",
        },
        "paraphrase_prompts": ["Japan is ruled from"],
        "neighborhood_prompts": ["The capital of Peru is"],
        "generation_prompts": ["Japan is"],
    }
    file = tmp_path / "counterfact.json"
    file.write_text(json.dumps([row]))
    handle = tiny_handle("llama")
    editor = get_editor("ike", demonstrations=str(file), k=1)
    patch = editor.edit(handle, [FRANCE])
    (fact,) = patch.memory.facts
    assert patch.provenance.extra["demonstrations"] == {
        "france": [{"case": "counterfact/7", "kind": "retain"}, {"case": "france", "kind": "copy"}]
    }
    assert fact.demonstrations == (
        "New Fact: The capital of Japan is Lima\nPrompt: The capital of Peru is Tokyo\n\n",
        "New Fact: The capital of France is Rome\nPrompt: The capital of France is Rome\n\n",
    )
    file.unlink()
    assert editor.edit(handle, [FRANCE]).id == patch.id


# -- which fact, and how much of it -------------------------------------------------------------------------------


def test_each_prompt_gets_the_nearest_fact_or_none_below_the_threshold():
    handle = tiny_handle("llama")
    with get_editor("ice").edit(handle, [FRANCE, OBAMA]).applied(handle):
        first, second, third = handle.rewrite(
            ["Barack Obama's wife is called", "The capital city of France is", "Toko Yasuda plays"]
        )
    assert first.startswith("New Fact: Barack Obama's wife is Marie Curie\n")
    assert second.startswith("New Fact: The capital of France is Rome\n")
    assert third.startswith("New Fact: ")
    with get_editor("ice", threshold=0.5).edit(handle, [FRANCE]).applied(handle):
        assert handle.rewrite(["Toko Yasuda plays"]) == ["Toko Yasuda plays"]
        assert handle.rewrite(["The capital of France is"])[0].startswith("New Fact: ")


def test_facts_of_several_patches_are_searched_together_and_the_later_word_counts():
    handle = tiny_handle("llama")
    again = EditRequest("again", FRANCE.prompt, FRANCE.subject, "Tokyo")
    editor = get_editor("ice")
    first, second, third = (editor.edit(handle, [request]) for request in (FRANCE, OBAMA, again))
    entries = [patch.apply(handle) for patch in (first, second, third)]
    assert handle.rewrite([FRANCE.text]) == [f"New Fact: {FRANCE.text} Tokyo\nPrompt: {FRANCE.text}"]
    entries[2].undo()
    assert handle.rewrite([FRANCE.text]) == [f"New Fact: {FRANCE.text} Rome\nPrompt: {FRANCE.text}"]
    entries[0].undo()
    assert handle.rewrite([FRANCE.text])[0].startswith("New Fact: Barack")


def test_far_demonstrations_go_first_where_the_context_is_short(caplog):
    handle = tiny_handle("llama")
    size = len(handle.tokenizer("far. ")["input_ids"])
    fact = InContextFact("a", "p", "Fact. ", ("far. ", "mid. ", "near. "))
    sizes = {text: len(handle.tokenizer(text)["input_ids"]) for text in ("mid. ", "near. ", "Fact. prompt")}

    def rewritten(room):
        memory = InContextMemory((fact,), reserve=handle.config.max_position_embeddings - room)
        with MemoryPatch(handle.fingerprint, memory, Provenance("test")).applied(handle):
            return handle.rewrite(["prompt"])[0]

    whole = size + sum(sizes.values())
    assert rewritten(whole) == "far. mid. near. Fact. prompt"
    assert rewritten(whole - 1) == "mid. near. Fact. prompt"
    assert rewritten(sizes["Fact. prompt"]) == "Fact. prompt"
    assert "does not fit" not in caplog.text
    assert rewritten(sizes["Fact. prompt"] - 1) == "prompt"
    assert "does not fit" in caplog.text


def test_suites_ask_through_the_memory():
    """What a suite measures under ICE is what it measures when the fact is written before each prompt by hand."""
    handle = tiny_handle("llama", scale=1.5)
    cases = atlas_cases(split="dev")
    suite = get_suite("atlas", SuiteOptions(fluency=False))
    state = handle.state
    report = evaluate_editing(suite, handle, get_editor("ice"), cases, limit=1, name="ice")
    assert handle.state == state
    (row,) = report.cases
    assert row.p_after != row.p_before
    (case,) = [case for case in cases if case.id == row.id]
    (request,) = case.requests
    from lab.scoring import score_targets

    fact = f"New Fact: {request.text} {request.target_new}\nPrompt: "
    by_hand = score_targets(handle, [(fact + request.text, request.target_new)])[0]
    assert row.p_after == pytest.approx(by_hand.probability, rel=1e-3)
    assert "neighborhood" in report.metrics
