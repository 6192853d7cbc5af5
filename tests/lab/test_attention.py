from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from lab.arch import Role
from lab.attention import (
    IMPLEMENTATION,
    AttentionRows,
    attention_drift,
    capture_rows,
    replace_rows,
    restored_logits,
    text_attention,
)
from lab.errors import AttentionUnavailableError, ConfigError, SubjectNotFoundError
from lab.patch import LowRank, Provenance, WeightPatch
from tests.tiny import FAMILIES, tiny_handle, tiny_model, tiny_tokenizer

TEXTS = ["The capital of France is", "Danielle Darrieux's mother tongue is French, and the piano", "Rome"]
EAGER_ONLY = ("gptj", "gemma2")


def eager_maps(handle, batch) -> torch.Tensor:
    """``[batch, layer, head, query, key]`` from stock eager attention."""
    with handle.eager_attention(), torch.no_grad():
        maps = handle.model(**handle.inputs(batch), output_attentions=True).attentions
    return torch.stack(maps, dim=1)


def pick(maps: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return maps[torch.arange(len(positions)), :, :, positions]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_equal_the_eager_maps(family, side):
    handle = tiny_handle(family, scale=2.0)
    batch = handle.encode(TEXTS, side=side)
    maps = eager_maps(handle, batch)
    plain = handle.logits(batch)
    implementation = handle.config._attn_implementation
    for positions in (batch.last, batch.first):
        with capture_rows(handle, positions) as rows:
            logits = handle.logits(batch)
        assert sorted(rows) == list(range(handle.n_layers))
        assert torch.allclose(rows.stack(), pick(maps, positions), atol=2e-6)
        kept = batch.attention_mask.bool()
        assert torch.allclose(logits[kept], plain[kept], atol=1e-4, rtol=1e-4)
    assert handle.config._attn_implementation == implementation


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gemma2"])
def test_sliding_windows_are_seen(family):
    handle = tiny_handle(family, scale=2.0)
    if family == "mistral":
        handle.config.sliding_window = 16
    batch = handle.encode([" ".join(TEXTS) + " is a guitar in the city"])
    length = batch.input_ids.shape[1]
    assert length > 20
    with capture_rows(handle, batch.last) as rows:
        handle.logits(batch)
        stacked = rows.stack()
    assert torch.allclose(stacked, pick(eager_maps(handle, batch), batch.last), atol=2e-6)
    assert float(stacked[0, 0, :, : length - 16].abs().max()) == 0
    assert float(stacked[0, 0, :, length - 16 :].min()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_with_a_cache_positions_count_from_the_new_tokens(family):
    handle = tiny_handle(family, scale=2.0, dtype=torch.float64)
    ids = handle.encode(TEXTS[1:2]).input_ids
    full = ids.shape[1]
    maps = eager_maps(handle, handle.encode(TEXTS[1:2]))
    for cut in (5, full - 1):
        cache = DynamicCache()
        with torch.no_grad():
            handle.model(ids[:, :cut], past_key_values=cache, use_cache=True)
            with capture_rows(handle, [full - cut - 1]) as rows:
                handle.model(
                    ids[:, cut:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True
                )
        assert torch.allclose(rows.stack(), maps[:, :, :, full - 1], atol=2e-6)


def test_a_sliding_cache_gives_rows_of_its_own_length():
    handle = tiny_handle("gemma3", scale=2.0)
    ids = handle.encode(TEXTS[1:2]).input_ids
    cache = DynamicCache(config=handle.config)
    with torch.no_grad(), capture_rows(handle, [ids.shape[1] - 6]) as rows:
        handle.model(ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.positions = torch.tensor([0])
        handle.model(ids[:, -1:], attention_mask=torch.ones_like(ids), past_key_values=cache, use_cache=True)
    assert ids.shape[1] > 16
    assert rows.stack().shape == (1, 3, 4, 16)
    rows.keep(2, torch.zeros(1, 4, ids.shape[1]))
    with pytest.raises(ConfigError, match="different numbers"):
        rows.stack()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_through_the_rows_as_through_the_maps(family):
    handle = tiny_handle(family, scale=2.0)
    batch = handle.encode(TEXTS[:2])
    index = torch.arange(2)
    weight = handle.weight(Role.MLP_OUT, 0).parameter

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return (rows[..., :4] ** 2).sum()

    with capture_rows(handle, batch.last) as rows:
        handle.logits(batch, grad=True)
        [through_rows] = torch.autograd.grad(loss(torch.stack([rows[1][index], rows[2][index]])), weight)
    with handle.eager_attention():
        maps = handle.model(**handle.inputs(batch), output_attentions=True).attentions
        [through_maps] = torch.autograd.grad(
            loss(torch.stack([maps[layer][index, :, batch.last] for layer in (1, 2)])), weight
        )
    assert float(through_maps.abs().max()) > 0
    assert torch.allclose(through_rows, through_maps, atol=1e-5 * float(through_maps.abs().max()))


def test_fp64_models_get_fp64_rows():
    handle = tiny_handle("qwen3", dtype=torch.float64, scale=2.0)
    batch = handle.encode(TEXTS)
    with capture_rows(handle, batch.last) as rows:
        handle.logits(batch)
    assert rows[0].dtype == torch.float64
    assert torch.allclose(rows.stack().sum(-1), torch.ones(3, 3, 4, dtype=torch.float64), atol=1e-14)


def test_rows_are_those_of_the_latest_pass_and_positions_can_move():
    handle = tiny_handle("llama")
    one, two = handle.encode(TEXTS[:1]), handle.encode(TEXTS[:2])
    with capture_rows(handle, one.last) as rows:
        handle.logits(one)
        assert rows[0].shape[0] == 1
        rows.positions = two.last
        handle.logits(two)
        assert rows[0].shape[0] == 2
        with pytest.raises(ConfigError, match="positions"):
            handle.logits(one)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_everything_is_restored_after_an_exception(family):
    handle = tiny_handle(family)
    implementation = handle.config._attn_implementation
    batch = handle.encode(TEXTS[:1])
    with pytest.raises(ZeroDivisionError), capture_rows(handle, batch.last):
        raise ZeroDivisionError
    assert handle.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in handle.model.modules())
    with pytest.raises(ConfigError), capture_rows(handle, [99]):
        handle.logits(batch)
    assert handle.config._attn_implementation == implementation


def test_nothing_captured_is_an_error_and_never_an_empty_answer():
    handle = tiny_handle("llama")
    batch = handle.encode(TEXTS[:1])
    with capture_rows(handle, batch.last) as rows:
        with pytest.raises(AttentionUnavailableError, match="layer 0"):
            rows[0]
        with pytest.raises(AttentionUnavailableError):
            rows.stack()
        handle.model.set_attn_implementation("sdpa")
        with pytest.raises(AttentionUnavailableError, match="without our attention function"):
            handle.logits(batch)
    eager = tiny_handle("gptj")
    module = eager.module(Role.ATTN, 1)
    hook = module.register_forward_hook(lambda _m, _a, output: (output[0], None))
    try:
        with pytest.raises(AttentionUnavailableError, match="layer 1"), capture_rows(eager, batch.last):
            eager.logits(batch)
    finally:
        hook.remove()


def test_our_function_is_plain_sdpa_outside_and_for_other_models():
    handle = tiny_handle("qwen2", seed=0)
    batch = handle.encode(TEXTS)
    plain = handle.logits(batch)
    other = tiny_model("qwen2", seed=1)
    with capture_rows(handle, batch.last) as rows:
        handle.logits(batch)
        before = rows.stack()
        other.set_attn_implementation(IMPLEMENTATION)
        other(batch.input_ids)
        assert torch.equal(rows.stack(), before)
    handle.model.set_attn_implementation(IMPLEMENTATION)
    assert torch.equal(handle.logits(batch), plain)
    handle.model.set_attn_implementation("sdpa")


def edit(handle, scale: float = 4.0, layer: int = 0) -> WeightPatch:
    weight = handle.weight(Role.MLP_OUT, layer)
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(weight.shape[0], 1, generator=generator) * scale
    delta = LowRank(left, torch.randn(1, weight.shape[1], generator=generator))
    return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("test", {}, (), 0, {}, {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_drift_is_the_difference_of_the_maps(family, tmp_path):
    handle = tiny_handle(family, scale=2.0)
    patch = edit(handle)
    texts = ["The capital of France is", "Toko Yasuda plays the"]
    report = attention_drift(handle, patch, ["The capital of {} is", texts[1]], ["France", "Toko Yasuda"])
    assert report.prompts == tuple(texts)
    batch = handle.encode(texts)
    before = pick(eager_maps(handle, batch), batch.last)
    with patch.applied(handle):
        after = pick(eager_maps(handle, batch), batch.last)
    from lab.tokens import subject_span

    for row, subject in enumerate(("France", "Toko Yasuda")):
        column = subject_span(handle.tokenizer, texts[row], subject)[-1]
        expected = (after - before)[row, :, :, column].double()
        assert torch.allclose((report.after - report.before)[row], expected, atol=5e-6)
    # The edit lies above the first attention, so that one cannot drift.
    assert float(report.max_head[0].abs()) < 1e-6
    assert float(report.drift[1:].abs().max()) > 1e-4
    numbers = report.to_json()
    assert len(numbers["max_head_drift"]) == 3
    assert handle.state == handle.fingerprint
    path = report.plot(tmp_path / "plots" / "drift.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in path.parent.iterdir()] == ["drift.png"]


def test_drift_wants_one_subject_per_prompt():
    handle = tiny_handle("gpt2")
    with pytest.raises(ConfigError, match="one subject"):
        attention_drift(handle, edit(handle), ["The capital of {} is"], [])
    with pytest.raises(SubjectNotFoundError):
        attention_drift(handle, edit(handle), ["The capital of France is"], ["Japan"])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in EAGER_ONLY])
def test_putting_back_its_own_rows_changes_nothing_and_other_rows_do(family):
    handle = tiny_handle(family, dtype=torch.float64, scale=2.0)
    batch = handle.encode(TEXTS)
    plain = handle.logits(batch)
    index = torch.arange(3)
    with capture_rows(handle, batch.last) as rows:
        handle.logits(batch)
        own = dict(rows)
    with replace_rows(handle, batch.last, own):
        same = handle.logits(batch)
    assert torch.allclose(same[index, batch.last], plain[index, batch.last], atol=1e-10)
    flat = {layer: row.flip(-1) for layer, row in own.items()}
    with replace_rows(handle, batch.last, flat):
        other = handle.logits(batch)
    assert float((other[index, batch.last] - plain[index, batch.last]).abs().max()) > 1e-3
    before = torch.arange(3) * 0
    assert torch.allclose(other[index[:2], before[:2]], plain[index[:2], before[:2]], atol=1e-12)


def test_restored_logits_undo_the_drift_at_the_last_token_only():
    handle = tiny_handle("llama", dtype=torch.float64, scale=2.0)
    patch = edit(handle)
    batch = handle.encode(TEXTS[:2])
    index = torch.arange(2)
    with patch.applied(handle):
        patched = handle.logits(batch)[index, batch.last]
    unchanged = restored_logits(handle, patch, TEXTS[:2], layers=[0])
    assert torch.allclose(unchanged, patched, atol=1e-10)
    assert float((restored_logits(handle, patch, TEXTS[:2]) - patched).abs().max()) > 1e-4
    with pytest.raises(AttentionUnavailableError, match="eager"):
        restored_logits(tiny_handle("gptj"), edit(tiny_handle("gptj")), TEXTS[:1])


def test_a_sidecar_patch_is_seen_too():
    handle = tiny_handle("llama", scale=2.0)
    patch = edit(handle)
    batch = handle.encode(TEXTS)
    seen: list[AttentionRows] = []
    for mode in ("merge", "sidecar"):
        with patch.applied(handle, mode=mode), capture_rows(handle, batch.last) as rows:
            handle.logits(batch)
            seen.append(rows)
    assert torch.allclose(seen[0].stack(), seen[1].stack(), atol=1e-5)
    assert tiny_tokenizer() is handle.tokenizer


def test_shares_of_texts_are_sums_over_the_eager_map():
    handle = tiny_handle("llama", scale=2.0)
    prompt, texts = "Rome. The capital of France is", ["Rome.", "France"]
    maps = eager_maps(handle, handle.encode([prompt]))[0, :, :, -1].mean((0, 1))
    offsets = handle.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    for text, share in zip(texts, text_attention(handle, prompt, texts), strict=True):
        begin = prompt.index(text)
        inside = [left < begin + len(text) and right > begin for left, right in offsets]
        assert 0 < share < 1 and share == pytest.approx(float(maps[torch.tensor(inside)].sum()), abs=1e-5)
    assert text_attention(handle, prompt, []) == ()
    with pytest.raises(SubjectNotFoundError):
        text_attention(handle, prompt, ["France", "Rome."])
