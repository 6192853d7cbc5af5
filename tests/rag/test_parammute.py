"""Muting the MLPs that push memory: the hooks, the measurement, and the rule."""

from __future__ import annotations

import pytest
import torch

from lab.arch import Role
from lab.data.text import normalize_answer
from lab.errors import BusyError, ConfigError
from lab.handle import ModelHandle
from rag.decoding import contrast_generate, get_rule
from rag.decoding.parammute import ParamMute, memory_effects, muted
from rag.readers import READERS
from tests.rag.facts import conflicts
from tests.tiny import FAMILIES, tiny_handle


def hooks(handle: ModelHandle) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in handle.model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_muting_is_scaling_the_down_projection(family):
    handle = tiny_handle(family)
    batch = handle.encode(["The capital of France is", "Who"])
    plain, digest, before = handle.logits(batch), handle.weights_digest(), hooks(handle)
    with muted(handle, [1], 0.25):
        found = handle.logits(batch)
    assert not torch.allclose(found, plain)
    assert torch.equal(handle.logits(batch), plain)
    assert (handle.weights_digest(), hooks(handle)) == (digest, before)
    with torch.no_grad():
        handle.weight(Role.MLP_OUT, 1).parameter.mul_(0.25)
    torch.testing.assert_close(handle.logits(batch), found, rtol=1e-4, atol=1e-5)


def test_one_leaves_the_model_as_it_is_and_errors_leave_nothing():
    handle = tiny_handle()
    batch = handle.encode(["The capital"])
    plain, before = handle.logits(batch), hooks(handle)
    with muted(handle, [0, 1, 1, 2], 1.0):
        assert torch.equal(handle.logits(batch), plain)
    with pytest.raises(RuntimeError, match="boom"), muted(handle, [0], 0.0):
        raise RuntimeError("boom")
    with pytest.raises(ConfigError, match="layer 9"), muted(handle, [0, 9], 0.0):
        pass
    with pytest.raises(BusyError), handle.reading(), muted(handle, [0], 0.0):
        pass
    assert hooks(handle) == before and torch.equal(handle.logits(batch), plain)


def test_the_effect_is_the_drop_of_the_answer():
    from lab.scoring import score_targets

    handle = tiny_handle(scale=2.0)
    pairs = [("The capital of France is", "Paris"), ("Who wrote the book?", "Marie")]
    effects = memory_effects(handle, *zip(*pairs, strict=True), 0.0)
    assert len(effects) == handle.n_layers
    before = [score.mean_logprob for score in score_targets(handle, pairs)]
    with torch.no_grad():
        handle.weight(Role.MLP_OUT, 2).parameter.zero_()
    after = [score.mean_logprob for score in score_targets(handle, pairs)]
    assert effects[2] == pytest.approx((sum(before) - sum(after)) / 2, abs=1e-4)
    with pytest.raises(ConfigError, match="one answer each"):
        memory_effects(handle, ["a"], [], 0.0)


def test_the_rule_by_name():
    assert get_rule("parammute") == ParamMute()
    assert get_rule("parammute:scale=0,layers=1+4-6") == ParamMute(0, "1+4-6")
    assert get_rule("parammute:layers=3,count=2") == ParamMute(layers=3, count=2)
    for wrong in ("layers=x", "layers=5-2", "scale=-1", "scale=nan", "count=-1", "layers=1-"):
        with pytest.raises(ConfigError):
            get_rule(f"parammute:{wrong}")


def test_layers_are_measured_before_decoding():
    handle = tiny_handle(scale=2.0)
    with pytest.raises(ConfigError, match="measured"):
        contrast_generate(handle, ["a"], ["b"], ParamMute())
    settled = ParamMute(count=2).settled(handle, ["Paris is a city. The capital is"], ["The capital is"])
    chosen = [int(layer) for layer in str(settled.layers).split("+") if layer]
    said = handle.generate(["The capital is"], max_new_tokens=12, stop=("\n",))[0].strip()
    effects = memory_effects(handle, ["Paris is a city. The capital is"], [said], 0.25)
    best = sorted(range(3), key=lambda layer: -effects[layer])
    assert chosen == sorted(layer for layer in best if effects[layer] > 0)[:2] or set(chosen) == {
        layer for layer in best[:2] if effects[layer] > 0
    }
    plain = contrast_generate(handle, ["The capital"], ["x"], get_rule("greedy"), max_new_tokens=6)
    assert contrast_generate(handle, ["The capital"], ["x"], ParamMute(1.0, "0-2"), max_new_tokens=6) == plain
    assert contrast_generate(handle, ["The capital"], ["x"], ParamMute(0.0, "0-2"), max_new_tokens=6) != plain


@pytest.mark.parametrize("reader", ["direct", "con"])
def test_a_reader_mutes_and_puts_back(reader, shipped_atlas):
    handle = ModelHandle.load("atlas")
    cases = conflicts(16, seed=5)
    items = [(case.question, [case.document]) for case in cases]
    digest = handle.weights_digest()

    def shares(rule):
        readings = READERS.get(reader)(handle, get_rule(rule)).read_many(items)
        return [
            sum(
                normalize_answer(reading.answer) == normalize_answer(getattr(case, side))
                for reading, case in zip(readings, cases, strict=True)
            )
            for side in ("known", "told")
        ]

    (plain_known, plain_told), (quiet_known, quiet_told) = shares("greedy"), shares("parammute")
    assert quiet_known < plain_known
    if reader == "direct":
        # Notes are written by the muted model too, so what the document gains is asked of the direct reader alone.
        assert quiet_told > plain_told
    assert handle.weights_digest() == digest and hooks(handle) == 0
