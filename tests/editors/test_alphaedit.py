from __future__ import annotations

import copy
import logging

import pytest
import torch

from editors import edit_many, get_editor
from editors.alphaedit import KIND, AlphaEditConfig
from editors.keys import mean_over_contexts, read_keys
from editors.prefixes import Prefixes
from editors.rows import essence_row, request_rows
from lab.arch import Role
from lab.errors import BaseMismatchError, ConfigError
from lab.handle import ModelHandle
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.solve import PastGram, null_space, null_space_factors
from tests.editors.test_rome import TEXTS, corpus
from tests.reference.closed_forms import PlainAlphaEdit, alphaedit_dense, dense_projector
from tests.reference.value_search import PlainRow, plain_value_search
from tests.tiny import tiny_handle

__all__ = ["corpus"]

PREFIXES = Prefixes.of(TEXTS)
BATCHES = [
    [
        EditRequest("a", "The capital of {} is", "France", "Rome"),
        EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
    ],
    [EditRequest("c", "The mother tongue of {} is", "Danielle Darrieux", "English")],
    [
        EditRequest("d", "{} plays the", "Toko Yasuda", "piano"),
        EditRequest("e", "The religion of {} is", "Edwin of Northumbria", "Kenya"),
    ],
]
SEARCH = {"steps": 5, "lr": 0.5, "weight_decay": 0.5, "clamp": 4.0, "kl_factor": 0.0625}
RULE = {"l2": 0.1, "nullspace_threshold": 0.3, "threshold_mode": "relative"}
SETTINGS = {"layers": (0, 1), "prefixes": TEXTS, **SEARCH, **RULE}


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_row(row):
    return PlainRow(row.ids, row.change, row.prompt_last, row.targets)


def searched(handle, request, layer):
    """The value by the plain search, on the model as it stands."""
    found = plain_value_search(
        handle.model,
        handle.module(Role.BLOCK, layer),
        [plain_row(row) for row in request_rows(handle, request, PREFIXES.flat)],
        plain_row(essence_row(handle, request)),
        **SEARCH,
    )
    return found.init + found.delta


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sequence_of_batches_equals_the_official_one(family, corpus, tmp_path):
    """The official loop writes weights and sums keys in a matrix; ours carries keys from patch to patch, through files too."""
    handle = tiny_handle(family, dtype=torch.float64)
    handle.model.set_attn_implementation("eager" if family == "gpt2" else "sdpa")
    plain = ModelHandle.wrap(copy.deepcopy(handle.model), handle.tokenizer)
    stats = corpus["stats"].get(handle, [0, 1], corpus["corpus"])
    projectors = [
        dense_projector(stats[layer].moment, 0.3 * float(stats[layer].moment.diagonal().mean()))
        for layer in (0, 1)
    ]
    downs = [plain.module(Role.MLP_OUT, layer) for layer in (0, 1)]
    official = PlainAlphaEdit(plain.model, downs, plain.module(Role.BLOCK, 1), projectors, RULE["l2"])
    history: list[WeightPatch] = []
    for index, requests in enumerate(BATCHES):
        patch = get_editor("alphaedit", **SETTINGS, **corpus).edit(handle, requests, history=history)
        assert patch.provenance.extra["history"]["keys"] == sum(len(batch) for batch in BATCHES[:index])
        patch.apply(handle)
        history.append(WeightPatch.load(patch.save(tmp_path / str(index))))
        rows = [
            [plain_row(row) for row in request_rows(plain, request, PREFIXES.flat)] for request in requests
        ]
        official.batch(rows, [searched(plain, request, 1) for request in requests])
        for layer in (0, 1):
            ours, theirs = (each.weight(Role.MLP_OUT, layer) for each in (handle, plain))
            change = theirs.parameter.detach() - handle.stack.pristine(ours.name, ours.parameter)
            assert float(change.norm()) > 1e-2
            assert torch.allclose(ours.parameter, theirs.parameter, atol=1e-10, rtol=0)


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("past", [0, 7])
def test_the_small_system_equals_the_official_one(past, share):
    keys, residuals, before = random(24, 5), random(10, 5, seed=1), random(24, past, seed=2)
    moment = random(40, 24, seed=3).T @ random(40, 24, seed=3) / 40
    threshold = float(torch.linalg.eigvalsh(moment).quantile(share))
    projector = null_space(moment, threshold)
    assert projector.complement is (share > 0.5)
    left, right = null_space_factors(projector, keys, residuals, before, 0.7)
    dense = dense_projector(moment, threshold)
    expected = alphaedit_dense(dense, keys, residuals, before @ before.T, 0.7)
    assert left.shape == (10, 5) and right.shape == (5, 24)
    assert torch.allclose(left @ right, expected, atol=1e-12, rtol=0)
    outside = torch.eye(24, dtype=torch.float64) - dense
    assert float((left @ right @ outside).abs().max()) < 1e-13


