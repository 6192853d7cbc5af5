from __future__ import annotations

import pytest
import torch

from editors import get_editor
from editors.lora import EditTrainer, LoraEditConfig
from lab.errors import ConfigError
from lab.patch import LowRank
from lab.records import EditRequest
from lab.scoring import score_targets
from tests.tiny import FAMILIES, tiny_handle

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]


@pytest.mark.parametrize("modules", ["query_value", "mlp"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_patch_gives_the_adapters_logits(family, modules, monkeypatch):
    handle = tiny_handle(family)
    batch = handle.encode(["The capital of France is", "Barack Obama's wife is Marie"])
    seen = {}
    train = EditTrainer.train

    def watched(self):
        train(self)
        seen["logits"] = handle.logits(batch)
        seen["types"] = {type(module).__name__ for module in handle.model.modules()}

    monkeypatch.setattr(EditTrainer, "train", watched)
    plain = handle.logits(batch)
    patch = get_editor("lora", steps=5, modules=modules).edit(handle, REQUESTS)
    assert "Linear" in seen["types"] and any("Lora" in name or "Dropout" in name for name in seen["types"])
    assert torch.equal(handle.logits(batch), plain)
    assert all(isinstance(delta, LowRank) and delta.rank == 8 for delta in patch.deltas.values())
    real = batch.attention_mask.bool()
    with patch.applied(handle):
        assert torch.allclose(handle.logits(batch)[real], seen["logits"][real], atol=2e-5)
    assert float((seen["logits"] - plain)[real].abs().max()) > 1e-2


def test_what_it_says_about_its_targets_is_what_the_patched_model_says():
    handle = tiny_handle("qwen3")
    patch = get_editor("lora", steps=6).edit(handle, REQUESTS)
    with patch.applied(handle):
        scores = score_targets(handle, [(request.text, request.target_new) for request in REQUESTS])
    told = {entry["id"]: entry["p_target"] for entry in patch.provenance.extra["last"]}
    assert [told["a"], told["b"]] == pytest.approx([score.probability for score in scores], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_query_and_value_projections(family):
    handle = tiny_handle(family)
    width = 0
    for path in handle.arch.query_value_paths(1):
        weight = handle.named_weight(f"{path}.weight")
        assert weight.shape[1] == handle.hidden_size
        width += weight.shape[0]
    config = handle.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * head
    assert width in (
        config.num_attention_heads * head + values,
        config.num_attention_heads * head + 2 * values,
    )


def test_adapters_sit_in_the_wanted_blocks_only():
    handle = tiny_handle("llama", layers=12, width=16)
    patch = get_editor("lora", layers=(1,), steps=1).edit(handle, REQUESTS[:1])
    assert set(patch.deltas) == {f"model.layers.1.self_attn.{name}.weight" for name in ("q_proj", "v_proj")}
    everywhere = get_editor("lora", steps=1).edit(handle, REQUESTS[:1])
    assert len(everywhere.deltas) == 24


def test_training_stops_when_the_targets_are_learned():
    editor = get_editor("lora", lr=0.02, dropout=0.0, modules="mlp", stop_below=1.5, steps=60)
    losses = editor.edit(tiny_handle("llama"), REQUESTS).provenance.extra["losses"]
    assert losses[-1] < 1.5 < losses[-2]
    assert len(losses) < 60


def test_the_models_own_dropout_stays_off():
    handle = tiny_handle("gpt2")
    for module in handle.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    editor = get_editor("lora", steps=1, dropout=0.0)
    first = editor.edit(handle, REQUESTS[:1]).provenance.extra["losses"]
    lines = score_targets(handle, [(REQUESTS[0].text, REQUESTS[0].target_new)])
    assert first[0] == pytest.approx(-lines[0].mean_logprob, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{"rank": 0}, {"dropout": 1.0}, {"modules": "all"}, {"layers": (9,)}, {"alhpa": 3}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError):
        get_editor("lora", **settings).edit(tiny_handle("llama"), REQUESTS)
    assert LoraEditConfig().rank == 8


def test_it_trains_where_gradients_are_switched_off():
    handle = tiny_handle("llama")
    editor = get_editor("lora", steps=2)
    with torch.no_grad():
        patch = editor.edit(handle, REQUESTS[:1])
    assert patch.id == editor.edit(handle, REQUESTS[:1]).id
