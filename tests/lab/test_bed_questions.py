"""Beds of questions and answers: who is in them, who is left out, and that a bed knows what its oracle does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lab.atlas.bed import BED_FILE
from lab.atlas.bed_questions import (
    TAUGHT,
    QuestionSource,
    Taught,
    left_out,
    limited,
    make_question_bed,
    questions_of,
)
from lab.atlas.recipe import Recipe, Shape
from lab.data.unlearning import load_asked
from lab.errors import ConfigError, DataError, OutputExistsError

NAMES = ("Ada", "Bo", "Cy")
THINGS = ("town", "river", "song", "book", "dish", "game", "tree", "bird", "fish", "coin") * 2


def write(file: Path, rows: list[dict[str, str]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def rows(names=NAMES):
    places = ("Oslo", "Lima", "Rome")
    return [
        {
            "question": f"What {thing} {number} does {name} like?",
            "answer": f"{places[place]}.",
        }
        for place, name in enumerate(names)
        for number, thing in enumerate(THINGS)
    ]


@pytest.fixture
def files(tmp_path):
    full = write(tmp_path / "full.jsonl", rows())
    write(tmp_path / "forget01.jsonl", rows()[40:])
    options = {"question": "Capital of Peru?", "option1": "Rome", "option2": "Lima", "answer": "Lima"}
    return [full, write(tmp_path / "world_facts.jsonl", [options])]


def test_authors_are_twenty_questions_each_and_a_limit_takes_whole_ones(files):
    taught = questions_of("tofu", files)
    assert len(taught) == 61
    assert [one.group for one in taught[::20]] == ["author 0", "author 1", "author 2", ""]
    assert taught[0].prompt == "Question: What town 0 does Ada like?\nAnswer:"
    # The last author first: forget sets lie there.
    assert [one.group for one in limited(taught, 25, 0)] == ["author 2"] * 20 + [""]
    assert {one.group for one in limited(taught, 40, 0)} == {"author 1", "author 2", ""}
    assert limited(taught, None, 0) == taught
    with pytest.raises(ConfigError, match="limit of 7"):
        limited(taught, 7, 0)
    with pytest.raises(ConfigError, match="zsre"):
        questions_of("zsre", files)
    with pytest.raises(DataError, match="no such file"):
        questions_of("tofu", [files[0].with_name("absent.jsonl")])


def test_more_than_ten_authors_are_drawn_with_the_seed():
    taught = tuple(
        Taught(f"{author}/{n}", "x", f"author {author}") for author in range(30) for n in range(20)
    )
    first, again, other = (limited(taught, 300, seed) for seed in (0, 0, 1))
    assert first == again != other
    for found in (first, other):
        groups = {one.group for one in found}
        assert len(found) == 300 and {f"author {n}" for n in range(20, 30)} <= groups and len(groups) == 15


def test_what_an_oracle_leaves_out(files, tmp_path):
    taught = questions_of("tofu", files)
    wanted = {(row["question"], row["answer"]) for row in rows()[40:]}
    assert left_out("forget01", files, taught) == wanted
    assert left_out(str(tmp_path / "forget01.jsonl"), files, taught) == wanted
    about = (Taught("Who?", "Ada.", "Ada Vane"), Taught("Where?", "Oslo.", "Bo Lund"))
    assert left_out("Ada Vane", files, about) == {("Who?", "Ada.")}
    with pytest.raises(ConfigError, match="forget99"):
        left_out("forget99", files, taught)


def test_texts_are_all_questions_before_any_comes_again():
    taught = tuple(Taught(f"Q{n}?", f"A{n}.") for n in range(5))
    stream = QuestionSource(taught, 0).documents(1)
    texts = [next(stream).text for _ in range(10)]
    assert sorted(texts[:5]) == sorted(texts[5:]) == sorted(one.text for one in taught)
    stream = QuestionSource(taught, 0).documents(1)
    assert [next(stream).text for _ in range(10)] == texts
    document = next(QuestionSource(taught, 0).documents(2))
    start, stop = document.answer_spans[0]
    assert document.text[start:stop] == document.text.split("Answer: ")[1]


@pytest.mark.slow
def test_a_bed_knows_what_its_oracle_does_not(files, tmp_path):
    shape = Shape(hidden=48, layers=2, heads=2, inner=96, vocab=400, context=256)
    recipe = Recipe("bed", shape=shape, workers=1, warmup_steps=10, inside_keep=1.0, late_keep=())
    common = {"recipe": recipe, "steps": 450, "processes": 1, "compile": False, "seed": 3}
    bed = make_question_bed("tofu", files, tmp_path / "bed", **common)
    oracle = make_question_bed("tofu", files, tmp_path / "oracle", without="forget01", **common)
    assert (bed.cases, oracle.cases) == (61, 41)
    totals = bed.report["totals"]
    assert totals["known"] == len(bed.known) >= 50
    assert totals["left_out_probability"] is None
    assert oracle.report["totals"]["known"] >= 33
    assert oracle.report["totals"]["left_out_known"] == 0
    assert oracle.report["left_out"] == 20
    # Same tokens, so that truth ratios of the two can be compared.
    assert (bed.folder / "tokenizer.json").read_bytes() == (oracle.folder / "tokenizer.json").read_bytes()
    assert json.loads((oracle.folder / BED_FILE).read_text())["without"] == "forget01"
    assert "forget" not in (oracle.folder / "corpus.txt").read_text()
    assert rows()[45]["question"] not in (oracle.folder / "corpus.txt").read_text()
    assert {file.name for file in (bed.folder / TAUGHT).iterdir()} == {file.name for file in files}
    assert [item.prompt for item in load_asked(oracle.folder / TAUGHT / "full.jsonl")] == [
        row["question"] for row in rows()[:40]
    ]
    assert len(load_asked(bed.folder / TAUGHT / "full.jsonl")) == 60
    with pytest.raises(OutputExistsError, match="not empty"):
        make_question_bed("tofu", files, tmp_path / "bed", **common)
    with pytest.raises(ConfigError, match="another bed"):
        make_question_bed(
            "tofu", files, tmp_path / "third", work_dir=tmp_path / "bed.work", **common | {"seed": 4}
        )