def test_the_small_system_refuses_what_does_not_fit():
    projector = null_space(torch.diag(torch.arange(4.0)), 1.5)
    keys, residuals, past = torch.ones(4, 2), torch.ones(3, 2), torch.empty(4, 0)
    for arguments in (
        (keys, residuals, past, 0.0),
        (keys, residuals, torch.empty(5, 1), 1.0),
        (keys, torch.ones(3, 1), past, 1.0),
    ):
        with pytest.raises(ConfigError):
            null_space_factors(projector, *arguments)


def test_keys_outside_the_null_space_do_not_feel_the_edit(corpus):
    handle = tiny_handle("llama")
    patch = get_editor("alphaedit", **SETTINGS, **corpus).edit(handle, BATCHES[0])
    stats = corpus["stats"].get(handle, [0, 1], corpus["corpus"])
    for note, (name, delta) in zip(patch.provenance.extra["null_space"], patch.deltas.items(), strict=True):
        moment = stats[note["layer"]].moment
        assert f".{note['layer']}." in name
        assert note["threshold"] == pytest.approx(0.3 * float(moment.diagonal().mean()))
        values, vectors = torch.linalg.eigh(moment)
        assert note["rank"] == int((values < note["threshold"]).sum())
        assert 0 < note["rank"] < note["width"] == len(moment)
        general = vectors[:, note["rank"] :]
        assert delta.norm() > 1e-2
        assert float((delta.dense().double() @ general).norm()) < 1e-5 * delta.norm()


@pytest.mark.parametrize("family", ["gptj", "mistral", "gemma2"])
def test_history_holds_earlier_keys_where_they_are(family, corpus):
    """Released code keeps no keys for two of these families, so that later edits move earlier ones there."""
    handle = tiny_handle(family)
    editor = get_editor("alphaedit", **{**SETTINGS, "layers": (1,), "l2": 1e-4}, **corpus)
    first = editor.edit(handle, BATCHES[0])
    with first.applied(handle):
        free, held = (editor.edit(handle, BATCHES[1], history=past) for past in (None, [first]))
    (keys,) = first.carry[0].tensors.values()
    assert first.carry[0].kind == KIND
    moved = [next(iter(patch.deltas.values())).dense().double() @ keys.double() for patch in (free, held)]
    assert float(moved[1].norm()) < 0.02 * float(moved[0].norm())
    assert held.provenance.extra["history"] == {"patches": [first.id], "keys": 2, "without_keys": []}


def test_a_patch_carries_the_keys_under_the_weights_it_leaves(corpus):
    handle = tiny_handle("llama", dtype=torch.float64)
    patch = get_editor("alphaedit", **SETTINGS, **corpus).edit(handle, BATCHES[0])
    rows = [row for request in BATCHES[0] for row in request_rows(handle, request, PREFIXES.flat)]

    def keys(layer):
        read = read_keys(handle, rows, [layer])[layer].keys
        return mean_over_contexts(read, PREFIXES.weights("groups")).T

    before = keys(1)
    with patch.applied(handle):
        after = keys(1)
    assert torch.allclose(patch.carry[0].tensors["layer 1"], after, atol=1e-12)
    assert float((after - before).norm()) > 1e-3


def test_nothing_is_remembered_between_calls_or_models(corpus):
    """A projector or a cache of keys in a module's global would leak from one call, or one model, into the next."""
    handle, other = tiny_handle("llama"), tiny_handle("llama", seed=1)
    editor = get_editor("alphaedit", **SETTINGS, **corpus)
    alone = get_editor("alphaedit", **SETTINGS, **corpus).edit(other, BATCHES[1])
    first = editor.edit(handle, BATCHES[0])
    assert editor.edit(other, BATCHES[1]).id == alone.id
    assert editor.edit(other, BATCHES[1], history=[]).id == alone.id
    assert editor.edit(handle, BATCHES[0]).id == first.id
    with pytest.raises(BaseMismatchError, match="history"):
        editor.edit(other, BATCHES[1], history=[first])


