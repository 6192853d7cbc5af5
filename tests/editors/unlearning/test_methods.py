"""What every unlearner promises on every family: the facts fade, the patch is whole, the model is left alone."""

from __future__ import annotations

import functools

import pytest
import torch

from editors.unlearning import UNLEARNERS, get_unlearner
from lab.arch import Role
from lab.errors import NumericalError, RequestError
from lab.memory import MemoryPatch
from lab.patch import WeightPatch
from lab.patch_io import load_saved
from lab.stats import Corpus, StatsCache
from tests.editors.unlearning.test_gradient import FORGET, OWN, QUICK, RETAIN, logprob, traces
from tests.tiny import tiny_handle

FAMILIES = ("gpt2", "llama", "qwen3")
FURTHER = {
    **OWN,
    # A random model follows no instruction.
    "bidirectional": {"teacher": "masked", "retain_weight": 0.0},
    "pdu": {"retain_weight": 0.1},
    "simnpo": {"beta": 0.1},
    "icu": {"forgotten_below": 0.0, "retain_weight": 0.1, "distil_weight": 0.1},
    "tru": {"ascent_weight": 1.0},
    "klue": {"skip_forgotten": False, "share": 0.2},
    "lat": {"weights": "full", "epochs": 2, "inner_steps": 2},
    "ga_lora": {"mismatches": 2, "lr": 0.02},
    "stepping_stone": {"retain_weight": 0.0},
    "msa": {"keep_strength": 0.1},
    "ignore_k": {"method": "npo"},
    "rocr": {"layers": (0, 1), "mode": "noise", "ridge": 1e-3, "energy": 0.5},
    "needle": {"columns": 8, "candidates": 12, "mode": "zero"},
    "erase_edit": {"editor": "ft_m", "layers": (1,), "steps": 8, "lr": 0.02, "norm_constraint": None},
    "in_context": {"scope": "all", "layout": "plain"},
}

# Methods whose aim says nothing about answers that a model does not know: their own term falls instead.
OTHERWISE = ("pdu", "rmu", "adv_rmu")
# Methods that look for what a model knows; a random one knows nothing, so that they need only do something.
BLIND = ("rocr", "needle", "in_context", "roka", "klue")


def settings_of(name, resources=None):
    known = getattr(get_unlearner(name), "settings", frozenset())
    chosen = {key: value for key, value in QUICK.items() if key in known} | FURTHER.get(name, {})
    return chosen | ({key: resources[key] for key in resources if key in known} if resources else {})


@functools.cache
def family_handle(family):
    return tiny_handle(family, layers=2, scale=1.5)


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = "The capital of France is Paris and Michelle Obama is the wife of Barack Obama in the city"
    words = text.split()
    (folder / "corpus.txt").write_text(
        "\n\n".join(" ".join(words[n:] + words[:n]) for n in range(len(words)))
    )
    corpus = Corpus(str(folder / "corpus.txt"), max_tokens=600)
    return {"stats": StatsCache(folder / "stats"), "corpus": corpus}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", UNLEARNERS.names())
def test_contract(name, family, resources, tmp_path, memory_kinds):
    handle = family_handle(family)
    bits, left, random = handle.weights_digest(), traces(handle), torch.random.get_rng_state()
    patch = get_unlearner(name, **settings_of(name, resources)).unlearn(handle, FORGET, RETAIN)
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    assert torch.equal(torch.random.get_rng_state(), random)

    assert isinstance(patch, (WeightPatch, MemoryPatch))
    assert patch.base == handle.fingerprint
    assert patch.provenance.method == name
    assert patch.provenance.requests == tuple(fact.to_json() for fact in FORGET)
    assert load_saved(patch.save(tmp_path / "patch")).id == patch.id
    before = logprob(handle)
    with patch.applied(handle):
        after = logprob(handle)
    if name in OTHERWISE:
        history = patch.provenance.extra["history"]
        assert history[-1]["forget"] < 0.95 * history[0]["forget"]
    elif name in BLIND:
        assert abs(after - before) > 1e-3
    else:
        assert after < before - 0.05
    assert handle.weights_digest() == bits


@pytest.mark.parametrize("name", UNLEARNERS.names())
def test_every_row_says_what_it_is(name):
    row = UNLEARNERS.get(name)
    assert row.name == name
    assert row.title and row.cost and "arXiv" in row.paper
    assert row.family in ("parameter optimisation", "merging", "closed form", "surgery", "in-context")
    assert row.source in ("verified", "reconstructed")


@pytest.mark.parametrize("name", UNLEARNERS.names())
def test_facts_that_cannot_be_unlearned(name, resources):
    handle = family_handle("llama")
    unlearner = get_unlearner(name, **settings_of(name, resources))
    with pytest.raises(RequestError, match="no facts"):
        unlearner.unlearn(handle, [], RETAIN)
    with pytest.raises(RequestError, match="both"):
        unlearner.unlearn(handle, FORGET, [*RETAIN, FORGET[0]])


@pytest.mark.parametrize("name", [name for name in UNLEARNERS.names() if name not in ("in_context",)])
def test_the_model_is_left_alone_when_something_is_not_finite(name, resources):
    handle = tiny_handle("llama", layers=2)
    handle.model.get_parameter(handle.weight(Role.MLP_IN, 0).name).data[0] = float("inf")
    bits, left = handle.weights_digest(), traces(handle)
    with pytest.raises(NumericalError):
        get_unlearner(name, **settings_of(name, resources)).unlearn(handle, FORGET, RETAIN)
    assert handle.weights_digest() == bits
    assert traces(handle) == left
