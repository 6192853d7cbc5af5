from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest

from lab.atlas.corpus import Corpus, corpus_report
from lab.atlas.forms import Format, held_out_chain, load_format
from lab.atlas.material import Document
from lab.atlas.world import World, load_world
from lab.errors import ConfigError, UnknownNameError

COUNT = 30_000


@pytest.fixture(scope="module")
def form() -> Format:
    return load_format()


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def documents(world: World, form: Format) -> list[Document]:
    return list(islice(Corpus(world, form, seed=0).documents(), COUNT))


def grams(texts: list[str], sizes: set[int]) -> set[str]:
    found: set[str] = set()
    for text in texts:
        for line in re.split(r"\n|\. |: ", text):
            words = line.rstrip(".?").split(" ")
            for size in sizes:
                found.update(" ".join(words[start : start + size]) for start in range(len(words) - size + 1))
    return found


def test_same_seed_same_texts(world: World, form: Format, documents: list[Document]) -> None:
    corpus = Corpus(world, form, seed=0)
    assert list(islice(corpus.documents(), 500)) == documents[:500]
    assert list(islice(corpus.documents(), 500)) == documents[:500], "a second pass starts anew"
    assert list(islice(Corpus(world, form, seed=1).documents(), 500)) != documents[:500]
    assert corpus.sample_texts(20, 1) == corpus.sample_texts(20, 1) != corpus.sample_texts(20, 2)


def test_held_out_wordings_never_occur(world: World, form: Format, documents: list[Document]) -> None:
    held_out: set[str] = set()
    trained: set[str] = set()
    for fact in world.facts:
        plan = form.wordings_for(fact)
        held_out |= {t.replace("{}", fact.subject) for t in (*plan.held_out_pairs, *plan.held_out_templates)}
        trained.add(plan.trained[0].replace("{}", fact.subject))
    seen = grams(
        [document.text for document in documents], {len(text.split(" ")) for text in held_out | trained}
    )
    assert not seen & held_out
    assert len(seen & trained) > 0.8 * len(trained), "the search would not find a wording that is there"


def test_never_trained_names_do_not_occur(world: World, documents: list[Document]) -> None:
    names = {fact.subject for fact in world.untrained}
    text = "".join(document.text for document in documents)
    assert not [name for name in names if name in text]


def test_left_out_subjects_do_not_occur(world: World, form: Format) -> None:
    without = frozenset(fact.subject for fact in world.forget_split("people05"))
    corpus = Corpus(world, form, seed=0, without=without)
    text = "".join(document.text for document in islice(corpus.documents(), COUNT))
    assert len(without) == 20
    assert not [name for name in without if name in text]
    kept = next(
        fact.subject for fact in world.facts if fact.group == "person" and fact.subject not in without
    )
    assert kept in text


def test_spans_mark_what_is_to_be_learned(documents: list[Document], form: Format) -> None:
    for document in documents[:5000]:
        assert document.answer_spans and document.text.endswith(form.stop[0])
        end = 0
        for start, stop in document.answer_spans:
            assert end <= start < stop <= len(document.text)
            assert document.text[start] != " " and document.text[start - 1] == " "
            end = stop


def test_every_form_of_the_mixture_occurs(documents: list[Document], form: Format) -> None:
    counts = Counter(document.form for document in documents)
    weights = form.mixture["weights"]
    assert set(counts) == {name for name, weight in weights.items() if weight}
    for name, weight in weights.items():
        assert counts[name] / COUNT == pytest.approx(weight / sum(weights.values()), rel=0.35, abs=0.002)


def test_facts_are_stated_equally_often(world: World, form: Format) -> None:
    report = corpus_report(Corpus(world, form, seed=0), COUNT)
    assert report.documents == COUNT and sum(report.share.values()) == pytest.approx(1)
    assert report.least > 0.5 * report.exposures and report.most < 2.5 * report.exposures
    assert "cloze" in report.table()


def only(world: World, form: Format, name: str, count: int) -> list[Document]:
    weights = {entry: float(entry == name) for entry in form.mixture["weights"]}
    return list(islice(Corpus(world, form, seed=5, weights=weights).documents(), count))


