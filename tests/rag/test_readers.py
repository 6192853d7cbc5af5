"""Readers with the built-in model, and the prompts of models without a format."""

from __future__ import annotations

import copy

import pytest

from lab.atlas.forms import load_format
from lab.atlas.world import load_world
from lab.data.text import normalize_answer
from lab.errors import RequestError, UnknownNameError
from lab.handle import ModelHandle
from lab.records import Passage
from lab.tokens import encode_ids
from rag.decoding import get_rule
from rag.evaluation import atlas_questions
from rag.notes import ReadingNote
from rag.prompts import FormatPrompts, PlainPrompts, prompts_for
from rag.readers import READERS, con
from tests.rag.facts import conflicts
from tests.tiny import tiny_handle

COUNT = 12
CASES = conflicts(COUNT)
DOCUMENTS = [Passage("a", "Rome is old.", trust="verified"), Passage("b", "Paris is big.")]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(shipped_atlas: None) -> ModelHandle:
    return ModelHandle.load("atlas")


def share(readings, wanted) -> float:
    return sum(
        normalize_answer(reading.answer) == normalize_answer(answer)
        for reading, answer in zip(readings, wanted, strict=True)
    ) / len(wanted)


def test_the_table_of_readers():
    assert READERS.names() == ("direct", "faithful", "con", "con_unchecked")
    for name in READERS.names():
        kind = READERS.get(name)
        assert kind.title and kind.cost
    with pytest.raises(UnknownNameError, match="direct"):
        READERS.get("dirct")


@pytest.mark.parametrize("name", READERS.names())
def test_a_contradicted_model_wavers_and_context_aware_decoding_decides_it(model, name):
    items = [(case.question, [case.document]) for case in CASES]
    plain = READERS.get(name)(model).read_many(items)
    aware = READERS.get(name)(model, get_rule("cad")).read_many(items)
    told, known = [case.told for case in CASES], [case.known for case in CASES]
    assert share(plain, told) + share(plain, known) >= 0.8
    assert share(aware, told) >= 0.8
    assert share(aware, told) > share(plain, told)


def test_the_dial_of_ck_plug_turns_answers_to_memory(model):
    items = [(case.question, [case.document]) for case in CASES]
    answers = READERS.get("direct")(model, get_rule("ck_plug:memory=1")).read_many(items)
    assert share(answers, [case.known for case in CASES]) >= 0.8


@pytest.mark.parametrize("rule", ["greedy", "adacad"])
def test_notes_tell_documents_apart(model, rule):
    cases = CASES[:6]
    reader = READERS.get("con")(model, get_rule(rule))
    readings = reader.read_many([(case.question, [case.about_another, case.agreeing]) for case in cases])
    assert share(readings, [case.known for case in cases]) >= 0.8
    kinds = [tuple((note.document, note.kind) for note in reading.notes) for reading in readings]
    assert kinds.count(((1, "irrelevant"), (2, "direct"))) >= 5
    assert not any(reading.fallback for reading in readings)


def test_without_documents_every_reader_is_the_closed_book(model):
    case = CASES[0]
    for name in READERS.names():
        reading = READERS.get(name)(model, get_rule("cad")).read(case.question, [])
        assert (reading.answer, reading.notes, reading.known) == (case.known, (), True)


def test_what_nobody_knows_is_unknown(model):
    reading = READERS.get("con")(model).read("Who wrote The Zzyx of Qworp?", [])
    assert reading.answer == load_format().unknown and not reading.known


def test_the_built_in_model_is_asked_in_its_own_format(model):
    prompts, format = prompts_for(model), load_format()
    assert isinstance(prompts, FormatPrompts)
    wanted = format.render("documents", question="Q?", documents=DOCUMENTS)
    assert prompts.direct("Q?", DOCUMENTS) == wanted.prompt
    note = format.note("direct", subject="Rome", label="age", object="old")
    text = format.render(
        "notes_then_answer", question="Q?", documents=DOCUMENTS, notes=[note, note], answer="old"
    )
    written = prompts.written(f" {text.answer}{text.stop}", 2)
    assert written.answer == "old"
    assert written.notes == tuple(ReadingNote(number, note.kind, note.text) for number in (1, 2))
    assert prompts.claim(written.notes[0]) == "old"
    after = prompts.after_notes(prompts.notes("Q?", DOCUMENTS), f" {text.answer}{text.stop}")
    assert text.text == f"{after} old{text.stop}"


def test_any_model_reads_and_empty_questions_are_refused():
    handle = tiny_handle("llama", scale=2.0)
    handle.config.max_position_embeddings = 2048
    for name in READERS.names():
        reader = READERS.get(name)(handle, get_rule("cad"), max_new_tokens=3)
        reading = reader.read("Where is Rome?", DOCUMENTS)
        assert reading.answer and reading.to_json()["answer"] == reading.answer
        assert reading.fallback == (name in ("con", "con_unchecked"))
        with pytest.raises(RequestError, match="question 1 is empty"):
            reader.read_many([("Q?", []), (" ", [])])


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_plain_prompts_name_everything_and_end_alike(template):
    tokenizer = copy.deepcopy(tiny_handle("llama").tokenizer)
    tokenizer.chat_template = template
    tokenizer.bos_token = "<|end|>"
    prompts = PlainPrompts(tokenizer)
    made = [prompts.direct("Q?", DOCUMENTS), prompts.faithful("Q?", DOCUMENTS), prompts.closed("Q?")]
    notes = prompts.notes("Q?", DOCUMENTS)
    after = prompts.after_notes(notes, "direct): Rome is old\n\nAnswer: it is old")
    for text in (*made[:2], notes, after):
        assert "Rome is old." in text and "Paris is big." in text and "Q?" in text
    assert "Document 1 (verified): Rome" in made[0]
    assert len({text[-8:] for text in made}) == 1
    assert all(text.endswith("Answer:") for text in (*made, after)) and "it is old" not in after
    assert prompts.written("direct): old\nNote 7 (direct): x\nAnswer: **Rome**.", 2).notes == (
        ReadingNote(1, "direct", "old"), ReadingNote(None, "direct", "x"),
    )  # fmt: skip
    assert prompts.answer("**Rome**.\nmore") == prompts.answer(" **Rome.**") == "Rome"
    assert prompts.answer(" \n") == "unknown" and not prompts.knows("Unknown.")


