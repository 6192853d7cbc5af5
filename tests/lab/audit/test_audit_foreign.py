"""Models and files of others: a Hugging Face folder through the black-box attacks, benchmark files as facts."""

from __future__ import annotations

import json

from lab.audit.material import gather
from lab.audit.registry import ATTACKS
from lab.records import Fact, write_facts
from tests.commands import result
from tests.standin import CAPITALS
from tests.tiny import tiny_model, tiny_tokenizer

FACTS = tuple(
    Fact(place, relation, city, f"The {relation} of {{}} is", id=f"{relation}/{place}", group="place")
    for place, city in CAPITALS.items()
    for relation in ("capital", "heart")
)


def concept(name: str, *ends: str) -> dict:
    return {
        "Concept": name,
        "Layer": 1,
        "Dim": 3,
        "QA": [f"What is {name}?"],
        "text_completion": [{"First_half": f"{name} is known for", "Second_half": end} for end in ends],
        "unrelated_QA": ["What is Rome?"],
    }


def test_a_hugging_face_folder_goes_through_every_black_box_attack(tmp_path, capsys) -> None:
    folder = tmp_path / "someones-gpt2"
    tiny_model("gpt2", layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    write_facts(tmp_path / "facts.jsonl", FACTS[:6])
    write_facts(tmp_path / "kept.jsonl", FACTS[6:])
    names = [name for name in ATTACKS.names() if ATTACKS.get(name).access == "black-box"]
    words = ["--facts", tmp_path / "facts.jsonl", "--retain", tmp_path / "kept.jsonl"]
    found = result(capsys, tmp_path, "audit", "--model", folder, *words, "--attacks", ",".join(names))
    applied = {row["name"] for row in found["attacks"] if row["applicable"]}
    assert {"forms", "in_context", "step_by_step", "sampling"} <= applied
    assert 0.0 <= found["worst_case"] <= 1.0
    assert found["settings"]["controls"] == ["never"]


def test_texts_of_concept_vectors_are_facts_with_exchanged_ends(tmp_path, standin, capsys) -> None:
    file = tmp_path / "concepts.json"
    file.write_text(
        json.dumps([concept("France", "Paris", "cheese"), concept("Japan", "Tokyo")]), encoding="utf-8"
    )
    material = gather(str(file))
    assert [(fact.text, fact.object) for fact in material.facts] == [
        ("France is known for", "Paris"),
        ("France is known for", "cheese"),
        ("Japan is known for", "Tokyo"),
    ]
    assert len(material.never) == 3
    found = result(capsys, tmp_path, "audit", "--facts", file, "--attacks", "forms,quantize")
    assert [row["applicable"] for row in found["attacks"]] == [True, True]
    assert len(found["attacks"][1]["per_fact"]) == 3


def test_questions_of_tofu_are_facts(tmp_path) -> None:
    file = tmp_path / "forget.jsonl"
    rows = [{"question": f"Who is {name}?", "answer": f"{name} writes."} for name in ("Ada", "Bo")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    material = gather(str(file))
    assert [fact.object for fact in material.facts] == ["Ada writes.", "Bo writes."]
    assert [fact.object for fact in material.never] == ["Bo writes.", "Ada writes."]
