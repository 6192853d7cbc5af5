"""What every gradient method promises: the facts fade, the patch is whole, the model is left alone."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from editors.unlearning import UNLEARNERS, get_unlearner
from editors.unlearning.trainer import UnlearningTrainer
from lab.arch import Role
from lab.errors import ConfigError, NumericalError, RequestError, UnknownNameError
from lab.patch import Dense, LowRank, WeightPatch
from lab.records import Fact
from lab.scoring import score_targets
from lab.tokens import join_target
from tests.tiny import tiny_handle, tiny_model

FORGET = [
    Fact("France", "capital", "Paris", "The capital of {} is", id="capital/France"),
    Fact("Barack Obama", "spouse", "Michelle Obama", "{}'s wife is", id="spouse/Barack Obama"),
]
RETAIN = [Fact("Japan", "capital", "Tokyo", "The capital of {} is", id="capital/Japan")]
# Other families: test_methods.py.
FAMILIES = ("gemma2",)
NAMES = (
    "ga", "graddiff", "kl", "npo", "npo_mean", "simnpo", "dpo", "refusal", "wga", "undial", "ce_u", "satimp",
)  # fmt: skip
# Random models know nothing, so nothing may stop a method that makes facts less likely than a guess.
QUICK = {"lr": 5e-3, "epochs": 5, "stop_above": None, "stop_retain": None}
MLP = (Role.MLP_IN, Role.MLP_UP, Role.MLP_OUT)
NEVER = {"stop_above": None, "stop_retain": None}
OWN = {
    # p^5 of a random model's answers lies below what AdamW can tell from 0.
    "satimp": {"saturation": 0.5},
    # There is next to nothing to take from an answer at 1 in 1000; a retained fact would weigh more.
    "undial": {"retain_weight": 0.0},
}


def settings_of(name):
    unread = {"ga": {"stop_retain"}, "ce_u": {"stop_retain"}, "refusal": {"stop_above"}}.get(name, set())
    return {key: value for key, value in (QUICK | OWN.get(name, {})).items() if key not in unread}


@functools.cache
def family_handle(family):
    return tiny_handle(family, layers=2, scale=1.5)


def traces(handle):
    """Everything training could leave behind besides weights."""
    return (
        [
            (name, type(m).__name__, len(m._forward_hooks), len(m._forward_pre_hooks), m.training)
            for name, m in handle.model.named_modules()
        ],
        [(name, p.requires_grad, p.grad is None) for name, p in handle.model.named_parameters()],
        handle.state,
    )


def logprob(handle, facts=FORGET):
    scores = score_targets(handle, [(fact.text, fact.object) for fact in facts])
    return sum(score.mean_logprob for score in scores) / len(scores)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name, family):
    handle = family_handle(family)
    bits, left, random = handle.weights_digest(), traces(handle), torch.random.get_rng_state()
    patch = get_unlearner(name, **settings_of(name)).unlearn(handle, FORGET, RETAIN)
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    assert torch.equal(torch.random.get_rng_state(), random)

    assert isinstance(patch, WeightPatch)
    assert patch.base == handle.fingerprint
    assert patch.provenance.method == name
    assert patch.provenance.requests == tuple(fact.to_json() for fact in FORGET)
    assert patch.provenance.config["lr"] == QUICK["lr"]
    assert patch.provenance.extra["updates"] == 5
    before = logprob(handle)
    with patch.applied(handle):
        after = logprob(handle)
    assert after < before - 0.1
    assert handle.weights_digest() == bits


@pytest.mark.parametrize("name", NAMES)
def test_every_row_says_what_it_is(name):
    row = UNLEARNERS.get(name)
    assert row.name == name
    assert row.title and row.cost and "arXiv" in row.paper
    assert (row.family, row.source) == ("parameter optimisation", "verified")


def test_a_saved_patch_is_the_same(tmp_path):
    patch = get_unlearner("npo", **QUICK).unlearn(family_handle("llama"), FORGET, RETAIN)
    again = WeightPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    assert again.provenance.to_json() == patch.provenance.to_json()


def plain_npo(logits, tail, head, before, beta):
    now = torch.log_softmax(logits[head - 1 : head - 1 + len(tail)], -1)[range(len(tail)), tail].sum()
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (before - now)), now


def test_the_change_equals_that_of_training_in_place():
    handle = tiny_handle("gpt2", layers=2, width=16, dtype=torch.float64)
    patch = get_unlearner("npo", lr=3e-3, epochs=4, beta=0.4, retain_weight=0.7, **NEVER).unlearn(
        handle, FORGET, RETAIN
    )
    model = tiny_model("gpt2", layers=2, width=16, dtype=torch.float64)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rows = [join_target(handle.tokenizer, fact.text, fact.object) for fact in FORGET]
    ((kept_head, kept_tail),) = [join_target(handle.tokenizer, RETAIN[0].text, RETAIN[0].object)]

    def logits(head, tail):
        return model(torch.tensor([[*head, *tail]])).logits[0]

    start = [plain_npo(logits(*row), row[1], len(row[0]), 0.0, 0.4)[1].detach() for row in rows]
    adam = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for _ in range(4):
        pairs = zip(rows, start, strict=True)
        terms = [plain_npo(logits(*row), row[1], len(row[0]), old, 0.4)[0] for row, old in pairs]
        table = torch.log_softmax(logits(kept_head, kept_tail), -1)
        kept = -table[range(len(kept_head) - 1, len(kept_head) + len(kept_tail) - 1), kept_tail].mean()
        adam.zero_grad()
        (torch.stack(terms).mean() + 0.7 * kept).backward()
        adam.step()
    assert set(patch.deltas) == set(before)
    for name, delta in patch.deltas.items():
        change = dict(model.named_parameters())[name].detach() - before[name]
        found = delta.dense().T if handle.named_weight(name).transposed else delta.dense()
        assert torch.allclose(found, change, atol=1e-9), name
    assert float(patch.deltas["transformer.wte.weight"].dense().abs().max()) > 5e-3


def test_references_are_those_of_the_untouched_model():
    handle = family_handle("llama")
    first = get_unlearner("npo", beta=0.5, **QUICK).unlearn(handle, FORGET).provenance.extra["history"]
    assert first[0]["forget"] == pytest.approx(2 / 0.5 * math.log(2), abs=1e-4)
    assert "retain" not in first[0]
    assert first[-1]["forget"] < first[0]["forget"] - 0.1
    held = get_unlearner("kl", **QUICK).unlearn(handle, FORGET, RETAIN).provenance.extra["history"]
    assert held[0]["retain"] == pytest.approx(0.0, abs=1e-5)
    assert held[1]["retain"] > 1e-4


def test_what_is_applied_already_is_part_of_the_untouched_model():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    earlier = get_unlearner("ga", **settings_of("ga")).unlearn(handle, FORGET[:1])
    with earlier.applied(handle):
        later = get_unlearner("npo", beta=0.5, **QUICK).unlearn(handle, FORGET[1:])
    assert later.parents == (earlier.id,)
    assert later.provenance.extra["history"][0]["forget"] == pytest.approx(4 * math.log(2), abs=1e-4)


def test_retained_facts_hold_better_with_a_retain_term():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    drops = {}
    for name in ("ga", "graddiff"):
        patch = get_unlearner(name, **settings_of(name)).unlearn(handle, FORGET, RETAIN)
        before = logprob(handle, RETAIN)
        with patch.applied(handle):
            drops[name] = before - logprob(handle, RETAIN)
    assert drops["graddiff"] < drops["ga"] - 0.5


def test_chosen_layers_and_adapters_change_nothing_else():
    handle = family_handle("llama")
    patch = get_unlearner("npo", weights="layers", layers=(1,), **QUICK).unlearn(handle, FORGET)
    prefix = handle.arch.path(Role.BLOCK, 1) + "."
    assert patch.deltas and all(name.startswith(prefix) for name in patch.deltas)
    assert all(isinstance(delta, Dense) and delta.norm() > 0 for delta in patch.deltas.values())
    bits, left = handle.weights_digest(), traces(handle)
    options = QUICK | {"lr": 0.02}
    small = get_unlearner("npo", weights="lora", layers=(0,), rank=2, **options).unlearn(handle, FORGET)
    assert set(small.deltas) == {handle.weight(role, 0).name for role in (Role.MLP_IN, Role.MLP_OUT)}
    assert all(isinstance(delta, LowRank) and delta.rank == 2 for delta in small.deltas.values())
    assert handle.weights_digest() == bits
    assert traces(handle) == left
    before = logprob(handle)
    with small.applied(handle):
        assert logprob(handle) < before - 0.05


def test_the_seed_decides_order_and_refusals_and_nothing_else_does():
    handle = family_handle("llama")

    def made(seed):
        unlearner = get_unlearner("dpo", seed=seed, batch_size=1, **QUICK)
        return unlearner.unlearn(handle, FORGET, RETAIN).id

    assert made(0) == made(0)
    assert made(0) != made(1)


def test_training_ends_where_the_facts_are_less_likely_than_a_guess():
    handle = tiny_handle("llama", layers=2)
    patch = get_unlearner("ga", lr=0.01, epochs=50, stop_above=1.2).unlearn(handle, FORGET)
    notes = patch.provenance.extra
    assert notes["stopped"] == "forget"
    assert 0 < notes["updates"] == len(notes["history"]) - 1 < 49
    limit = 1.2 * math.log(len(handle.tokenizer))
    assert -notes["history"][-1]["forget"] > limit > -notes["history"][-2]["forget"]


def test_training_ends_where_retained_facts_break_down():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    settings = {"lr": 0.01, "epochs": 50, "retain_weight": 1e-3, "stop_above": None, "stop_retain": 0.5}
    # The same city: what takes it from France takes it from Japan.
    retain = [Fact("Japan", "capital", "Paris", "The capital of {} is")]
    notes = get_unlearner("graddiff", **settings).unlearn(handle, FORGET[:1], retain).provenance.extra
    assert notes["stopped"] == "retain"
    assert 0 < notes["updates"] < 49
    assert notes["history"][-1]["retain"] > notes["history"][0]["retain"] + 0.5


def test_steps_and_progress_are_counted():
    handle = family_handle("gpt2")
    seen = []
    unlearner = get_unlearner("npo", batch_size=1, max_steps=3, **QUICK)
    patch = unlearner.unlearn(handle, FORGET, progress=lambda *told: seen.append(told))
    assert patch.provenance.extra["updates"] == 3
    assert [told for told in seen if told[0] == "steps"] == [("steps", done, 3) for done in (1, 2, 3)]


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_the_model_is_left_alone_when_training_is_interrupted(weights):
    handle = tiny_handle("gpt2", layers=2)
    bits, left = handle.weights_digest(), traces(handle)

    def interrupt(phase, done, total):
        if phase == "steps" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get_unlearner("npo", weights=weights, **QUICK).unlearn(handle, FORGET, RETAIN, progress=interrupt)
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_alone_when_a_loss_is_not_finite(name):
    handle = tiny_handle("llama", layers=1)
    handle.model.get_parameter(f"{handle.arch.path(Role.FINAL_NORM)}.weight").data[0] = float("inf")
    bits, left = handle.weights_digest(), traces(handle)
    with pytest.raises(NumericalError, match="step 0"):
        get_unlearner(name, **settings_of(name)).unlearn(handle, FORGET, RETAIN)
    assert handle.weights_digest() == bits
    assert traces(handle) == left


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ga", {"beta": 0.1}, "beta"),
        ("ga", {"retain_weight": 1.0}, "retain_weight"),
        ("npo", {"lr": 0.0}, "lr"),
        ("npo", {"beta": 0.0}, "beta"),
        ("npo", {"stop_above": -1.0}, "stop_above"),
        ("npo", {"weights": "some"}, "full"),
        ("npo", {"weights": "layers"}, "layers"),
        ("npo", {"layers": (0,)}, "layers"),
        ("npo", {"weights": "layers", "layers": (9,)}, "exist"),
        ("npo", {"weights": "lora", "modules": "head"}, "modules"),
        ("dpo", {"refusals": ()}, "refusals"),
    ],
)
def test_settings_that_make_no_sense(name, settings, said):
    handle = family_handle("llama")
    bits = handle.weights_digest()
    with pytest.raises(ConfigError, match=said):
        get_unlearner(name, **settings).unlearn(handle, FORGET)
    assert handle.weights_digest() == bits


def test_requests_that_cannot_be_carried_out():
    handle = family_handle("llama")
    with pytest.raises(RequestError, match="no facts"):
        get_unlearner("ga").unlearn(handle, [])
    with pytest.raises(RequestError, match="give some"):
        get_unlearner("graddiff").unlearn(handle, FORGET)
    with pytest.raises(RequestError, match="both"):
        get_unlearner("npo").unlearn(handle, FORGET, FORGET[:1])
    with pytest.raises(RequestError, match="exactly one"):
        get_unlearner("ga").unlearn(handle, [Fact("France", "capital", "Paris")])
    with pytest.raises(UnknownNameError, match="npo"):
        get_unlearner("npoo")


def test_half_precision_weights_are_not_trained_in_place():
    handle = tiny_handle("llama", layers=1, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="float32"):
        get_unlearner("ga").unlearn(handle, FORGET)


def test_more_retained_facts_beside_those_to_forget_and_all_before_one_comes_again(monkeypatch):
    retain = [
        replace(RETAIN[0], subject=name, id=name) for name in ("Japan", "Korea", "China", "India", "Nepal")
    ]
    seen = []
    plain = UnlearningTrainer.together

    def watched(self, kinds, picked, beside):
        seen.append(list(beside))
        return plain(self, kinds, picked, beside)

    monkeypatch.setattr(UnlearningTrainer, "together", watched)
    settings = {"lr": 1e-3, "epochs": 5, "batch_size": 1, "retain_batch": 3, **NEVER}
    get_unlearner("graddiff", **settings).unlearn(family_handle("llama"), FORGET, retain)
    assert [len(picked) for picked in seen] == [3] * 10
    flat = [index for picked in seen for index in picked]
    assert all(sorted(flat[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 30, 5))


@pytest.mark.parametrize(("weights", "roles"), [("mlp", MLP), ("mlp_out", (Role.MLP_OUT,))])
def test_the_matrices_of_an_mlp_alone(weights, roles):
    handle = family_handle("llama")
    patch = get_unlearner("npo", weights=weights, layers=(1,), **QUICK).unlearn(handle, FORGET)
    assert set(patch.deltas) == {handle.weight(role, 1).name for role in roles}


def test_training_ends_behind_a_pass_in_which_the_facts_were_known_too_little():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    start = math.exp(logprob(handle, FORGET[:1]))
    settings = {"lr": 1e-3, "epochs": 400, **NEVER, "stop_known": start / 2}
    patch = get_unlearner("npo", **settings).unlearn(handle, FORGET[:1])
    notes = patch.provenance.extra
    assert notes["stopped"] == "known"
    assert 1 < notes["updates"] == len(notes["history"]) < 400
    with patch.applied(handle):
        assert 0 < math.exp(logprob(handle, FORGET[:1])) < start / 2
