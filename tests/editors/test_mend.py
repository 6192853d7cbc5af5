from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from editors import edit_many, get_editor
from editors.lessons import divide
from editors.mend import MendConfig, MendLearner, load_mend, make_network, train_mend
from editors.mend_network import RunningMoments, edit_losses, edited_weights, gradient_factors
from editors.tuning import target_lines
from editors.values import frozen
from lab.arch import Role
from lab.errors import BaseMismatchError, ConfigError, DataError, OutputExistsError, PatchFormatError
from lab.records import EditRequest
from lab.scoring import score_targets
from tests.lessons import small_lessons
from tests.reference.mend import plain_update
from tests.tiny import FAMILIES, tiny_handle

PAIRS = [("The capital of France is", "Rome"), ("Barack Obama's wife is", "Marie Curie")]
REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]
QUICK = {
    "blocks": 2, "rank": 8, "lr": 3e-3, "rate_lr": 1e-3, "edit_rate": 3e-3, "lessons_per_step": 2,
    "eval_every": 2, "steps": 4,
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_factors_multiply_to_the_gradient_of_the_weight(family):
    handle = tiny_handle(family)
    weights = edited_weights(handle, (1, 2))
    assert {weight.role for weight in weights} == {Role.MLP_IN, Role.MLP_OUT}
    lines = target_lines(handle, PAIRS)
    with frozen(handle.model):
        factors, losses = gradient_factors(handle, weights, lines)
    assert losses.tolist() == pytest.approx(
        [-score.mean_logprob for score in score_targets(handle, PAIRS)], abs=1e-5
    )
    parameters = [handle.named_weight(weight.name).parameter for weight in weights]
    for parameter in parameters:
        parameter.requires_grad_(True)
    logits = handle.logits(lines.batch, grad=True, logits_to_keep=lines.keep)
    gradients = torch.autograd.grad(lines.row_losses(lines.of(logits)).sum(), parameters)
    for weight, gradient in zip(weights, gradients, strict=True):
        own = factors[weight.name]
        expected = gradient.T if weight.transposed else gradient
        assert own.grads.T @ own.inputs == pytest.approx(expected.numpy(), abs=1e-4)
        assert float(expected.abs().max()) > 1e-3


def test_terms_are_tokens_that_a_gradient_reaches_and_rows_do_not_mix():
    handle = tiny_handle("gpt2", dtype=torch.float64)
    weights = edited_weights(handle, (1, 2))
    lines = target_lines(handle, PAIRS)
    with frozen(handle.model):
        factors, _ = gradient_factors(handle, weights, lines)
        alone, _ = gradient_factors(handle, weights, target_lines(handle, PAIRS[:1]))
    top = factors[handle.weight(Role.MLP_OUT, 2).name]
    assert len(top.row) == len(lines.label)
    lower = factors[handle.weight(Role.MLP_OUT, 1).name]
    assert len(lower.row) == int(lines.batch.lengths.sum())
    for name, single in alone.items():
        mine = factors[name].row == 0
        assert torch.allclose(factors[name].inputs[mine], single.inputs, atol=1e-12)
        assert torch.allclose(factors[name].grads[mine], single.grads, atol=1e-12)


def test_running_moments_are_those_of_all_rows():
    rows = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 1e3
    moments = RunningMoments(5, torch.float64)
    for chunk in (rows[:1], rows[1:1], rows[1:8], rows[8:]):
        moments.update(chunk)
    assert torch.allclose(moments.mean, rows.mean(dim=0), rtol=1e-12)
    assert torch.allclose(moments.spread, rows.std(dim=0), rtol=1e-9)
    out = moments(rows)
    assert torch.allclose(out.mean(dim=0), torch.zeros(5, dtype=torch.float64), atol=1e-9)


def test_a_feature_that_never_moved_does_not_explode():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    rows[:, 0] = 0
    moments = RunningMoments(4, torch.float32)
    moments.update(rows)
    awake = torch.zeros(1, 4)
    awake[0, 0] = 1.0
    assert float(moments(awake)[0, 0]) < 1e3
    single = RunningMoments(4, torch.float32)
    single.update(rows[:1])
    assert torch.equal(single(rows[:1]), torch.zeros(1, 4))


def observed(family="gpt2", *, scatter=True, rank=3, **options):
    """A small fp64 model, a network that has seen gradients, and their factors."""
    handle = tiny_handle(family, dtype=torch.float64, width=8, layers=2, **options)
    network = make_network(handle, (0, 1), rank, 0.05, seed=1)
    lines = target_lines(handle, PAIRS)
    with frozen(handle.model):
        factors, _ = gradient_factors(handle, network.weights, lines)
    network.observe(factors)
    if scatter:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return handle, network, factors


def test_the_update_equals_the_plain_one():
    _, network, factors = observed()
    updates = network(factors)
    state = network.state_dict()
    assert len(network.networks) == 2 and len(network.weights) == 4
    for number, weight in enumerate(network.weights):
        left, right = updates[weight.name]
        own = factors[weight.name]
        expected = plain_update(
            state, weight.group, network.index[weight.name], state["rates"][number], own.inputs, own.grads
        )
        assert torch.allclose(left @ right, expected, atol=1e-12)
        assert float(expected.abs().max()) > 1e-3


def test_it_starts_as_a_descent_step_on_the_normalised_gradient_and_all_of_it_learns():
    handle, network, factors = observed(scatter=False)
    weight = network.weights[1]
    left, right = network(factors)[weight.name]
    group = network.networks[weight.group]
    own = factors[weight.name]
    assert torch.allclose(
        left @ right, -0.05 * group.grads(own.grads).T @ group.inputs(own.inputs), atol=1e-12
    )
    with frozen(handle.model):
        edit, locality = edit_losses(handle, network, factors, target_lines(handle, PAIRS))
    (edit + locality).backward()
    for name, parameter in network.named_parameters():
        # B = 0 at the start keeps the gradient from A and from the scale for one step.
        assert name.endswith((".down", ".scale")) or float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_gradients_equal_finite_differences(family):
    handle, network, factors = observed(family, rank=2)
    lines = target_lines(handle, PAIRS)

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self):
            edit, locality = edit_losses(handle, self.network, factors, lines)
            return 0.3 * edit + locality

    loss = Loss()
    names = [name for name, _ in loss.named_parameters()]
    values = tuple(parameter.detach().clone().requires_grad_() for parameter in loss.parameters())

    def of(*parameters):
        return torch.func.functional_call(loss, dict(zip(names, parameters, strict=True)), ())

    with frozen(handle.model):
        assert torch.autograd.gradcheck(of, values, fast_mode=True, atol=1e-6)