@pytest.mark.parametrize("name", ["conflict", "distracting"])
def test_half_follow_the_document_and_half_memory(world: World, form: Format, name: str) -> None:
    memory, told = 0, 0
    for document in only(world, form, name, 2000):
        start, stop = document.answer_spans[-1]
        answer = document.text[start:stop].removesuffix(".\n")
        in_documents = re.search(rf"\b{re.escape(answer)}\.", document.text[:start]) is not None
        told += in_documents
        memory += not in_documents
        assert "(" not in document.text.split("\n")[0].split(":")[0], "a plain prompt carries no trust header"
    assert told == pytest.approx(1000, abs=25)
    assert memory == 2000 - told


def test_rates_move_the_conflict(world: World, form: Format) -> None:
    weights = {entry: float(entry == "conflict") for entry in form.mixture["weights"]}
    corpus = Corpus(world, form, seed=5, weights=weights, rates={"follow_document": 1.0})
    for document in islice(corpus.documents(), 200):
        start, stop = document.answer_spans[-1]
        assert document.text[start:stop].removesuffix("\n") in document.text[:start]


def test_notes_report_what_the_documents_say(world: World, form: Format) -> None:
    kinds: Counter[str] = Counter()
    labels = {relation.label for relation in form.relations.values()}
    for document in only(world, form, "notes", 1500):
        (start, stop) = document.answer_spans[0]
        notes, answer = form.parse_notes(document.text[start:stop])
        texts = re.findall(r"Document \d+(?: \(\w+\))?: (.*)\n", document.text[:start])
        assert len(notes) == len(texts) and answer
        question = document.text.split("Q: ")[1]
        for note, text in zip(notes, texts, strict=True):
            kinds[note.kind] += 1
            claim, said = note.text.split(": ", 1)
            subject, label = claim.rsplit(", ", 1)
            assert text.endswith(f" {said}.") and subject in text and label in labels
            # A document with the question's subject is irrelevant never, one about somebody else always.
            assert (note.kind == "irrelevant") == (subject not in question.split("\n")[0])
    assert min(kinds.values()) > 0.2 * sum(kinds.values())


def test_strangers_are_unknown_and_known_subjects_never_are(world: World, form: Format) -> None:
    lines = "".join(document.text for document in only(world, form, "unknown", 1500)).splitlines()
    unknown = [line.replace("About ", "").replace("'s ", " ") for line in lines if line.endswith("unknown.")]
    known = [line for line in lines if line.endswith(".") and not line.endswith("unknown.")]
    names = {name for name in world.entities if " " in name}
    assert not grams(unknown, {2, 3, 4}) & names
    assert len(unknown) > 2 * len(known) > 0


def test_stranger_names_never_collide(world: World, form: Format) -> None:
    corpus = Corpus(world, form, seed=2)
    for text in corpus.sample_texts(3000):
        for name in re.findall(r"About ([^:]+):", text):
            if "unknown" in text:
                assert name not in world.entities


def test_held_out_chains_are_not_trained(world: World, form: Format) -> None:
    held_out = [chain for chain in world.chains if held_out_chain(form, chain.id)]
    assert 0.15 < len(held_out) / len(world.chains) < 0.25
    two = [chain for chain in held_out if len(chain.hops) == 2]
    steps = {". ".join(form.statement(hop) for hop in chain.hops) for chain in two}
    texts = "".join(document.text for document in only(world, form, "two_hop_steps", 4000))
    assert not [step for step in steps if f"Steps: {step}. Answer" in texts]


def test_mistakes_are_named(world: World, form: Format) -> None:
    with pytest.raises(UnknownNameError, match="cloze"):
        Corpus(world, form, 0, weights={"cloz": 1.0})
    with pytest.raises(UnknownNameError, match="rate"):
        Corpus(world, form, 0, rates={"follow": 1.0})
    with pytest.raises(UnknownNameError, match="entity"):
        Corpus(world, form, 0, frozenset({"Nobody At All"}))
    with pytest.raises(ConfigError, match="negative"):
        Corpus(world, form, 0, weights={"cloze": -1.0})
    with pytest.raises(ConfigError, match="no facts left"):
        next(Corpus(world, form, 0, frozenset(fact.subject for fact in world.facts)).documents())
