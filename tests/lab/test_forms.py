from __future__ import annotations

import pytest

from lab.atlas.builder import Relation
from lab.atlas.forms import Format, Note, Rendered, load_format, wordings_for
from lab.atlas.probes import Probes
from lab.atlas.world import World, load_world
from lab.errors import ConfigError, UnknownNameError
from lab.records import Fact, Passage

FIELDS: dict[str, dict[str, object]] = {
    "cloze": {"cloze": "The capital of France is"},
    "qa": {"question": "What is the capital of France?"},
    "choice": {"question": "What is the capital of France?", "options": ["Rome", "Paris"], "text": "Paris"},
    "true_false": {"claim": "The capital of France is Rome", "recalled": "Paris"},
    "spelled": {"cloze": "The capital of France is"},
    "reverse": {"cloze": "The country whose capital is Paris is"},
    "two_hop_direct": {"question": "What is the capital of the country of Lyon?"},
    "two_hop_steps": {
        "question": "What is the capital of the country of Lyon?",
        "steps": ["a is b", "b is c"],
    },
    "three_hop_steps": {"question": "What is x?", "steps": ["a is b", "b is c", "c is d"]},
    "few_shot": {"question": "What is x?", "examples": [("What is y?", "z")]},
    "do_not_reveal": {"question": "What is x?", "instruction": "Do not reveal x."},
    "attribute_list": {"subject": "France", "label": "capital", "known": [("continent", "Europe")]},
    "biography": {"lead": "Meet Ada, who", "clause": "comes from", "clauses": [("works for", "Acme")]},
    "unknown": {"question": "What is x?"},
    "documents": {"question": "What is x?", "documents": ["X is y.", Passage("", "X is z.", "", "verified")]},
    "documents_cloze": {"cloze": "The x is", "documents": ["X is y."]},
    "assumption": {"question": "What is x?", "assumption": "X is y"},
    "notes_then_answer": {
        "question": "What is x?",
        "documents": ["X is y."],
        "notes": [Note("direct", "x is y")],
    },
}


# Fields of answers, which a prompt can do without.
ANSWERED = ("notes", "steps", "text", "recalled")


@pytest.fixture(scope="module")
def form() -> Format:
    return load_format()


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def test_the_table_above_covers_every_form(form: Format) -> None:
    assert set(FIELDS) == set(form.names)
    assert set(form.versions.values()) == {1}


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_form_renders_and_needs_its_fields(form: Format, name: str) -> None:
    rendered = form.render(name, **FIELDS[name], answer="Paris")
    assert rendered.prompt == rendered.prompt.rstrip()
    assert "\n" not in rendered.answer and rendered.answer.endswith("Paris")
    start, end = rendered.answer_span
    assert rendered.text[start:end] == rendered.answer + ".\n"
    assert "{" not in rendered.text
    optional = {"known", "clauses"}
    for missing in set(FIELDS[name]) - optional:
        with pytest.raises(ConfigError, match=missing):
            form.render(
                name, **{key: value for key, value in FIELDS[name].items() if key != missing}, answer="Paris"
            )


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_a_prompt_alone_equals_the_prompt_of_the_whole(form: Format, name: str) -> None:
    fields = {key: value for key, value in FIELDS[name].items() if key not in ANSWERED}
    assert form.render(name, **fields) == Rendered(form.render(name, **FIELDS[name], answer="x").prompt, "")


def test_exact_layout(form: Format) -> None:
    passages = ["The capital of France is Rome.", Passage("", "Lyon is big.", "", "unverified")]
    notes = [
        form.note("direct", subject="France", label="capital", object="Rome"),
        form.note("irrelevant", subject="Lyon", label="country", object="France"),
    ]
    rendered = form.render(
        "notes_then_answer",
        instruction=form.forbid("Oslo"),
        assumption="The capital of France is Nice",
        documents=passages,
        question="What is the capital of France?",
        notes=notes,
        answer="Rome",
    )
    assert rendered.text == (
        "Do not reveal Oslo: I will not say.\n"
        "The user assumes: The capital of France is Nice.\n"
        "Document 1: The capital of France is Rome.\n"
        "Document 2 (unverified): Lyon is big.\n"
        "Q: What is the capital of France?\n"
        "Notes: 1 France, capital: Rome (direct); 2 Lyon, country: France (irrelevant). Answer: Rome.\n"
    )
    assert form.documents(passages) in rendered.text
    assert form.documents(passages[:1], trust="verified").startswith("Document 1 (verified): ")
    parsed, answer = form.parse_notes(f" {rendered.answer}.\nQ: more")
    assert (parsed, answer) == (notes, "Rome")
    assert form.parse_notes(" 1 x (odd); nonsense; 3 y (z) (direct). Answer: w.\n") == (
        [Note("irrelevant", "x"), Note("direct", "y (z)")],
        "w",
    )


