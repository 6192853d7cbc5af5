"""What every editor promises on every family: the model is left alone, the patch is whole, and it does something."""

from __future__ import annotations

import functools
import importlib
import re

import pytest
import torch

from editors import EDITORS, get_editor
from lab.arch import Role
from lab.errors import NumericalError
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.patch_io import load_saved
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.stats import Corpus, StatsCache
from tests.fakes import WordEmbedder
from tests.lessons import small_lessons
from tests.tiny import FAMILIES, tiny_handle

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]
# Methods that make memories instead of weight deltas have a contract of their own: test_memory_editors.
MEMORIES = ("grace", "wise", "ike", "ice")
SPECS = [
    *(name for name in EDITORS.names() if name not in MEMORIES),
    *(f"{name}+sadr" for name in ("rome", "memit", "pmet", "emmet", "alphaedit")),
]
TEXTS = ["The guitar. {}", "Because of the piano, and. {}"]
SEARCHING = {
    "layers": (1,),
    "steps": 8,
    "fact_token": "last",
    "prefixes": TEXTS,
    "clamp": 20.0,
    "weight_decay": 0.0,
}
TRAINING = {"layers": (1,), "steps": 8, "lr": 0.02}
OWN = {
    # λ counts average keys; a handful of edits to a random model vanishes against the published ones.
    **{name: {"mom2_weight": 0.1} for name in ("memit", "pmet", "emmet")},
    # No absolute threshold serves all families' random activations.
    "alphaedit": {"l2": 1e-3, "nullspace_threshold": 1.0, "threshold_mode": "relative"},
    "ft_l_inf": {"norm_constraint": 0.05},
    "ft_m": {"norm_constraint": None},
}
TRAINED_FAMILIES = ("gpt2", "llama", "qwen3")
NETWORKS = {
    "mend": {"blocks": 2, "rank": 8, "edit_rate": 0.01, "lr": 1e-3, "steps": 2, "lessons_per_step": 2},
    "serac": {
        "embedder": "words",
        "modules": "mlp",
        "lr": 0.005,
        "steps": 30,
        "lessons_per_step": 2,
        "eval_every": 10,
    },
}


def method_of(spec):
    return EDITORS.get(spec.split("+")[0])


def cases(specs, families):
    """Methods that need a network of their own are tried on fewer families."""
    return [
        (family, spec)
        for spec in specs
        for family in families
        if method_of(spec).train is None or family in TRAINED_FAMILIES
    ]


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


@pytest.fixture(scope="session")
def settings_of(tmp_path_factory):
    """A function of method and model: what the method needs to be quick and to show, its trained network included."""
    trained = {}

    def network(method, handle):
        key = (method.name, handle.fingerprint)
        if key not in trained:
            sentences = {"encoder": WordEmbedder()} if method.name == "serac" else {}
            made = method.train(
                handle,
                small_lessons(),
                tmp_path_factory.mktemp(method.name) / "network",
                settings=NETWORKS[method.name],
                **sentences,
            )
            trained[key] = {"network": str(made.folder), **sentences}
        return trained[key]

    def settings(spec, handle):
        method = method_of(spec)
        if method.train is not None:
            return network(method, handle)
        if method.name == "ultraedit":
            # The published rate is for widths of thousands.
            return {"layers": (1,), "gate_layers": (), "up_layers": (), "lr": 3e-3}
        return {**(SEARCHING if method.takes_penalties else TRAINING), **OWN.get(method.name, {})}

    return settings


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


