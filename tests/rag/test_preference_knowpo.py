"""KnowPO's stages one after another, on a model that knows the built-in world."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import pytest

from lab.errors import ConfigError
from rag.preference.knowpo import AT_MOST, KnowPOConfig, knowpo_data, repeated, thinned
from rag.preference.pairs import read_contexts
from rag.preference.sources import atlas_items
from rag.preference.stage import finish, records
from tests.rag.test_preference_pairs import items


def test_the_whole_way_with_a_model_that_knows_the_world(shipped_atlas, tmp_path):
    from lab.atlas.world import load_world
    from lab.handle import ModelHandle

    world, handle = load_world(), ModelHandle.load("atlas")
    stage = atlas_items(world, world.split("dev"), seed=0, limit=24)
    config = KnowPOConfig(samples=0, balanced=False, shares={"sft": 0.3, "dpo": 0.7})
    told: list[tuple[str, int, int]] = []
    begun = knowpo_data(handle, stage, config, seed=0, progress=lambda *each: told.append(each))
    assert [phase for phase, done, total in told if done == total] == ["memory"]
    assert begun.sft is not None and begun.pairs is None and begun.then is not None
    data = begun.then(handle)
    assert told[-1] == ("reading", told[-1][2], len(data.stages["reading"].data))
    data.save(tmp_path)
    manifest = json.loads((tmp_path / "03-memory.manifest.json").read_text(encoding="utf-8"))
    assert manifest["settings"]["known"] >= 20
    rows = records(data.pairs)
    # The model was not trained in between, so that the mistakes are those of the model before.
    at_once = knowpo_data(handle, stage, replace(config, after_first=False), seed=0)
    assert at_once.then is None and records(at_once.pairs) == rows
    assert {"ignorance", "overinclusion_known"} <= {row["error_type"] for row in rows}
    for row in rows:
        assert row["prompt"].startswith("Document 1")
        assert row["prompt"].endswith("\nA:")
        assert row["chosen"].startswith(" ") and row["chosen"].endswith(".\n")
    assert {row["context"] for row in records(data.sft)} == {"related", "conflict", "irrelevant", "empty"}
    assert not {row["title"] for row in rows} & {row["title"] for row in records(data.sft)}


def test_further_draws_bring_other_documents_and_ask_memory_once(shipped_atlas):
    from lab.atlas.world import load_world
    from lab.handle import ModelHandle

    world, handle = load_world(), ModelHandle.load("atlas")
    stage = atlas_items(world, world.split("dev"), seed=0, limit=24)
    once, twice = (
        knowpo_data(
            handle, stage, KnowPOConfig(samples=0, draws=draws, at_most={}, shares={"sft": 0.5, "dpo": 0.5})
        )
        for draws in (1, 2)
    )
    assert len(twice.stages["memory"].data) == len(once.stages["memory"].data)
    first, both = (
        {(row["id"], row["context"]): row for row in records(data.stages["contexts"].data)}
        for data in (once, twice)
    )
    assert first.keys() <= both.keys()
    again = {(id.partition("#")[0], context): row for (id, context), row in both.items() if "#" in id}
    shared = first.keys() & again.keys()
    assert len(shared) > 20
    assert sum(first[key]["documents"] != again[key]["documents"] for key in shared) > 0.9 * len(shared)
    contradicted = [key for key in shared if key[1] == "conflict"]
    assert any(first[key]["counterfactual"] != again[key]["counterfactual"] for key in contradicted)
    empty = [row["prompt"] for row in records(twice.sft) if row["context"] == "empty"]
    assert empty and len(empty) == len(set(empty))


def test_an_item_needs_a_set_of_contexts():
    with pytest.raises(ConfigError, match="at least one set of contexts, not 0"):
        repeated(items(2).data, 0)


def test_rows_that_tell_little_are_thinned_to_their_part():
    kinds = {"conflict": 40, "irrelevant": 20, "related": 50, "empty": 3}
    rows = [{"context": kind, "at": at} for kind, count in kinds.items() for at in range(count)]
    stage = thinned(finish("x", len(rows), rows).data, AT_MOST, seed=1)
    assert Counter(row["context"] for row in records(stage.data)) == kinds | {"related": 15}
    assert stage.manifest["dropped"] == {"beyond their part": 35}
    other = thinned(finish("x", len(rows), rows).data, AT_MOST, seed=2)
    assert records(other.data) != records(stage.data)
    plain = [row for row in rows if row["context"] in ("related", "empty")]
    assert records(thinned(finish("x", len(plain), plain).data, AT_MOST).data) == plain


def test_answers_after_notes_are_trained_where_the_reader_gives_them(shipped_atlas, monkeypatch):
    from lab.atlas.world import load_world
    from lab.handle import ModelHandle
    from lab.records import Passage
    from rag.readers import READERS

    world, handle = load_world(), ModelHandle.load("atlas")
    stage = atlas_items(world, world.split("dev"), seed=1, limit=32)
    config = KnowPOConfig(
        samples=0, reader="con", balanced=False, at_most={}, shares={"sft": 0.5, "dpo": 0.5}
    )
    data = knowpo_data(handle, stage, replace(config, after_first=False))
    read = records(data.stages["shown"].data) + records(data.stages["reading"].data)
    before = [row for row in records(data.stages["fitting"].data) if row["split"] in ("sft", "dpo")]
    assert data.stages["reading"].manifest["settings"]["reader"] == "con"
    # Memory is asked alone below notes that keep no document; it is not to be taught to admit ignorance there.
    assert config.settled_ratios()["overinclusion_known"] > config.settled_ratios()["overinclusion_unknown"]
    assert KnowPOConfig(reader="faithful").settled_ratios() == KnowPOConfig().settled_ratios()
    assert KnowPOConfig(reader="con", ratios={"ignorance": 1.0}).settled_ratios() == {"ignorance": 1.0}
    reader = READERS.get("con")(handle)
    closed = {row["id"]: reader.prompts.closed(row["question"]) for row in before}
    kept = {(row["id"], row["context"]) for row in read}
    items = [(row["question"], [Passage("", text) for text in row["documents"]]) for row in before]
    for row, reading in zip(before, reader.read_many(items), strict=True):
        lost = row["context"] != "irrelevant" and reading.prompt == closed[row["id"]]
        assert ((row["id"], row["context"]) in kept) != lost
    told = [row for row in read if row["context"] == "conflict"]
    assert told
    assert all(row["prompt"].endswith("\nNotes:") and row["lead"].endswith("Answer:") for row in told)
    for row in told[:4]:
        # What comes after the prompt is what the reader read.
        [text] = handle.generate([row["prompt"] + row["lead"]], max_new_tokens=24, stop=reader.prompts.stop)
        assert reader.prompts.answer(text) == row["read"]
    apart = [row for row in read if row["context"] == "irrelevant"]
    assert sum(row["prompt"] == closed[row["id"]] for row in apart) > len(apart) / 2
    leads = {row["prompt"]: row["lead"] for row in read}
    for row in records(data.pairs):
        assert row["chosen"].startswith(leads[row["prompt"]]) and row["rejected"].startswith(
            leads[row["prompt"]]
        )
    asked = [row for row in records(data.sft) if row["context"] != "empty"]
    assert any(leads[row["prompt"]] for row in asked)
    assert all(row["completion"].startswith(leads[row["prompt"]]) for row in asked)
    plain = read_contexts(handle, data.stages["fitting"].data)
    monkeypatch.setattr("rag.preference.pairs._READ_AT_ONCE", 7)
    assert records(read_contexts(handle, data.stages["fitting"].data).data) == records(plain.data)
    assert len(plain.data) == len(before)