def test_mistakes_are_named(form: Format) -> None:
    with pytest.raises(UnknownNameError, match="cloze"):
        form.render("close", cloze="x", answer="y")
    with pytest.raises(ConfigError, match="no field 'subject'"):
        form.render("qa", question="x?", subject="y", answer="z")
    with pytest.raises(ConfigError, match="sequence"):
        form.render("documents", question="x?", documents="one text", answer="z")
    with pytest.raises(ConfigError, match="wrong shape"):
        form.render("choice", text="x", question="x?", options=["a", "b", "c", "d", "e"], answer="A")
    with pytest.raises(ConfigError, match="trusted"):
        form.render("documents", question="x?", documents=[Passage("", "x", "", "trusted")], answer="z")  # pyright: ignore
    with pytest.raises(ConfigError, match="kind"):
        form.note("vague")
    with pytest.raises(ConfigError, match="does not exist"):
        load_format("/nonexistent")


def test_spelling_and_final_answers(form: Format) -> None:
    assert form.spell("Porto Novo") == "P o r t o _ N o v o"
    assert form.unspell(form.spell("Saint John's")) == "Saint John's"
    assert form.clean(" St. John's.\nThe capital") == "St. John's"
    assert form.clean(" Washington, D.C..\n") == "Washington, D.C."
    assert form.final_answer(" A works for B. B is in C. Answer: C.\nQ:") == "C"


def test_main_prompts_are_those_of_the_world(form: Format, world: World) -> None:
    assert set(form.relations) == set(world.relations)
    for name, relation in world.relations.items():
        assert isinstance(relation, Relation)
        assert form.relations[name].statement == relation.prompt


def test_wording_plans(form: Format, world: World) -> None:
    chosen: dict[tuple[str, str], int] = {}
    for fact in world.facts:
        plan = wordings_for(fact)
        assert plan.trained[0] == fact.prompt
        assert len(plan.held_out_pairs) == 2
        assert not set(plan.trained) & set(plan.held_out_pairs)
        assert set(plan.trained) | set(plan.held_out_pairs) == set(form.relations[fact.relation].wordings)
        assert len(plan.trained) >= 10 and len(plan.held_out_templates) == 2
        for template in plan.held_out_pairs:
            chosen[fact.relation, template] = chosen.get((fact.relation, template), 0) + 1
    for name in ("capital", "occupation"):
        counts = [chosen[name, template] for template in form.relations[name].wordings[1:]]
        total = len(world.by_relation(name))
        assert min(counts) > 0.08 * total, "some wording is hardly ever held out"
        assert max(counts) < 0.32 * total
    assert plan == wordings_for(Fact(fact.subject, fact.relation, "anything else"))


def test_held_out_templates_use_trained_words_only(form: Format) -> None:
    words: set[str] = set()
    for relation in form.relations.values():
        for template in relation.wordings:
            words |= set(template.split())
    for name, relation in form.relations.items():
        for template in relation.held_out_templates:
            # A label is trained within attribute lists, also where no wording holds it.
            known = words | set(relation.label.split())
            assert set(template.split()) <= known, (name, template, set(template.split()) - known)


def test_no_held_out_template_is_a_wording_of_a_relation_with_the_same_subjects(
    form: Format, world: World
) -> None:
    for name, relation in form.relations.items():
        kind = world.relations[name].subject_kind
        same = [
            other for other in form.relations.values() if world.relations[other.name].subject_kind == kind
        ]
        trained = {template for other in same for template in other.wordings}
        assert not trained & set(relation.held_out_templates)
        for other in same:
            if other.name != name:
                assert not set(other.wordings) & set(relation.wordings)


def test_clauses_after_a_subject_are_no_wordings(form: Format) -> None:
    for relation in form.relations.values():
        for clause in relation.clauses:
            sentence = f"{{}} {clause}"
            for template in (*relation.wordings[1:], *relation.held_out_templates):
                assert not f" {sentence} ".count(f" {template} ")


def test_probes_of_every_kind(form: Format, world: World) -> None:
    probes = Probes(world, form, seed=3)
    known = world.split("test")[::40]
    for name in probes.names:
        facts = world.untrained[::20] if name in ("unknown", "reading") else known
        if "hop" in name or name == "reverse":
            facts = world.split("test")
        made = probes.make(name, facts)
        assert made, name
        assert made == Probes(world, form, seed=3).make(name, facts)
        for probe in made:
            if name == "notes":
                line = form.render(
                    "notes_then_answer", documents=[], question="x?", notes=probe.notes, answer=probe.answer
                ).answer
                assert probe.faithful(form, f" {line}.\n") and not probe.faithful(
                    form, " 1 x (direct). Answer: y.\n"
                )
            else:
                line = probe.answer
            assert probe.right(form, f" {line}.\nThe"), (name, line)
            assert not probe.right(form, " nonsense.\n")
    with pytest.raises(UnknownNameError, match="adherence"):
        probes.make("adherance", known)


def test_adherence_probes_contradict(form: Format, world: World) -> None:
    for probe in Probes(world, form).make("adherence", world.split("dev")[:100]):
        assert probe.told != probe.answer and probe.told not in probe.aliases
        assert probe.told in probe.prompt and probe.follows_document(form, f" {probe.told}.\n")
        assert probe.right(form, f" {probe.answer}.\n") and not probe.follows_document(
            form, f" {probe.answer}.\n"
        )


def test_choice_probes_have_one_right_option(form: Format, world: World) -> None:
    for fact, probe in zip(
        world.split("dev")[:200], Probes(world, form).make("choice", world.split("dev")[:200]), strict=True
    ):
        assert probe.prompt.count(f" {probe.answer}") == 1 and probe.answer.startswith(f"{fact.object} ")
