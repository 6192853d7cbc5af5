from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from editors import get_editor
from editors.rows import request_rows
from editors.ultraedit import KIND, Moments, UltraEditConfig, read_signals, ridge_factors
from lab.arch import Role
from lab.errors import BaseMismatchError, ConfigError, NumericalError, RequestError, UnsupportedModelError
from lab.handle import ModelHandle
from lab.patch import Dense, LowRank, WeightPatch
from lab.records import EditRequest
from tests.reference.closed_forms import PlainUltraEdit
from tests.reference.value_search import PlainRow
from tests.tiny import tiny_handle

BATCHES = [
    [
        EditRequest("a", "The capital of {} is", "France", "Rome"),
        EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie of Paris"),
        EditRequest("c", "The mother tongue of {} is the language", "Danielle Darrieux", "English"),
    ],
    [EditRequest("d", "{} plays the", "Toko Yasuda", "piano")],
]
LLAMA = {"layers": (2,), "gate_layers": (0, 1), "up_layers": (1,)}
LLAMA_PLACES = [(Role.MLP_OUT, 2), (Role.MLP_IN, 0), (Role.MLP_IN, 1), (Role.MLP_UP, 1)]
CASES = [
    ("llama", LLAMA, LLAMA_PLACES),
    ("gpt2", {"layers": (0, 2)}, [(Role.MLP_OUT, 0), (Role.MLP_OUT, 2)]),
    ("opt", {"layers": (1,), "gate_layers": (1,)}, [(Role.MLP_OUT, 1), (Role.MLP_IN, 1)]),
]


def plain_rows(handle, requests):
    rows = [row for request in requests for row in request_rows(handle, request, ["{}"])]
    return [PlainRow(row.ids, row.change, row.prompt_last, row.targets) for row in rows]


@pytest.mark.parametrize("family, where, places", CASES)
def test_a_sequence_equals_the_plain_one(family, where, places, tmp_path):
    """Row by row without padding, a running mean and deviation per shape, dense solves, weights written in place."""
    handle = tiny_handle(family, dtype=torch.float64)
    plain = ModelHandle.wrap(copy.deepcopy(handle.model).requires_grad_(False), handle.tokenizer)
    reference = PlainUltraEdit(plain.model, [plain.module(*place) for place in places], lr=1e-3)
    history: list[WeightPatch] = []
    for index, requests in enumerate(BATCHES):
        patch = get_editor("ultraedit", lr=1e-3, batch_size=2, **where).edit(
            handle, requests, history=history
        )
        patch.apply(handle)
        history.append(WeightPatch.load(patch.save(tmp_path / str(index))))
        reference.batch(plain_rows(plain, requests))
        for place in places:
            ours, theirs = (each.weight(*place).parameter.detach() for each in (handle, plain))
            change = theirs - handle.stack.pristine(handle.weight(*place).name, ours)
            assert float(change.norm()) > 1e-3
            # The plain one divides by the bare deviation; ours adds fp32's rounding of the feature.
            assert float((ours - theirs).norm()) < 1e-5 * float(change.norm())


def test_a_row_does_not_feel_its_neighbours():
    """Padding that enters the loss, or a loss averaged over the batch, would make a request depend on what it is edited with."""
    handle = tiny_handle("llama", dtype=torch.float64)
    together = UltraEditConfig(**LLAMA, batch_size=3)
    alone = dataclasses.replace(together, batch_size=1)
    one, two = (read_signals(handle, BATCHES[0], config, None) for config in (together, alone))
    assert one[1] == pytest.approx(two[1], abs=1e-10)
    lengths = [len(row.ids) for row in plain_rows(handle, BATCHES[0])]
    assert len(set(lengths)) > 1
    for place, signals in one[0].items():
        assert len(signals.inputs) == len(signals.gradients) == sum(lengths)
        assert torch.allclose(signals.inputs, two[0][place].inputs, atol=1e-10, rtol=0)
        assert torch.allclose(signals.gradients, two[0][place].gradients, atol=1e-10, rtol=0)
    # The last token of each row predicts the last target token, so its gradient is never empty.
    ends = torch.tensor(lengths).cumsum(0) - 1
    assert float(one[0][Role.MLP_OUT, 2].gradients[ends].norm(dim=1).min()) > 1e-6


def test_every_request_counts_whatever_the_batch_size():
    handle = tiny_handle("gpt2")
    editor = get_editor("ultraedit", layers=(1,), lr=1e-3, batch_size=2)
    three, two = editor.edit(handle, BATCHES[0]), editor.edit(handle, BATCHES[0][:2])
    assert [each["id"] for each in three.provenance.extra["losses"]] == ["a", "b", "c"]
    counts = [len(row.ids) for row in plain_rows(handle, BATCHES[0])]
    assert three.provenance.extra["tokens"] == sum(counts)
    assert two.provenance.extra["tokens"] == sum(counts[:2])
    assert get_editor("ultraedit", layers=(1,), lr=1e-3, batch_size=7).edit(handle, BATCHES[0]).norms() == (
        pytest.approx(three.norms(), rel=1e-3)
    )