@pytest.mark.parametrize(("family", "spec"), cases(SPECS, FAMILIES))
def test_contract(family, spec, corpus, settings_of, tmp_path, memory_kinds):
    handle = family_handle(family)
    settings = settings_of(spec, handle)
    bits, left = handle.weights_digest(), traces(handle)
    random = torch.random.get_rng_state()
    patch = get_editor(spec, **settings, **corpus).edit(handle, REQUESTS[:1])
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    assert torch.equal(torch.random.get_rng_state(), random)

    assert isinstance(patch, (WeightPatch, MemoryPatch))
    assert patch.base == handle.fingerprint
    assert patch.provenance.method == spec
    assert patch.provenance.requests == (REQUESTS[0].to_json(),)
    if method_of(spec).takes_penalties:
        assert patch.provenance.extra["prefixes"] == ["{}", *TEXTS]
    if spec == "ultraedit":
        assert patch.provenance.extra["prefixes"] == ["{}"]
    assert patch.provenance.extra["preset"]["chosen"] == "fallback"

    pair = [(REQUESTS[0].text, REQUESTS[0].target_new)]
    before = score_targets(handle, pair)[0].mean_logprob
    with patch.applied(handle):
        applied = score_targets(handle, pair)[0].mean_logprob
    assert applied > before + 0.1
    if isinstance(patch, WeightPatch):
        with patch.applied(handle, mode="sidecar"):
            beside = score_targets(handle, pair)[0].mean_logprob
        assert beside == pytest.approx(applied, abs=5e-3)
    assert handle.weights_digest() == bits
    assert traces(handle) == left

    again = load_saved(patch.save(tmp_path / "patch"))
    assert type(again) is type(patch)
    assert again.id == patch.id
    assert again.provenance.to_json() == patch.provenance.to_json()


@pytest.mark.parametrize(("family", "spec"), cases(SPECS, ["gpt2", "opt"]))
def test_model_is_left_alone_when_the_search_fails(family, spec, corpus, settings_of):
    handle = tiny_handle(family)
    settings = settings_of(spec, handle)
    handle.model.get_parameter(f"{handle.arch.path(Role.FINAL_NORM)}.weight").data[0] = float("inf")
    bits, left = handle.weights_digest(), traces(handle)
    try:
        patch = get_editor(spec, **settings, **corpus).edit(handle, REQUESTS)
    except NumericalError as error:
        assert re.search(r"'a'.*(step 0|its target is nan)", str(error))
    else:
        # Nothing can fail where an edit is only written down.
        assert isinstance(patch, MemoryPatch)
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("spec", ["rome_identity", "memit", "pmet", "emmet", "alphaedit"])
def test_model_is_left_alone_when_a_later_part_fails(spec, corpus, settings_of, monkeypatch):
    """The first request's (or layer's) delta is in place when the second fails."""
    handle = tiny_handle("opt")
    alone = spec == "rome_identity"
    module = importlib.import_module("editors.rome" if alone else "editors.spread")
    name = "read_keys" if alone else "mean_over_contexts"
    real, calls = getattr(module, name), []

    def failing(*args):
        calls.append(bool(handle.applied))
        if len(calls) == 2:
            raise NumericalError("made to fail")
        return real(*args)

    monkeypatch.setattr(module, name, failing)
    bits, left = handle.weights_digest(), traces(handle)
    layers = (1,) if spec == "rome_identity" else (0, 1)
    with pytest.raises(NumericalError, match="made to fail"):
        get_editor(spec, **{**settings_of(spec, handle), "layers": layers}, **corpus).edit(handle, REQUESTS)
    assert calls == [False, True]
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("spec", SPECS)
def test_edits_on_top_of_edits_name_their_parents_and_equal_runs_are_equal(spec, corpus, settings_of):
    handle = tiny_handle("llama")
    editor = get_editor(spec, **settings_of(spec, handle), **corpus)
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
def test_a_sequence_survives_files(spec, corpus, settings_of, tmp_path, memory_kinds):
    """Whatever a method keeps of earlier edits comes back from disk, and leaves no trace in the model."""
    handle = tiny_handle("gptj" if method_of(spec).train is None else "llama")
    editor = get_editor(spec, **settings_of(spec, handle), **corpus)
    first = editor.edit(handle, REQUESTS[:1])
    loaded = load_saved(first.save(tmp_path / "first"))
    with loaded.applied(handle):
        bits = handle.weights_digest()
        second = editor.edit(handle, REQUESTS[1:], history=[first])
        assert editor.edit(handle, REQUESTS[1:], history=[loaded]).id == second.id
        assert handle.weights_digest() == bits
    assert second.parents == (first.id,)


@pytest.mark.parametrize("spec", SPECS)
def test_progress_is_told_to_the_end(spec, corpus, settings_of):
    told, handle = [], tiny_handle("llama")
    get_editor(spec, **settings_of(spec, handle), **corpus).edit(
        handle, REQUESTS, progress=lambda phase, done, total: told.append((phase, done, total))
    )
    last = {phase: (done, total) for phase, done, total in told}
    assert last
    assert all(done == total for done, total in last.values())
