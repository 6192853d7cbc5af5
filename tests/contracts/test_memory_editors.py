"""What every editor that makes a memory promises: the model is left alone, its prompt is answered, others are not touched."""

from __future__ import annotations

import functools

import pytest
import torch

from editors import EDITORS, get_editor
from lab.arch import Role
from lab.errors import NumericalError
from lab.memory import MemoryPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from tests.contracts.test_editors import MEMORIES, REQUESTS, traces
from tests.fakes import WordEmbedder
from tests.tiny import FAMILIES, tiny_handle

BESIDE = ("grace", "wise")
BEFORE = ("ike", "ice")
UNRELATED = "Marie Curie worked in"
SETTINGS = {
    "grace": {"layers": (1,), "steps": 6, "epsilon": 0.1},
    # One irrelevant prompt, the very one that is asked: what the margins promise holds for it.
    "wise": {
        "layers": (1,),
        "steps": 20,
        "lr": 0.1,
        "mask_ratio": 0.5,
        "alpha": 0.1,
        "beta": 1.0,
        "gamma": 0.5,
        "irrelevant": (UNRELATED,),
        "prefixes": ["The guitar. {}"],
    },
    "ike": {"k": 2, "pool": 30},
    "ice": {},
}


@functools.cache
def family_handle(family):
    return tiny_handle(family, scale=1.5)


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """No sentence model is loaded."""
    monkeypatch.setattr("editors.in_context.Embedder", WordEmbedder)


def logits(handle):
    return handle.logits(handle.encode([REQUESTS[0].text, UNRELATED]))


def test_the_two_contracts_cover_all_editors():
    assert set(MEMORIES) == set(BESIDE + BEFORE)
    assert set(MEMORIES) < set(EDITORS.names())


@pytest.mark.parametrize("spec", BESIDE)
@pytest.mark.parametrize("family", FAMILIES)
def test_memories_beside_the_model(family, spec, tmp_path):
    handle = family_handle(family)
    bits, left, clean = handle.weights_digest(), traces(handle), logits(handle)
    random = torch.random.get_rng_state()
    patch = get_editor(spec, **SETTINGS[spec]).edit(handle, REQUESTS[:1])
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    assert torch.equal(torch.random.get_rng_state(), random)

    assert isinstance(patch, MemoryPatch)
    assert patch.base == handle.fingerprint
    assert patch.provenance.method == spec
    assert patch.provenance.requests == (REQUESTS[0].to_json(),)
    assert patch.provenance.extra["preset"]["chosen"] == "fallback"

    pair = [(REQUESTS[0].text, REQUESTS[0].target_new)]
    before = score_targets(handle, pair)[0].mean_logprob
    with patch.applied(handle):
        assert handle.weights_digest() == bits
        assert score_targets(handle, pair)[0].mean_logprob > before + 0.5
        patched = logits(handle)
    assert torch.equal(patched[1], clean[1])
    assert not torch.equal(patched[0], clean[0])
    assert torch.equal(logits(handle), clean)
    assert traces(handle) == left

    again = MemoryPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    assert again.provenance.to_json() == patch.provenance.to_json()
    with again.applied(handle):
        assert torch.equal(logits(handle), patched)


@pytest.mark.parametrize("spec", BEFORE)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama", "gemma2"])
def test_memories_before_the_prompt(family, spec, tmp_path):
    handle = family_handle(family)
    bits, left = handle.weights_digest(), traces(handle)
    patch = get_editor(spec, **SETTINGS[spec]).edit(handle, REQUESTS[:1])
    assert isinstance(patch, MemoryPatch)
    assert patch.provenance.method == spec
    pair = (REQUESTS[0].text, REQUESTS[0].target_new)
    plain = handle.generate([pair[0]], max_new_tokens=4)
    with patch.applied(handle):
        (asked,) = handle.rewrite([pair[0]])
        assert asked.endswith(f"New Fact: {pair[0]} {pair[1]}\nPrompt: {pair[0]}")
        scored, said = score_targets(handle, [pair]), handle.generate([pair[0]], max_new_tokens=4)
        assert (handle.weights_digest(), handle.stack.state != handle.fingerprint) == (bits, True)
    assert scored == score_targets(handle, [(asked, pair[1])])
    assert said == handle.generate([asked], max_new_tokens=4)
    assert handle.generate([pair[0]], max_new_tokens=4) == plain
    assert (handle.weights_digest(), traces(handle)) == (bits, left)
    again = MemoryPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    with again.applied(handle):
        assert handle.rewrite([pair[0]]) == [asked]


@pytest.mark.parametrize("spec", BESIDE)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_model_is_left_alone_when_the_search_fails(family, spec):
    handle = tiny_handle(family)
    handle.model.get_parameter(f"{handle.arch.path(Role.FINAL_NORM)}.weight").data[0] = float("inf")
    bits, left = handle.weights_digest(), traces(handle)
    with pytest.raises(NumericalError, match=r"'a'.*step 0"):
        get_editor(spec, **SETTINGS[spec]).edit(handle, REQUESTS)
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("spec", MEMORIES)
def test_edits_on_top_of_edits_name_their_parents_and_equal_runs_are_equal(spec):
    handle = tiny_handle("llama")
    editor = get_editor(spec, **SETTINGS[spec])
    first = editor.edit(handle, REQUESTS[:1])
    assert get_editor(spec, **SETTINGS[spec]).edit(handle, REQUESTS[:1]).id == first.id
    with first.applied(handle) as entry:
        state, bits, left = handle.state, handle.weights_digest(), traces(handle)
        second = editor.edit(handle, REQUESTS[1:])
        assert (handle.state, handle.weights_digest(), traces(handle)) == (state, bits, left)
        assert handle.applied == (entry,)
    assert first.parents == ()
    assert second.parents == (first.id,)


@pytest.mark.parametrize("spec", MEMORIES)
def test_progress_is_told_to_the_end(spec):
    told = []
    get_editor(spec, **SETTINGS[spec]).edit(
        tiny_handle("llama"), REQUESTS, progress=lambda phase, done, total: told.append((phase, done, total))
    )
    assert told
    last = {phase: (done, total) for phase, done, total in told}
    assert all(done == total == len(REQUESTS) for done, total in last.values())


@pytest.mark.parametrize("spec", MEMORIES)
def test_settings_nobody_knows_and_lists_that_contradict_themselves(spec):
    from lab.errors import ConfigError, RequestError

    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="has no setting 'stepps'"):
        get_editor(spec, **SETTINGS[spec], stepps=3).edit(handle, REQUESTS)
    with pytest.raises(ConfigError, match="carry 'sadr'"):
        get_editor(f"{spec}+sadr")
    with pytest.raises(RequestError, match="the same id"):
        get_editor(spec, **SETTINGS[spec]).edit(
            handle, [REQUESTS[0], EditRequest("a", "{} is", "Paris", "Rome")]
        )