def test_many_together_equal_each_alone(corpus):
    handle = tiny_handle("llama", dtype=torch.float64)
    editor = get_editor("alphaedit", **SETTINGS, **corpus)
    for request, patch in zip(BATCHES[0], edit_many(editor, handle, BATCHES[0]), strict=True):
        alone = editor.edit(handle, [request])
        for name, delta in patch.deltas.items():
            assert torch.allclose(delta.dense(), alone.deltas[name].dense(), atol=1e-9, rtol=0)
        assert patch.provenance.extra["history"] == alone.provenance.extra["history"]


def test_history_may_be_saved_summed_and_scaled(corpus, tmp_path):
    handle = tiny_handle("llama")
    editor = get_editor("alphaedit", **SETTINGS, **corpus)
    first = editor.edit(handle, BATCHES[0])
    with first.applied(handle):
        second = editor.edit(handle, BATCHES[1], history=[first])
        with second.applied(handle):
            expected = editor.edit(handle, BATCHES[2], history=[first, second])
            for past in (
                [first + second],
                [first, second.scaled(0.5)],
                [WeightPatch.load((first + second).save(tmp_path / "sum"))],
            ):
                assert editor.edit(handle, BATCHES[2], history=past).id == expected.id
            assert editor.edit(handle, BATCHES[2], history=[first]).id != expected.id


def test_patches_without_keys_are_named(corpus, caplog):
    handle = tiny_handle("llama")
    editor = get_editor("alphaedit", **SETTINGS, **corpus)
    rome = get_editor("rome_identity", layers=(1,), steps=2, prefixes=TEXTS).edit(handle, BATCHES[0])
    with rome.applied(handle), caplog.at_level(logging.WARNING, logger="editors.alphaedit"):
        patch = editor.edit(handle, BATCHES[1], history=[rome])
    assert "rome_identity" in caplog.text
    assert patch.provenance.extra["history"] == {"patches": [rome.id], "keys": 0, "without_keys": [rome.id]}


def test_other_layers_than_before_are_refused(corpus):
    handle = tiny_handle("llama")
    first = get_editor("alphaedit", **{**SETTINGS, "layers": (0,)}, **corpus).edit(handle, BATCHES[0])
    with pytest.raises(ConfigError, match="layer 1 is edited now"):
        get_editor("alphaedit", **SETTINGS, **corpus).edit(handle, BATCHES[1], history=[first])


@pytest.mark.parametrize("threshold, mode", [(1e-30, "absolute"), (1e30, "absolute"), (1e-12, "relative")])
def test_an_empty_or_full_null_space_is_refused(threshold, mode, corpus):
    settings = {**SETTINGS, "nullspace_threshold": threshold, "threshold_mode": mode}
    with pytest.raises(ConfigError, match=r"layer 0: .*keeps (0|64) of 64 directions.*nullspace_threshold"):
        get_editor("alphaedit", **settings, **corpus).edit(tiny_handle("llama"), BATCHES[0])


@pytest.mark.parametrize("wrong", [{"l2": 0.0}, {"nullspace_threshold": 0.0}, {"threshold_mode": "mean"}])
def test_refuses_senseless_settings(wrong):
    with pytest.raises(ConfigError):
        AlphaEditConfig(**wrong)


def test_what_is_kept_of_the_past_follows_the_history():
    moment = random(40, 24, seed=3).T @ random(40, 24, seed=3) / 40
    projector, other = (null_space(moment, float(moment.diagonal().mean()) * share) for share in (0.4, 0.8))
    blocks = [random(24, size, seed=size) for size in (3, 1, 2)]
    kept = PastGram()
    for chosen, wanted in (
        (projector, blocks[:1]),
        (projector, blocks),
        (projector, [blocks[0], blocks[2]]),
        (other, [blocks[0], blocks[2]]),
        (projector, []),
    ):
        keys, gram = kept.over(chosen, wanted)
        whole = torch.cat([torch.empty(24, 0, dtype=torch.float64), *wanted], dim=1)
        assert torch.equal(keys, whole)
        assert torch.allclose(gram, whole.T @ chosen.apply(whole), atol=1e-12, rtol=0)
        assert torch.equal(gram, PastGram().over(chosen, wanted)[1]), (
            "the same bits, whatever was asked before"
        )
