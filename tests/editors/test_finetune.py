from __future__ import annotations

import pytest
import torch

from editors import get_editor
from editors.tuning import target_lines
from lab.arch import Role
from lab.errors import ConfigError
from lab.patch import Dense
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.tokens import join_target
from tests.reference.finetune import finetune
from tests.tiny import tiny_handle, tiny_model

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]


def logits_of(handle):
    batch = handle.encode(["The capital of France is", "Marie"])
    return handle.logits(batch)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("spec", "objective", "bound"),
    [("ft_l", "last", None), ("ft_l_inf", "last", 0.02), ("ft_m", "each", None)],
)
def test_the_change_equals_that_of_training_in_place(family, spec, objective, bound):
    handle = tiny_handle(family, dtype=torch.float64, width=16)
    settings = {"layers": (1,), "steps": 6, "lr": 0.01, "norm_constraint": bound}
    patch = get_editor(spec, **settings).edit(handle, REQUESTS)
    copy = tiny_model(family, dtype=torch.float64, width=16)
    name = handle.weight(Role.MLP_OUT, 1).name
    rows = [join_target(handle.tokenizer, request.text, request.target_new) for request in REQUESTS]
    assert len(rows[1][1]) > 1
    expected = finetune(
        copy, copy.get_parameter(name), rows, objective=objective, steps=6, lr=0.01, bound=bound
    )
    assert list(patch.deltas) == [name]
    delta = patch.deltas[name]
    assert isinstance(delta, Dense)
    stored = delta.delta.T if family == "gpt2" else delta.delta
    # Llama's norm computes in fp32 whatever the model is.
    assert torch.allclose(stored, expected, atol=1e-10 if family == "gpt2" else 1e-5)
    assert float(expected.abs().max()) > 0.019


def test_the_bound_is_kept_to_the_last_bit_and_reached():
    handle = tiny_handle("llama")
    patch = get_editor("ft_l_inf", layers=(1,), norm_constraint=3e-3, lr=1e-3).edit(handle, REQUESTS[:1])
    (delta,) = patch.deltas.values()
    assert float(delta.dense().abs().max()) == float(torch.tensor(3e-3))
    free = get_editor("ft_l", layers=(1,), lr=1e-3).edit(handle, REQUESTS[:1])
    assert max(float(delta.dense().abs().max()) for delta in free.deltas.values()) > 4e-3


def test_the_two_objectives_differ_exactly_in_targets_of_several_tokens():
    handle = tiny_handle("llama", dtype=torch.float64)

    def delta(spec, target):
        request = EditRequest("a", "The capital of {} is", "France", target)
        patch = get_editor(spec, layers=(1,), steps=3).edit(handle, [request])
        return next(iter(patch.deltas.values())).dense()

    one, several = " the", "Marie Curie"
    assert len(join_target(handle.tokenizer, "The capital of France is", one)[1]) == 1
    assert torch.allclose(delta("ft_l", one), delta("ft_m", one), atol=1e-14)
    assert not torch.allclose(delta("ft_l", several), delta("ft_m", several), atol=1e-4)


