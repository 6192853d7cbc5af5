"""What every editor promises on every family: the model is left alone, the patch is whole, and it does something."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch

from editors import EDITORS, get_editor
from lab.arch import Role
from lab.errors import NumericalError
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.stats import Corpus, StatsCache
from tests.tiny import FAMILIES, tiny_handle

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]
SPECS = [
    *(name for name in EDITORS.names()),
    *(f"{name}+sadr" for name in ("rome", "memit", "pmet", "emmet", "alphaedit")),
]
TEXTS = ["The guitar. {}", "Because of the piano, and. {}"]
SETTINGS = {
    "layers": (1,),
    "steps": 8,
    "fact_token": "last",
    "prefixes": TEXTS,
    "clamp": 20.0,
    "weight_decay": 0.0,
}


@functools.cache
def family_handle(family):
    return tiny_handle(family, scale=1.5)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = "The capital of France is Paris. Marie Curie wrote the book? Toko Yasuda plays the guitar, and the piano. "
    (folder / "corpus.txt").write_text("\n\n".join(words[start:] + words[:start] for start in range(90)))
    return {
        "stats": StatsCache(folder / "stats"),
        "corpus": Corpus(str(folder / "corpus.txt"), max_tokens=1500),
    }


def settings_of(spec):
    name = spec.split("+")[0]
    if name == "ultraedit":
        # The published rate is for widths of thousands.
        return {"layers": (1,), "gate_layers": (), "up_layers": (), "lr": 3e-3}
    own = {}
    if name in ("memit", "pmet", "emmet"):
        # λ counts average keys; a handful of edits to a random model vanishes against the published ones.
        own = {"mom2_weight": 0.1}
    if name == "alphaedit":
        # No absolute threshold serves all families' random activations.
        own = {"l2": 1e-3, "nullspace_threshold": 1.0, "threshold_mode": "relative"}
    return {**SETTINGS, **own}


def traces(handle):
    """Everything an edit could leave behind besides weights."""
    return (
        [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(m.__dict__))
            for name, m in handle.model.named_modules()
        ],
        [(name, p.requires_grad, p.grad is None) for name, p in handle.model.named_parameters()],
        handle.config._attn_implementation,
        handle.state,
        handle.model.training,
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_contract(family, spec, corpus, tmp_path):
    handle = family_handle(family)
    bits, left = handle.weights_digest(), traces(handle)
    random = torch.random.get_rng_state()
    patch = get_editor(spec, **settings_of(spec), **corpus).edit(handle, REQUESTS[:1])
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    assert torch.equal(torch.random.get_rng_state(), random)

    assert isinstance(patch, WeightPatch)
    assert patch.base == handle.fingerprint
    assert patch.provenance.method == spec
    assert patch.provenance.requests == (REQUESTS[0].to_json(),)
    contexts = ["{}", *TEXTS] if "prefixes" in settings_of(spec) else ["{}"]
    assert patch.provenance.extra["prefixes"] == contexts
    assert patch.provenance.extra["preset"]["chosen"] == "fallback"

    pair = [(REQUESTS[0].text, REQUESTS[0].target_new)]
    before = score_targets(handle, pair)[0].mean_logprob
    with patch.applied(handle):
        merged = score_targets(handle, pair)[0].mean_logprob
    with patch.applied(handle, mode="sidecar"):
        beside = score_targets(handle, pair)[0].mean_logprob
    assert merged > before + 0.1
    assert beside == pytest.approx(merged, abs=5e-3)
    assert handle.weights_digest() == bits

    again = WeightPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    assert again.provenance.to_json() == patch.provenance.to_json()


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_model_is_left_alone_when_the_search_fails(family, spec, corpus):
    handle = tiny_handle(family)
    handle.model.get_parameter(f"{handle.arch.path(Role.FINAL_NORM)}.weight").data[0] = float("inf")
    bits, left = handle.weights_digest(), traces(handle)
    with pytest.raises(NumericalError, match=r"'a'.*(step 0|its target is nan)"):
        get_editor(spec, **settings_of(spec), **corpus).edit(handle, REQUESTS)
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("spec", ["rome_identity", "memit", "pmet", "emmet", "alphaedit"])
def test_model_is_left_alone_when_a_later_part_fails(spec, corpus, monkeypatch):
    """The first request's (or layer's) delta is in place when the second fails."""
    handle = tiny_handle("opt")
    module = importlib.import_module("editors.rome" if spec == "rome_identity" else "editors.spread")
    real, calls = module.read_keys, []

    def failing(*args):
        calls.append(bool(handle.applied))
        if len(calls) == 2:
            raise NumericalError("made to fail")
        return real(*args)

    monkeypatch.setattr(module, "read_keys", failing)
    bits, left = handle.weights_digest(), traces(handle)
    layers = (1,) if spec == "rome_identity" else (0, 1)
    with pytest.raises(NumericalError, match="made to fail"):
        get_editor(spec, **{**settings_of(spec), "layers": layers}, **corpus).edit(handle, REQUESTS)
    assert calls == [False, True]
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("spec", SPECS)
def test_edits_on_top_of_edits_name_their_parents_and_equal_runs_are_equal(spec, corpus):
    handle = tiny_handle("llama")
    editor = get_editor(spec, **settings_of(spec), **corpus)
    first = editor.edit(handle, REQUESTS[:1])
    assert editor.edit(handle, REQUESTS[:1]).id == first.id
    with first.applied(handle) as entry:
        state, bits = handle.state, handle.weights_digest()
        second = editor.edit(handle, REQUESTS[1:])
        assert (handle.state, handle.weights_digest()) == (state, bits)
        assert handle.applied == (entry,)
    assert first.parents == ()
    assert second.parents == (first.id,)


@pytest.mark.parametrize("spec", SPECS)
def test_a_sequence_survives_files(spec, corpus, tmp_path):
    """Whatever a method keeps of earlier edits comes back from disk, and leaves no trace in the model."""
    handle = tiny_handle("gptj")
    editor = get_editor(spec, **settings_of(spec), **corpus)
    first = editor.edit(handle, REQUESTS[:1])
    loaded = WeightPatch.load(first.save(tmp_path / "first"))
    with loaded.applied(handle):
        bits = handle.weights_digest()
        second = editor.edit(handle, REQUESTS[1:], history=[first])
        assert editor.edit(handle, REQUESTS[1:], history=[loaded]).id == second.id
        assert handle.weights_digest() == bits
    assert second.parents == (first.id,)


@pytest.mark.parametrize("spec", SPECS)
def test_progress_is_told_to_the_end(spec, corpus):
    told = []
    get_editor(spec, **settings_of(spec), **corpus).edit(
        tiny_handle("llama"), REQUESTS, progress=lambda phase, done, total: told.append((phase, done, total))
    )
    last = {phase: (done, total) for phase, done, total in told}
    assert last
    assert all(done == total for done, total in last.values())