def test_answer_tokens_only_and_never_one_alone():
    """The released running deviation of a single token is not a number."""
    handle = tiny_handle("llama")
    editor = get_editor("ultraedit", layers=(1,), tokens="answer")
    patch = editor.edit(handle, BATCHES[0])
    targets = sum(len(row.targets) for row in plain_rows(handle, BATCHES[0]))
    assert patch.provenance.extra["tokens"] == targets
    single = EditRequest("p", "The capital of {} is", "France", "Paris")
    assert len(plain_rows(handle, [single])[0].targets) == 1
    with pytest.raises(RequestError, match="single token"):
        editor.edit(handle, [single])
    later = editor.edit(handle, [single], history=[patch])
    assert later.provenance.extra["normalised_over"] == {"32x64": targets + 1}
    assert next(iter(later.norms().values())) > 0


def test_moments_pool_exactly_in_any_order():
    values = torch.randn(11, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 7
    whole = Moments.of(values)
    parts = [Moments.of(values[cut]) for cut in (slice(0, 1), slice(1, 7), slice(7, 11))]
    for order in ((0, 1, 2), (2, 0, 1)):
        pooled = parts[order[0]].pooled(parts[order[1]]).pooled(parts[order[2]])
        assert float(pooled.count) == 11
        assert torch.allclose(pooled.mean, whole.mean, atol=1e-12)
        assert torch.allclose(pooled.square, whole.square, atol=1e-11)
    normal = whole.normalise(values)
    assert torch.allclose(normal.mean(0), torch.zeros(5, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(normal.std(0), torch.ones(5, dtype=torch.float64), atol=1e-6)


def test_a_feature_that_never_varies_stays_out():
    values = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values[:, 0], values[:, 1] = 0.0, 5.0 + 1e-12 * values[:, 1]
    normal = Moments.of(values).normalise(values)
    assert not normal[:, 0].any()
    assert float(normal[:, 1].abs().max()) < 1e-3
    assert float(normal[:, 2].abs().max()) > 0.5


@pytest.mark.parametrize("tokens", [4, 30])
def test_the_regression_is_solved_the_short_way(tokens):
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(tokens, 12, dtype=torch.float64, generator=generator)
    values = torch.randn(tokens, 7, dtype=torch.float64, generator=generator)
    left, right = ridge_factors(inputs, values)
    assert left.shape[1] == right.shape[0] == min(tokens, 12)
    system = inputs.T @ inputs + torch.eye(12, dtype=torch.float64)
    assert torch.allclose((left @ right).T, torch.linalg.solve(system, inputs.T @ values), atol=1e-12)


def test_few_tokens_give_thin_factors_and_many_a_full_delta():
    handle = tiny_handle("llama")
    editor = get_editor("ultraedit", layers=(1,), lr=1e-3)
    (thin,) = editor.edit(handle, BATCHES[1]).deltas.values()
    (full,) = editor.edit(handle, BATCHES[0]).deltas.values()
    assert isinstance(thin, LowRank) and thin.rank < 22
    assert isinstance(full, Dense)


def test_history_is_pooled_and_belongs_to_one_model():
    handle = tiny_handle("llama")
    editor = get_editor("ultraedit", layers=(1,), lr=1e-3)
    first = editor.edit(handle, BATCHES[0])
    (carry,) = first.carry
    assert carry.kind == KIND
    with first.applied(handle):
        free, held = (editor.edit(handle, BATCHES[1], history=past) for past in ((), (first,)))
        assert held.id != free.id
        count = sum(patch.provenance.extra["tokens"] for patch in (first, free))
        assert held.provenance.extra["normalised_over"] == {"32x64": count}
        # What a patch carries is its own part; pooling it twice would count tokens twice.
        both = free.carry[0].tensors
        assert all(torch.equal(both[name], tensor) for name, tensor in held.carry[0].tensors.items())
    with pytest.raises(BaseMismatchError):
        editor.edit(tiny_handle("llama", seed=1), BATCHES[1], history=[first])


def test_a_loss_that_is_no_number_names_the_request():
    handle = tiny_handle("llama")
    handle.model.get_parameter("model.norm.weight").data[0] = float("inf")
    bits = handle.weights_digest()
    with pytest.raises(NumericalError, match="'a'"):
        get_editor("ultraedit", layers=(1,)).edit(handle, BATCHES[0])
    assert handle.weights_digest() == bits


def test_refuses_what_it_cannot_use():
    handle = tiny_handle("gpt2")
    with pytest.raises(UnsupportedModelError, match="mlp_up"):
        get_editor("ultraedit", up_layers=(1,)).edit(handle, BATCHES[0])
    with pytest.raises(ConfigError, match="steps"):
        get_editor("ultraedit", steps=3).edit(handle, BATCHES[0])
    with pytest.raises(ConfigError, match="plain prompt"):
        get_editor("ultraedit", prefixes=["I. {}"]).edit(handle, BATCHES[0])
    with pytest.raises(ConfigError, match="searches no value"):
        get_editor("ultraedit+sadr")
    with pytest.raises(ConfigError, match="do not all exist"):
        get_editor("ultraedit", layers=(9,)).edit(handle, BATCHES[0])
    for wrong in ({"lr": 0.0}, {"tokens": "subject"}, {"batch_size": 0}, {"layers": ()}):
        with pytest.raises(ConfigError):
            UltraEditConfig(**{"layers": (1,), **wrong})