def test_losses_fall_on_target_tokens_only_and_a_row_does_not_depend_on_its_neighbours():
    handle = tiny_handle("gpt2", dtype=torch.float64)
    pairs = [(request.text, request.target_new) for request in REQUESTS]
    together = target_lines(handle, pairs)
    logits = handle.logits(together.batch, logits_to_keep=together.keep)
    losses = together.row_losses(together.of(logits))
    expected = [-score.mean_logprob for score in score_targets(handle, pairs)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    ends = [len(join_target(handle.tokenizer, *pair)[0]) - 1 for pair in pairs]
    assert together.batch.prompt_last is not None and together.batch.prompt_last.tolist() == ends
    alone = target_lines(handle, pairs[:1])
    logits = handle.logits(alone.batch, logits_to_keep=alone.keep)
    assert float(alone.row_losses(alone.of(logits))) == pytest.approx(expected[0], abs=1e-12)


def test_half_precision_losses_are_made_in_fp32_and_the_change_is_not_rounded_away():
    handle = tiny_handle("llama", dtype=torch.bfloat16)
    lines = target_lines(handle, [(REQUESTS[0].text, "Rome")])
    assert lines.of(handle.logits(lines.batch, logits_to_keep=lines.keep)).dtype == torch.float32
    bits = handle.weights_digest()
    patch = get_editor("ft_m", layers=(1,), steps=10, lr=2e-3).edit(handle, REQUESTS[:1])
    assert handle.weights_digest() == bits
    (delta,) = patch.deltas.values()
    assert delta.dense().dtype == torch.float32
    pair = [(REQUESTS[0].text, "Rome")]
    before = score_targets(handle, pair)[0].mean_logprob
    with patch.applied(handle, mode="sidecar"):
        assert score_targets(handle, pair)[0].mean_logprob > before + 0.05


def test_a_layer_is_its_number_and_not_the_start_of_another():
    handle = tiny_handle("llama", layers=12, width=16)
    for role in (Role.MLP_OUT, Role.MLP_IN, Role.ATTN_OUT):
        patch = get_editor("ft_m", layers=(1,), role=role.value, steps=1).edit(handle, REQUESTS[:1])
        assert list(patch.deltas) == [handle.weight(role, 1).name]


def test_training_stops_when_the_target_is_learned_and_does_not_start_when_it_is_known():
    handle = tiny_handle("llama")
    patch = get_editor("ft_m", layers=(0, 1), lr=0.01, stop_below=1.2, steps=100).edit(handle, REQUESTS)
    notes = patch.provenance.extra
    assert notes["losses"][-1] < 1.2 < notes["losses"][-2]
    assert notes["updates"] == len(notes["losses"]) - 1 < 99
    none = get_editor("ft_m", layers=(1,), stop_below=1e3).edit(handle, REQUESTS)
    assert none.provenance.extra["updates"] == 0
    assert all(norm == 0 for norm in none.norms().values())


def test_a_blank_before_the_target_makes_no_second_blank():
    handle = tiny_handle("llama")
    editor = get_editor("ft_m", layers=(1,), steps=2)
    plain = editor.edit(handle, [EditRequest("a", "The capital of {} is", "France", "Rome")])
    spaced = editor.edit(handle, [EditRequest("a", "The capital of {} is", "France", " Rome")])
    assert plain.id == spaced.id


def test_many_requests_share_updates_by_batch():
    handle = tiny_handle("llama")
    few = get_editor("ft_m", layers=(1,), steps=3, batch_size=1).edit(handle, REQUESTS)
    assert few.provenance.extra["updates"] == 6
    assert [entry["id"] for entry in few.provenance.extra["last"]] == ["a", "b"]


def test_it_trains_where_gradients_are_switched_off():
    handle = tiny_handle("llama")
    editor = get_editor("ft_m", layers=(1,), steps=2)
    with torch.no_grad():
        patch = editor.edit(handle, REQUESTS[:1])
    assert patch.id == editor.edit(handle, REQUESTS[:1]).id


@pytest.mark.parametrize(
    ("spec", "settings", "said"),
    [
        ("ft_l", {"norm_constraint": 0.1}, "ft_l_inf"),
        ("ft_l_inf", {"norm_constraint": None}, "needs norm_constraint"),
        ("ft_l_inf", {"norm_constraint": -1.0}, "positive"),
        ("ft_m", {"role": "embed"}, "role"),
        ("ft_m", {"layers": (7,)}, "exist"),
        ("ft_m", {"lr": 0.0}, "lr"),
        ("ft_m", {"step": 3}, "steps"),
        ("ft_m", {"prefixes": ["I. {}"]}, "prefixes"),
    ],
)
def test_settings_that_make_no_sense(spec, settings, said):
    with pytest.raises(ConfigError, match=said):
        get_editor(spec, **settings).edit(tiny_handle("llama"), REQUESTS)


def test_penalties_belong_to_methods_that_search_a_value():
    with pytest.raises(ConfigError, match="no value"):
        get_editor("ft_m+sadr")
