"""Files of unlearning benchmarks in their published shapes, and what is said of broken rows."""

from __future__ import annotations

import json

import pytest

from lab.data import ASKED_FORMATS, load_asked
from lab.errors import DataError
from tests.commands import call, result

QUESTION = {"question": "Where does Ada Vane live?", "answer": "In Oslo."}
WRONG = ["In Rome.", "In Lima."]
# Form, file name, content, and of the first item: group, prompt, answers, and further attributes.
FILES = {
    "questions": ("full.jsonl", [QUESTION], ("qa", QUESTION["question"], ("In Oslo.",)), {}),
    "realworld": (
        "forget.jsonl",
        [QUESTION | {"name": "Ada Vane", "golden_answer": "Oslo", "task_id": 1}],
        ("qa", QUESTION["question"], ("In Oslo.", "Oslo")),
        {"subject": "Ada Vane"},
    ),
    "tofu_perturbed": (
        "forget01_perturbed.jsonl",
        [QUESTION | {"perturbed_answer": WRONG, "paraphrased_answer": "Oslo it is.", "paraphrased_question": "Home?"}],
        ("qa", QUESTION["question"], ("In Oslo.",)),
        {"wrong": tuple(WRONG), "paraphrased_answer": "Oslo it is.", "paraphrase": "Home?"},
    ),
    "tofu_options": (
        "world_facts.jsonl",
        [{"question": "Capital of Peru?", "option1": "Rome", "option2": "Lima", "answer": "Lima"}],
        ("qa", "Capital of Peru?", ("Lima",)),
        {"options": ("Rome", "Lima"), "wrong": ("Rome",)},
    ),
    "multiple_choice": (
        "hp-questions.json",
        [{"question": "Which owl?", "choices": ["Hedwig", "Fawkes"], "answer": 0}],
        ("choice", "Which owl?", ("Hedwig",)),
        {"wrong": ("Fawkes",)},
    ),
    "muse_verbmem": ("verbmem.json", [{"prompt": "It was", "gt": "late."}], ("continuation", "It was", ("late.",)), {}),
    "texts": ("privleak.json", ["A first text.", "A second."], ("text", "", ("A first text.",)), {}),
    "knowundo": ("unlearn.jsonl", [{"text": "Who?", "labels": "Ada."}], ("qa", "Who?", ("Ada.",)), {}),
    "lume": (
        "forget.jsonl",
        [{"id": '"8f2"sc1', "input": "Ada", "output": "slept.", "task": "Task1"}],
        ("continuation", "Ada", ("slept.",)),
        {"meta": {"task": "Task1", "document": "8f2", "id": '"8f2"sc1'}},
    ),
    "rwku_probe": (
        "forget_level3.jsonl",
        [{"query": "Hint?", "level": "3", "subject": "Ada", "answer": "Oslo", "type": "cross-lingual (French)"}],
        ("attack", "Hint?", ("Oslo",)),
        {"subject": "Ada", "meta": {"type": "cross lingual (French)", "neighbor": ""}},
    ),
    "rwku_target": (
        "intro.jsonl",
        [{"intro": "Please forget Ada.", "target": "Ada"}],
        ("target", "Please forget Ada.", ("Ada",)),
        {"subject": "Ada"},
    ),
    "rwku_reject": (
        "reject.jsonl",
        [{"intro": "Ada.", "instruction": "Who?", "input": "", "subject": "Ada", "output": "No idea."}],
        ("refusal", "Who?", ("No idea.",)),
        {},
    ),
    "rwku_truthful": (
        "truthful.jsonl",
        [{"question": "Q?", "subject": "x", "mc1_targets": {"choices": ["b", "a"], "labels": [0, 1]}}],
        ("choice", "Q?", ("a",)),
        {"wrong": ("b",), "subject": ""},
    ),
    "rwku_bbh": (
        "bbh.jsonl",
        [{"task": "t", "cot": "Worked.", "question": "Q?", "answer": "(B)", "subject": "x"}],
        ("qa", "Worked.\n\nQ: Q?\nA:", ("(B)",)),
        {"meta": {"task": "t"}},
    ),
    "rwku_mmlu": (
        "mmlu.jsonl",
        [{"examples": [], "task": "t", "choices": ["a", "b"], "subject": "x", "answer": 1, "question": " Q?"}],
        ("choice", "Q?", ("b",)),
        {"wrong": ("a",)},
    ),
    "rwku_triviaqa": (
        "trivia.jsonl",
        [{"subject": "x", "question": "Q?", "answers": ["A", "a", "A"]}],
        ("qa", "Q?", ("A", "a")),
        {"subject": ""},
    ),
    "rwku_mia": ("mia.jsonl", [{"ngram": 1, "subject": "Ada", "text": "Seen."}], ("text", "", ("Seen.",)), {"subject": "Ada"}),
    "rwku_fluency": ("fluency.jsonl", [{"instruction": "Write.", "subject": "x"}], ("instruction", "Write.", ()), {}),
    "conceptvectors": (
        "concepts.json",
        [
            {
                "Concept": "Oslo", "Layer": 2, "Dim": 7, "QA": [" Where?\n"], "unrelated_QA": [" Who?\n"],
                "text_completion": [{"First_half": "Oslo is", "Second_half": "north."}],
            }
        ],
        ("qa", "Where?", ()),
        {"subject": "Oslo", "meta": {"layer": "2", "dim": "7"}},
    ),
    "conceptvectors_relations": (
        "relations.json",
        [{"subject": "Golf", "relation": [["P279", "ball game"], ["P31", "Nan"]]}],
        ("relation", "", ("ball game",)),
        {"meta": {"property": "P279"}},
    ),
    "restor_facts": (
        "facts.json",
        {
            "dset": {"Ada": {"P21": {"question": "Sex of Ada?", "answers": ["female", "f"]}}, "Nobody": {}},
            "context": {"P21": [{"question": "Sex of Bo?", "answer": "male", "entity": "Bo"}]},
        },
        ("qa", "Sex of Ada?", ("female", "f")),
        {"subject": "Ada", "meta": {"property": "P21"}},
    ),
}  # fmt: skip
# Form, fields to break, and what is said.
BROKEN = [
    ("questions", {"answer": 7}, "field 'answer' must be a string"),
    ("questions", {"answer": " "}, "not blank"),
    ("tofu_perturbed", {"perturbed_answer": []}, "perturbed_answer"),
    ("tofu_options", {"answer": "Oslo"}, "one of the options"),
    ("multiple_choice", {"answer": 2}, "one of 2 choices"),
    ("rwku_probe", {"level": "4"}, "1, 2 or 3"),
    ("rwku_truthful", {"mc1_targets": {"choices": ["a"], "labels": [0]}}, "one of them 1"),
    ("lume", {"id": "doc7"}, "sc or qa"),
    ("conceptvectors", {"Dim": "7"}, "whole number"),
    ("conceptvectors_relations", {"relation": [["P1"]]}, "pairs"),
]


