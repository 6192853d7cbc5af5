from __future__ import annotations

import logging

import pytest
import torch

from editors import edit_many, get_editor
from editors.keys import mean_over_contexts, read_keys
from editors.prefixes import Prefixes
from editors.rome import rank_one_update
from editors.rows import request_rows
from editors.values import ValueConfig, optimise_value
from lab.arch import Role
from lab.errors import ConfigError, NumericalError, RequestError
from lab.records import EditRequest
from lab.solve import factorize
from lab.stats import Corpus, StatsCache
from lab.trace import Site, trace
from tests.tiny import tiny_handle

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]
TEXTS = ["The guitar. {}", "Because of the piano, and. {}"]


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "corpus.txt"
    words = "The capital of France is Paris. Marie Curie wrote the book? Toko Yasuda plays the guitar, and the piano. "
    file.write_text("\n\n".join(words[start:] + words[:start] for start in range(90)))
    return {"stats": StatsCache(tmp_path / "stats"), "corpus": Corpus(str(file), max_tokens=3000)}


def keys(count=8, width=12, seed=0):
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_the_update_maps_the_key_onto_the_residual():
    sample = keys()
    moment = factorize(keys(200).T @ keys(200) / 200)
    for factor in (None, moment):
        update = rank_one_update(sample.mean(0), sample[0], sample[1, :5], factor)
        assert torch.allclose(update.left * (update.right @ sample[0]), sample[1, :5], atol=1e-12)
        assert float(update.right.norm()) == pytest.approx(1, abs=1e-12)


def test_the_direction_is_whitened():
    sample = keys()
    moment = keys(200, seed=3).T @ keys(200, seed=3) / 200
    update = rank_one_update(sample.mean(0), sample[0], sample[1, :5], factorize(moment))
    expected = torch.linalg.solve(moment, sample.mean(0))
    assert torch.allclose(update.right, expected / expected.norm(), atol=1e-10)


def test_an_orthogonal_key_is_refused():
    with pytest.raises(NumericalError, match="r_rome"):
        rank_one_update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), torch.ones(3), None)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "gptj"])
def test_rome_puts_the_searched_value_where_the_key_is(family, corpus):
    handle = tiny_handle(family)
    settings = {"layers": (1,), "steps": 8, "prefixes": TEXTS}
    prefixes = Prefixes.of(TEXTS)
    config = ValueConfig(**{**_values(handle), "steps": 8})
    (value,) = optimise_value(handle, REQUESTS[:1], 1, Role.MLP, prefixes, config)
    site = Site(Role.MLP_OUT, 1)
    row = request_rows(handle, REQUESTS[0], ["{}"])[0]
    for spec, options in (("rome", corpus), ("rome_identity", {})):
        patch = get_editor(spec, **settings, **options).edit(handle, REQUESTS[:1])
        assert patch.rank == 1
        with patch.applied(handle), trace(handle, reads=[site], stop=site) as recording:
            recording.run(handle.encode([REQUESTS[0].text]))
            found = recording[site][0, row.change]
        assert torch.allclose(found, value.target, atol=1e-3, rtol=1e-3)


def _values(handle):
    from editors.presets import find_preset

    values = dict(find_preset(handle, "rome").values)
    return {name: values[name] for name in ("lr", "weight_decay", "clamp")}


def test_r_rome_holds_on_the_mean_key(corpus):
    handle = tiny_handle("llama")
    contexts = Prefixes.of(TEXTS)
    rows = request_rows(handle, REQUESTS[0], contexts.flat)
    read = read_keys(handle, rows, [1])[1]
    mean = mean_over_contexts(read.keys, contexts.weights("mean"))[0]
    before = mean_over_contexts(read.values, contexts.weights("mean"))[0]
    (value,) = optimise_value(
        handle, REQUESTS[:1], 1, Role.MLP, contexts, ValueConfig(**{**_values(handle), "steps": 8})
    )
    patch = get_editor("r_rome", layers=(1,), steps=8, prefixes=TEXTS, **corpus).edit(handle, REQUESTS[:1])
    (delta,) = patch.deltas.values()
    wanted = value.target.double() - before
    assert torch.allclose(delta.dense().double() @ mean, wanted, atol=1e-4)
    prompt = get_editor("r_rome", key="prompt", layers=(1,), steps=8, prefixes=TEXTS, **corpus).edit(
        handle, REQUESTS[:1]
    )
    (delta,) = prompt.deltas.values()
    assert torch.allclose(
        delta.dense().double() @ read.keys[0], value.target.double() - read.values[0], atol=1e-4
    )