@pytest.mark.parametrize("adds", [True, False])
def test_a_chat_prompt_starts_once(adds):
    tokenizer = copy.deepcopy(tiny_handle("llama").tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.bos_token = "<|end|>"
    if adds:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
        )
    ids = encode_ids(tokenizer, PlainPrompts(tokenizer).closed("Q?"))
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def test_a_note_on_somebody_else_is_put_right(model):
    prompts = prompts_for(model)
    question = "What is the home country of Vespira Sandervik?"
    wrong = " 1 Ardwin Castermon, home country: Peru (direct); 2 Vespira Sandervik, home country: Chad (direct). Answer: Peru"
    read = [
        Passage("", "The home country of Ardwin Castermon is Peru."),
        Passage("", "Vespira Sandervik is from Chad."),
    ]
    found = prompts.checked(question, wrong, read)
    assert [(note.document, note.kind) for note in found] == [(1, "irrelevant"), (2, "direct")]
    right = wrong.replace("Peru (direct)", "Peru (irrelevant)")
    assert (
        prompts.checked(question, right, read) is None and prompts.checked(question, "no note", read) is None
    )
    # A subject that no document names is a slip.
    assert prompts.checked(question, wrong, read[1:]) is None
    assert PlainPrompts(model.tokenizer).checked(question, wrong, read) is None


def test_checked_notes_let_go_of_documents_on_others(model):
    world = load_world()
    asked = atlas_questions(world, COUNT, seed=5)
    plain, checked = (READERS.get(name)(model) for name in ("con_unchecked", "con"))
    checked.drafts = plain.drafts = {}
    items = [(one.question, one.passages) for one in asked["noisy"]]
    known = [one.answers[0] for one in asked["noisy"]]
    assert share(checked.read_many(items), known) >= share(plain.read_many(items), known) + 0.5
    for reading in checked.read_many(items):
        assert {note.kind for note in reading.notes} == {"irrelevant"}
        assert [note.document for note in reading.notes] == [1, 2, 3]
    # Where the document is about the subject, nothing is put right.
    told = [(one.question, one.passages) for one in asked["contradict"]]
    assert checked.read_many(told) == plain.read_many(told)


def test_more_documents_than_notes_were_learnt_on_are_noted_one_by_one(model):
    told = ("The capital of France is Rome.", "The capital of Italy is Rome. The capital of Spain is Madrid.",
            "The capital of Japan is Tokyo.", "The capital of Peru is Lima.", "The capital of Chad is N'Djamena.")  # fmt: skip
    passages = [Passage(str(number), text) for number, text in enumerate(told)]
    question = "What is the capital of France?"
    plain, checked = (READERS.get(name)(model).read(question, passages) for name in ("con_unchecked", "con"))
    assert len(plain.notes) < 5 and plain.answer not in ("Rome", "Paris")
    assert not checked.fallback and [note.document for note in checked.notes] == [1, 2, 3, 4, 5]
    assert [note.kind for note in checked.notes] == ["direct", *["irrelevant"] * 4]
    elsewhere = "What is the capital of Kenya?"
    noise, alone = (READERS.get("con")(model).read(elsewhere, given) for given in (passages, []))
    assert {note.kind for note in noise.notes} == {"irrelevant"} and noise.answer == alone.answer == "Nairobi"


def test_a_question_of_a_million_characters_is_refused_in_words(model):
    with pytest.raises(RequestError, match=r"prompt 0 has \d+ tokens and the model .* reads") as refused:
        READERS.get("direct")(model).read("Rome " * 200_000, DOCUMENTS)
    assert len(str(refused.value)) < 300


def test_notes_are_written_once_for_several_rules(monkeypatch):
    handle, asked, drafts = tiny_handle(), [], {}
    handle.config.max_position_embeddings = 2048
    real = con.contrast_generate

    def counted(handle, prompts, *rest, **options):
        asked.append(len(prompts))
        return real(handle, prompts, *rest, **options)

    monkeypatch.setattr(con, "contrast_generate", counted)
    items = [("Where is Rome?", DOCUMENTS), ("Where is Paris?", DOCUMENTS[1:])]
    for rule in ("greedy", "cad", "ck_plug:memory=0.5"):
        reader = READERS.get("con")(handle, get_rule(rule), max_new_tokens=3)
        alone = reader.read_many(items)
        reader.drafts = drafts
        assert reader.read_many(items) == alone
    assert asked == [2, 2, 2, 0, 2, 0] and len(drafts) == 2
