from __future__ import annotations

import json

import pytest

from editors.lessons import atlas_lessons, case_lessons, divide, load_lessons, without
from lab.atlas.world import load_world
from lab.data import load_cases
from lab.errors import DataError


def texts(lesson):
    return (lesson.request.text, *lesson.wordings, *(prompt for prompt, _ in lesson.locality))


def test_lessons_of_the_world_hold_no_fact_of_the_test_split():
    world = load_world()
    lessons = atlas_lessons(draws=2)
    assert lessons == atlas_lessons(draws=2)
    assert {lesson.request.id.split("#")[0] for lesson in lessons} == {fact.id for fact in world.split("dev")}
    asked = {text for lesson in lessons for text in texts(lesson)}
    assert not asked & {fact.text for fact in world.split("test")}
    assert not asked & {fact.text for fact in world.untrained}
    known = {fact.text: fact for fact in world.split("dev")}
    for lesson in lessons:
        fact = world.fact(lesson.request.id.split("#")[0])
        assert lesson.request.target_new not in fact.answers
        assert all(known[prompt].object == answer for prompt, answer in lesson.locality)
        assert all(fact.subject in text for text in lesson.wordings)
        assert fact.text not in lesson.wordings
    assert lessons != atlas_lessons(draws=2, seed=1)
    repeated = [lesson.request.target_new for lesson in lessons if lesson.request.id.startswith("capital/")]
    assert len(set(repeated)) > len(repeated) / 4


def row(subject, number):
    return {
        "subject": subject,
        "src": f"Where is {subject}?",
        "rephrase": f"In which place is {subject}?",
        "pred": "",
        "alt": "Rome",
        "answers": ["Paris"],
        "loc": f"nq question: who wrote book {number}",
        "loc_ans": "Marie Curie",
        "cond": "",
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.json"
    path.write_text(json.dumps([row("Lima", 1), row("Cairo", 2), row("Oslo", 3), row("lima ", 3)]))
    return path


def test_lessons_of_a_file(file):
    lessons = load_lessons(str(file))
    first = lessons[0]
    assert first.request.text == "Where is Lima?"
    assert first.request.target_new == "Rome"
    assert first.wordings == ("In which place is Lima?",)
    assert first.locality == (("who wrote book 1", "Marie Curie"),)
    assert first.statement == "Where is Lima? Rome"
    assert len(lessons) == 4


def test_what_an_evaluation_asks_is_left_out(file, tmp_path):
    held = tmp_path / "eval.json"
    held.write_text(json.dumps([row("LIMA", 2)]))
    lessons = load_lessons(str(file), exclude=[held])
    assert [lesson.request.subject for lesson in lessons] == ["Cairo", "Oslo"]
    assert lessons[0].locality == ()
    assert lessons[1].locality == (("who wrote book 3", "Marie Curie"),)
    with pytest.raises(DataError, match="no edit"):
        load_lessons(str(file), exclude=[file])
    assert without(case_lessons(load_cases(str(file)).cases), ()) == load_lessons(str(file))


def test_subjects_are_held_out_whole(file):
    lessons = load_lessons(str(file))
    for seed in range(6):
        divided = divide(lessons, seed=seed)
        train, held = ({each.subject for each in part} for part in (divided.train, divided.validation))
        assert train and held and not train & held
        assert len(divided.train) + len(divided.validation) == 4
    assert divide(lessons, seed=3) == divide(lessons, seed=3)
    assert len({divide(lessons, seed=seed).digest for seed in range(6)}) > 1
    assert len(divide(lessons, share=0.7, most=1).validation) == 1


def test_cases_with_several_edits_or_none_make_no_lesson(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row("Lima", 1), {**row("Oslo", 2), "alt": " "}]))
    assert len(load_lessons(str(path))) == 1


def test_the_public_training_rows(shared_data):
    folder = shared_data / "zsre"
    train, held = folder / "zsre_mend_train-1k.json", folder / "zsre_mend_eval_portability_gpt4.json"
    everything = load_lessons(str(train))
    lessons = load_lessons(str(train), exclude=[held])
    assert len(everything) > 900
    asked = {subject for case in load_cases(str(held)).cases for subject in case.subjects}
    assert not asked & {lesson.subject for lesson in lessons}
    assert all(lesson.wordings for lesson in lessons)
    assert sum(bool(lesson.locality) for lesson in lessons) > 0.9 * len(lessons)