def test_many_together_equal_each_alone():
    handle = tiny_handle("qwen3", dtype=torch.float64)
    editor = get_editor("rome_identity", layers=(1,), steps=8, prefixes=TEXTS)
    together = edit_many(editor, handle, REQUESTS)
    for request, patch in zip(REQUESTS, together, strict=True):
        alone = editor.edit(handle, [request])
        (first,), (second,) = patch.deltas.values(), alone.deltas.values()
        assert torch.allclose(first.dense(), second.dense(), atol=1e-6)
        assert patch.provenance.requests == alone.provenance.requests
        assert patch.parents == ()


def test_a_list_is_edited_in_turn():
    handle = tiny_handle("llama")
    editor = get_editor("rome_identity", layers=(1,), steps=6, prefixes=TEXTS)
    both = editor.edit(handle, REQUESTS)
    first = editor.edit(handle, REQUESTS[:1])
    with first.applied(handle, mode="sidecar"):
        second = editor.edit(handle, REQUESTS[1:])
    (whole,), (one,), (two,) = both.deltas.values(), first.deltas.values(), second.deltas.values()
    assert both.rank == 2
    assert torch.allclose(whole.dense(), one.dense() + two.dense(), atol=1e-5)
    assert second.parents == (first.id,)
    assert both.parents == ()


def test_several_layers_are_edited_bottom_up():
    handle = tiny_handle("llama")
    patch = get_editor("rome_identity", layers=(0, 1), steps=4, prefixes=TEXTS).edit(handle, REQUESTS[:1])
    assert sorted(patch.deltas) == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    with pytest.raises(ConfigError, match="one layer"):
        edit_many(get_editor("rome_identity", layers=(0, 1), prefixes=TEXTS), handle, REQUESTS)


def test_an_unsound_update_is_said_aloud(caplog):
    handle = tiny_handle("llama")
    with caplog.at_level(logging.WARNING, logger="editors.rome"):
        patch = get_editor("rome_identity", layers=(1,), steps=20, lr=5.0, clamp=50.0, prefixes=TEXTS).edit(
            handle, REQUESTS[:1]
        )
    (guard,) = patch.provenance.extra["guards"]
    assert "large update" in guard["flags"]
    assert "'a'" in caplog.text
    assert guard["relative_norm"] > 0.3


def test_lists_that_contradict_themselves_are_refused():
    handle = tiny_handle("llama")
    editor = get_editor("rome_identity", layers=(1,), steps=2, prefixes=TEXTS)
    again = EditRequest("c", "{} lies in", "France", "Asia")
    for requests, words in (
        ([], "empty"),
        ([REQUESTS[0], REQUESTS[0]], "the same id"),
        (
            [REQUESTS[0], EditRequest("z", "The capital of {} is", "France", "Tokyo")],
            "the same prompt and subject",
        ),
        ([REQUESTS[0], again], "the same subject"),
    ):
        with pytest.raises(RequestError, match=words):
            editor.edit(handle, requests)
    assert len(edit_many(editor, handle, [REQUESTS[0], again])) == 2


def test_editors_do_not_turn_into_one_another():
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="rome_identity"):
        get_editor("rome", covariance=False).edit(handle, REQUESTS)
    with pytest.raises(ConfigError, match="different editors"):
        get_editor("r_rome", key="mixed").edit(handle, REQUESTS)


@pytest.mark.parametrize("layers", [(), (1, 0), (7,), (-1,), (1, 1)])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ConfigError, match="layers"):
        get_editor("rome_identity", layers=layers, prefixes=TEXTS).edit(tiny_handle("llama"), REQUESTS)