def write(folder, name, content):
    file = folder / name
    if file.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in content)
    elif isinstance(content, list):
        text = "[\n" + ",\n".join(json.dumps(row) for row in content) + "\n]\n"
    else:
        text = json.dumps(content, indent=0)
    file.write_text(text, encoding="utf-8")
    return file


def test_every_form_has_a_file_here():
    assert {form.name for form in ASKED_FORMATS} == set(FILES)


@pytest.mark.parametrize("form", FILES)
def test_forms_are_told_apart_and_read(form, tmp_path):
    name, content, (group, prompt, answers), more = FILES[form]
    found = load_asked(write(tmp_path, name, content))
    assert found.format == form
    assert found.malformed == ()
    first = found.items[0]
    assert (first.group, first.prompt, first.answers) == (group, prompt, answers)
    assert {key: getattr(first, key) for key in more} == more
    assert len({item.id for item in found}) == len(found)


@pytest.mark.parametrize(("form", "change", "said"), BROKEN)
def test_broken_rows_name_file_and_line(form, change, said, tmp_path):
    name, content, *_ = FILES[form]
    file = write(tmp_path, name, [content[0], content[0] | change])
    line = 2 if file.suffix == ".jsonl" else 3
    with pytest.raises(DataError, match=said) as caught:
        load_asked(file)
    assert (caught.value.file, caught.value.line) == (str(file), line)
    kept = load_asked(file, skip_malformed=True)
    assert [(skip.line, skip.file) for skip in kept.malformed] == [(line, str(file))]
    assert kept.rows == 2


def test_an_entity_of_restor_is_broken_on_its_own_line(tmp_path):
    content = {
        "dset": {"Ada": {"P1": {"question": "Q?", "answers": ["a"]}}, "Bo": {"P1": {"question": "Q?"}}},
        "context": {},
    }
    file = write(tmp_path, "facts.json", content)
    line = 1 + file.read_text().split("\n").index('"Bo": {')
    with pytest.raises(DataError, match="answers") as caught:
        load_asked(file)
    assert caught.value.line == line
    assert [item.subject for item in load_asked(file, skip_malformed=True)] == ["Ada"]


def test_concepts_and_restor_give_several_items(tmp_path):
    groups = [item.group for item in load_asked(write(tmp_path, *FILES["conceptvectors"][:2]))]
    assert groups == ["qa", "continuation", "unrelated"]
    items = load_asked(write(tmp_path, *FILES["restor_facts"][:2])).items
    assert [(item.group, item.subject) for item in items] == [("qa", "Ada"), ("example", "Bo")]


def test_a_file_of_no_form(tmp_path):
    with pytest.raises(
        DataError, match="no form of an unlearning benchmark; its records have the fields a, b"
    ):
        load_asked(write(tmp_path, "x.jsonl", [{"a": 1, "b": 2}]))


def test_the_command_knows_the_forms(capsys, tmp_path):
    good = write(tmp_path, *FILES["tofu_perturbed"][:2])
    document = result(capsys, tmp_path, "data", "check", good)
    assert (document["form"], document["rows"], document["malformed"]) == ("tofu_perturbed", 1, [])
    bad = write(tmp_path, "bad.jsonl", [QUESTION, {"question": "Q?", "answer": None}])
    code, _, err = call(capsys, "data", "check", bad)
    assert code == 1
    assert "1 of 2 rows break the form 'questions'" in err
    assert {item["name"] for item in result(capsys, tmp_path, "data", "list")["items"]} >= set(FILES)


@pytest.mark.parametrize(
    ("name", "form", "rows", "items"),
    [
        ("tofu/forget05_perturbed.jsonl", "tofu_perturbed", 200, 200),
        ("tofu/world_facts.jsonl", "tofu_options", 97, 97),
        ("muse/news_knowmem_forget_qa.jsonl", "questions", 75, 75),
        ("rwku/forget_level3.jsonl", "rwku_probe", 3491, 3491),
        ("restor/facts.json", "restor_facts", 477, 5291),
        ("conceptvectors/olmo-7b_concepts_dev.json", "conceptvectors", 14, 978),
        ("knowundo/privacy_full.jsonl", "knowundo", 939, 939),
        ("lume/forget_task1_task2.jsonl", "lume", 1710, 1710),
        ("hp_trivia/hp-questions.json", "multiple_choice", 1052, 1052),
    ],
)
def test_published_files_are_read_whole(shared_data, name, form, rows, items):
    found = load_asked(shared_data / name)
    assert (found.format, found.rows, len(found)) == (form, rows, items)