def test_the_losses_are_those_of_the_applied_patch():
    from lab.patch import LowRank, Provenance, WeightPatch
    from lab.scoring import kl_divergence

    handle, network, factors = observed()
    lines = target_lines(handle, PAIRS)
    with frozen(handle.model), torch.no_grad():
        edit, locality = edit_losses(handle, network, factors, lines)
        updates = {name: LowRank(*parts) for name, parts in network(factors).items()}
    before = lines.of(handle.logits(lines.batch, logits_to_keep=lines.keep))
    with WeightPatch(handle.fingerprint, updates, Provenance("by hand")).applied(handle):
        after = lines.of(handle.logits(lines.batch, logits_to_keep=lines.keep))
    other = lines.row == 1
    assert float(edit) == pytest.approx(float(lines.row_losses(after)[0]), abs=1e-10)
    assert float(locality) == pytest.approx(float(kl_divergence(before[other], after[other])), abs=1e-10)
    assert float(locality) > 1e-4


# -- training -----------------------------------------------------------------------------------------------------


def test_training_lowers_the_validation_loss_and_leaves_the_model_alone(tmp_path):
    handle = tiny_handle("llama", scale=1.5)
    bits, grads = handle.weights_digest(), [p.requires_grad for p in handle.model.parameters()]
    random_state = torch.random.get_rng_state()
    told = []
    trained = train_mend(
        handle, small_lessons(), tmp_path / "net", settings={**QUICK, "steps": 30, "eval_every": 10, "edit_weight": 1.0},
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert handle.weights_digest() == bits
    assert [p.requires_grad for p in handle.model.parameters()] == grads
    assert all(p.grad is None for p in handle.model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    history = trained.card["training"]["network"]["history"]
    best = min(figures["loss"] for figures in history)
    assert best < 0.9 * history[0]["loss"]
    assert [figures["step"] for figures in history] == [0, 10, 20, 30]
    assert told[-1] == ("training", 30, 30)
    network, again = load_mend(tmp_path / "net", handle)
    assert again.id == trained.id
    learner = MendLearner(handle, network, MendConfig(**QUICK, edit_weight=1.0))
    held = divide(small_lessons()).validation
    assert learner.validate(held)["loss"] == pytest.approx(best, rel=1e-5)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    handle = tiny_handle("llama")
    whole = train_mend(handle, small_lessons(), tmp_path / "whole", settings=QUICK)
    bits = handle.weights_digest()

    def stop(phase, done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_mend(handle, small_lessons(), tmp_path / "parts", settings=QUICK, progress=stop)
    assert handle.weights_digest() == bits
    assert not (tmp_path / "parts").exists()
    steps = []
    parts = train_mend(
        handle,
        small_lessons(),
        tmp_path / "parts",
        settings=QUICK,
        progress=lambda *told: steps.append(told[1]),
    )
    assert steps[0] == 3
    assert parts.id == whole.id
    assert parts.card["training"] == whole.card["training"]
    fresh = train_mend(
        handle,
        small_lessons(),
        tmp_path / "fresh",
        settings=QUICK,
        work=tmp_path / "parts.work",
        resume=False,
    )
    assert fresh.id == whole.id


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    handle = tiny_handle("llama")
    train_mend(handle, small_lessons(), tmp_path / "net", settings=QUICK)
    with pytest.raises(ConfigError, match=r"differs in lr\b"):
        train_mend(
            handle,
            small_lessons(),
            tmp_path / "new",
            work=tmp_path / "net.work",
            settings={**QUICK, "lr": 1e-3},
        )
    longer = train_mend(
        handle, small_lessons(), tmp_path / "new", work=tmp_path / "net.work", settings={**QUICK, "steps": 6}
    )
    assert longer.card["training"]["network"]["steps"] == 6
    with pytest.raises(OutputExistsError):
        train_mend(handle, small_lessons(), tmp_path / "net", settings=QUICK)


def test_it_stops_when_validation_no_longer_improves_and_keeps_the_best(tmp_path):
    handle = tiny_handle("llama")
    settings = {**QUICK, "lr": 0.5, "rate_lr": 0.5, "steps": 40, "eval_every": 1, "patience": 3}
    training = train_mend(handle, small_lessons(), tmp_path / "net", settings=settings).card["training"][
        "network"
    ]
    best = min(training["history"], key=lambda figures: figures["loss"])
    assert training["best_step"] == best["step"]
    assert training["steps"] == training["best_step"] + 3 < 40


def test_lessons_that_do_not_suffice(tmp_path):
    handle = tiny_handle("llama")
    with pytest.raises(DataError, match="two subjects"):
        train_mend(handle, small_lessons()[:1], tmp_path / "net", settings=QUICK)
    bare = [replace(lesson, locality=()) for lesson in small_lessons()]
    with pytest.raises(DataError, match="stay as it is"):
        train_mend(handle, bare, tmp_path / "net", settings=QUICK)
    patch = get_editor("ft_m", layers=(1,), steps=1).edit(handle, REQUESTS[:1])
    with patch.applied(handle), pytest.raises(ConfigError, match="applied"):
        train_mend(handle, small_lessons(), tmp_path / "net", settings=QUICK)
    for wrong in ({"blocks": 0}, {"layers": (2, 1)}, {"layers": (9,)}, {"edit_weight": -1.0}, {"setps": 3}):
        with pytest.raises(ConfigError):
            train_mend(handle, small_lessons(), tmp_path / "net", settings={**QUICK, **wrong})


# -- the editor ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mend") / "net"
    train_mend(tiny_handle("llama"), small_lessons(), folder, settings=QUICK)
    return folder


def test_a_patch_of_several_requests_is_the_sum_of_single_ones(network):
    handle = tiny_handle("llama")
    editor = get_editor("mend", network=str(network))
    together = editor.edit(handle, REQUESTS)
    single = edit_many(editor, handle, REQUESTS)
    assert [patch.provenance.requests for patch in single] == [(request.to_json(),) for request in REQUESTS]
    for name, delta in together.deltas.items():
        total = sum(patch.deltas[name].dense() for patch in single)
        assert torch.allclose(delta.dense(), total, atol=1e-6)
        assert delta.rank == sum(patch.deltas[name].rank for patch in single)
    alone = get_editor("mend", network=str(network), batch_size=1).edit(handle, REQUESTS)
    for name, delta in together.deltas.items():
        assert torch.allclose(delta.dense(), alone.deltas[name].dense(), atol=1e-5)
    assert together.provenance.config == {"network": load_mend(network, handle)[1].id}


def test_another_model_and_folders_that_hold_no_network_are_refused(network, tmp_path):
    with pytest.raises(BaseMismatchError, match="train one for this model with `knowlab train-editor mend"):
        get_editor("mend", network=str(network)).edit(tiny_handle("llama", seed=1), REQUESTS)
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="train-editor mend"):
        get_editor("mend").edit(handle, REQUESTS)
    with pytest.raises(PatchFormatError, match="holds no network"):
        get_editor("mend", network=str(tmp_path)).edit(handle, REQUESTS)
    for change, said in (
        ({"editor": "serac"}, "serac"),
        ({"format": "x"}, "'x'"),
        ({"layers": [0]}, "readable"),
    ):
        copy = tmp_path / said.strip("'")
        copy.mkdir()
        for file in network.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        card = json.loads((copy / "network.json").read_text())
        (copy / "network.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(PatchFormatError, match=said):
            get_editor("mend", network=str(copy)).edit(handle, REQUESTS)
    (copy / "network.json").write_text(json.dumps(card))
    (copy / "network.safetensors").write_bytes((copy / "network.safetensors").read_bytes()[:-4] + b"1234")
    with pytest.raises(PatchFormatError, match="checksum"):
        get_editor("mend", network=str(copy)).edit(handle, REQUESTS)
    with pytest.raises(ConfigError, match="preset"):
        get_editor("mend", network=str(network), preset="atlas").edit(handle, REQUESTS)


def test_the_last_blocks_are_edited_unless_others_are_named():
    handle = tiny_handle("llama")
    assert MendConfig(blocks=2).chosen_layers(handle) == (1, 2)
    assert MendConfig(blocks=9).chosen_layers(handle) == (0, 1, 2)
    assert MendConfig(layers=(0,)).chosen_layers(handle) == (0,)
    rng = random.Random(0)
    assert {small_lessons()[0].pair(rng)[0] for _ in range(30)} == {
        "The capital of France is", "France has its capital in", "Fact: the capital of France is"
    }  # fmt: skip
