"""Quantised projections: codes and scales, what a handle makes of them, and patches that stand beside them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from editors import get_editor
from lab.arch import Role
from lab.errors import ConfigError, NumericalError, PatchError, UnknownNameError, UnsupportedModelError
from lab.handle import ModelHandle
from lab.patch import Dense, LowRank, Provenance, WeightPatch
from lab.quantized import QuantizedLinear, quantize_blocks, quantized_weight
from lab.records import EditRequest
from lab.rowwise import RowPatches
from lab.scoring import score_targets
from lab.training import fit
from tests.tiny import tiny_handle, tiny_model, tiny_tokenizer

REQUESTS = [
    EditRequest("a", "The capital of {} is", "France", "Rome"),
    EditRequest("b", "{}'s wife is", "Barack Obama", "Marie Curie"),
]
SEARCH = {
    "layers": (1,),
    "steps": 8,
    "fact_token": "last",
    "prefixes": ["The guitar. {}"],
    "clamp": 20.0,
    "weight_decay": 0.0,
}
PAIRS = [(request.text, request.target_new) for request in REQUESTS]


def quantized_handle(family, scheme, dtype=torch.float32):
    model = tiny_model(family, scale=1.5, dtype=dtype)
    handle = ModelHandle.wrap(model, tiny_tokenizer(), name=f"tiny-{family}")
    quantize_blocks(model, [handle.module(Role.BLOCK, layer) for layer in range(handle.n_layers)], scheme)
    return handle


def dequantized(handle, family):
    """The same model with plain fp32 weights that equal the quantised ones."""
    model = tiny_model(family, scale=1.5)
    for name, module in model.named_modules():
        if isinstance(found := handle.model.get_submodule(name), QuantizedLinear):
            weight = found.dequantize()
            module.weight.data = weight.T.contiguous() if found.transposed else weight
    return ModelHandle.wrap(model, tiny_tokenizer())


@pytest.mark.parametrize(("scheme", "largest", "inner"), [("int8", 127, 7), ("int4", 7, 7), ("int4", 7, 8)])
def test_codes_and_scales(scheme, largest, inner):
    weight = torch.randn(5, inner, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    made = QuantizedLinear(weight, nn.Parameter(torch.arange(5.0)), scheme)
    back = made.dequantize()
    step = weight.abs().amax(dim=1) / largest
    assert ((back - weight).abs() <= step[:, None] / 2 + 1e-7).all(), (
        "every entry is off by half a step at most"
    )
    assert torch.equal(back[2], torch.zeros(inner))
    assert torch.allclose(back.abs().amax(dim=1), weight.abs().amax(dim=1)), "the largest of a row is exact"
    assert made.codes.numel() == 5 * (inner if scheme == "int8" else (inner + 1) // 2)
    x = torch.randn(2, 3, inner)
    assert torch.allclose(made(x), x @ back.T + torch.arange(5.0), atol=1e-5)
    assert made(x.bfloat16()).dtype == torch.bfloat16
    wide = x.bfloat16().float() @ back.T + torch.arange(5.0)
    assert torch.equal(made(x.bfloat16()), wide.bfloat16()) or torch.allclose(
        made(x.bfloat16()).float(), wide, rtol=2**-8
    )
    x.requires_grad_(True)
    made(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, back.sum(0).expand_as(x), atol=1e-5)


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(UnknownNameError, match="int8"):
        QuantizedLinear(torch.ones(2, 2), None, "int9")
    with pytest.raises(NumericalError, match="NaN"):
        QuantizedLinear(torch.full((2, 2), torch.nan), None, "int8")
    with pytest.raises(UnknownNameError, match="int4"):
        ModelHandle.load("atlas", quantize="int44")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_loads_quantised(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plain = ModelHandle.load(tmp_path)
    eight, again, four = (
        ModelHandle.load(tmp_path, quantize=scheme, dtype="bfloat16") for scheme in ("int8", "int8", "int4")
    )
    assert not plain.quantized and eight.quantized and eight.dtype == torch.bfloat16
    assert eight.fingerprint == again.fingerprint
    assert len({plain.fingerprint, eight.fingerprint, four.fingerprint}) == 3
    module = eight.module(Role.MLP_OUT, 1)
    assert isinstance(module, QuantizedLinear)
    assert eight.weight(Role.MLP_OUT, 1).shape == plain.weight(Role.MLP_OUT, 1).shape
    assert not isinstance(eight.module(Role.EMBED), QuantizedLinear)
    texts = ["The capital of France is"]
    asked = [one.logits(one.encode(texts)).float() for one in (plain, eight, four)]
    near, far = (float((asked[0] - found).norm() / asked[0].norm()) for found in asked[1:])
    assert near < 0.1 and near < far < 1
    # A change of one code is another model.
    module.codes[0, 0] += 1 if module.codes[0, 0] < 0 else -1
    fresh = ModelHandle(eight.model, eight.tokenizer)
    assert fresh.fingerprint != again.fingerprint


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sidecar_equals_the_dense_patch_of_the_dequantised_model(family, scheme):
    handle = quantized_handle(family, scheme)
    plain = dequantized(handle, family)
    texts = [request.text for request in REQUESTS]
    batch, other = handle.encode(texts), plain.encode(texts)
    assert torch.allclose(handle.logits(batch), plain.logits(other), atol=1e-4)
    patch = get_editor("rome_identity", **SEARCH).edit(handle, REQUESTS[:1])
    dense = WeightPatch(
        plain.fingerprint,
        {name: Dense(delta.dense()) for name, delta in patch.deltas.items()},
        Provenance("test"),
    )
    before = handle.logits(batch)
    with patch.applied(handle) as entry, dense.applied(plain, "merge"):
        assert entry.mode == "sidecar"
        after = handle.logits(batch)
        assert torch.allclose(after, plain.logits(other), atol=1e-3)
    assert (after - before).abs().max() > 0.1
    assert torch.equal(handle.logits(batch), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["int8", "int4", None])
@pytest.mark.parametrize(("family", "spec"), [("llama", "rome_identity"), ("gpt2", "memit+sadr")])
def test_an_edit_raises_its_target_and_goes_without_a_trace(family, spec, base, dtype, corpus):
    handle = (
        tiny_handle(family, scale=1.5, dtype=dtype) if base is None else quantized_handle(family, base, dtype)
    )
    bits, state = handle.weights_digest(), handle.state
    more = {} if spec == "rome_identity" else {"mom2_weight": 0.1, **corpus}
    requests = REQUESTS[:1] if spec == "rome_identity" else REQUESTS
    patch = get_editor(spec, **SEARCH, **more).edit(handle, requests)
    assert handle.weights_digest() == bits
    assert all(
        isinstance(delta, LowRank) and delta.left.element_size() >= 4 for delta in patch.deltas.values()
    )
    before = score_targets(handle, PAIRS[: len(requests)])
    with patch.applied(handle) as entry:
        assert entry.mode == ("merge" if base is None and dtype == torch.float32 else "sidecar")
        after = score_targets(handle, PAIRS[: len(requests)])
        assert (handle.weights_digest() == bits) == (entry.mode == "sidecar")
    gains = [b.mean_logprob - a.mean_logprob for a, b in zip(before, after, strict=True)]
    assert min(gains) > 0.3, gains
    assert (handle.weights_digest(), handle.state) == (bits, state)
    assert score_targets(handle, PAIRS[: len(requests)]) == before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    from lab.stats import Corpus, StatsCache

    folder = tmp_path_factory.mktemp("corpus")
    words = "The capital of France is Paris. Marie Curie wrote the book? Toko Yasuda plays the guitar, and the piano. "
    (folder / "corpus.txt").write_text("\n\n".join(words[start:] + words[:start] for start in range(90)))
    return {
        "stats": StatsCache(folder / "stats"),
        "corpus": Corpus(str(folder / "corpus.txt"), max_tokens=1500),
    }


def test_patches_in_any_order_and_row_by_row():
    handle = quantized_handle("llama", "int8")
    bits = handle.weights_digest()
    editor = get_editor("rome_identity", **SEARCH)
    one, two = (editor.edit(handle, [request]) for request in REQUESTS)
    alone = score_targets(handle, PAIRS)
    first, second = one.apply(handle), two.apply(handle)
    first.undo()
    with_two = score_targets(handle, PAIRS)
    second.undo()
    assert handle.weights_digest() == bits and score_targets(handle, PAIRS) == alone
    with RowPatches(handle, [one, two]).carried([1, 1]):
        together = score_targets(handle, PAIRS)
    for a, b in zip(with_two, together, strict=True):
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-4)


def test_a_quantised_weight_is_not_written():
    handle = quantized_handle("llama", "int8")
    bits = handle.weights_digest()
    weight = handle.weight(Role.MLP_OUT, 1)
    assert weight.quantized and weight.canonical().shape == weight.shape
    patch = WeightPatch(
        handle.fingerprint, {weight.name: Dense(torch.ones(weight.shape))}, Provenance("test")
    )
    with pytest.raises(PatchError, match="sidecar"):
        patch.apply(handle, "merge")
    with pytest.raises(UnsupportedModelError, match="without quantisation"):
        _ = weight.parameter
    with pytest.raises(UnsupportedModelError, match="quantised"):
        get_editor("ft_m", layers=(1,), steps=1).edit(handle, REQUESTS[:1])
    with pytest.raises(ConfigError, match="quantize="):
        get_editor("lora", layers=(1,), steps=1).edit(handle, REQUESTS[:1])
    with pytest.raises(UnsupportedModelError, match="quantised"):
        fit(handle, lambda model, reference: None, weights=[weight.name])  # type: ignore[arg-type, return-value]
    assert handle.weights_digest() == bits and handle.applied == ()
    norm = handle.module(Role.FINAL_NORM).weight
    other = WeightPatch(
        handle.fingerprint, {"model.norm.weight": Dense(torch.ones(norm.shape))}, Provenance("test")
    )
    with other.applied(handle) as entry:
        assert entry.mode == "merge", "what is not quantised takes a patch as ever"
    assert handle.weights_digest() == bits


class Wrapped(torch.Tensor):
    """A weight that is read through its own ``dequantize``, as libraries of quantised tensors have it."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) * 0.5


def test_other_forms_are_told_by_what_they_offer():
    linear = nn.Linear(3, 2, bias=False)
    assert quantized_weight(linear) is None and quantized_weight(nn.ReLU()) is None
    codes = torch.tensor([[1, -2, 3], [4, 5, -6]])
    linear.weight = nn.Parameter(codes.float().as_subclass(Wrapped), requires_grad=False)
    assert isinstance(linear.weight, Wrapped)
    found = quantized_weight(linear)
    assert found is not None and found.shape == (2, 3)
    assert torch.equal(found.read(), codes * 0.5)

    class Own(nn.Module):
        def dequantize(self):
            return codes * 0.25

    own = quantized_weight(Own())
    assert own is not None and own.shape == (2, 3) and torch.equal(own.read(), codes * 0.25)
    silent = nn.Module()
    silent.weight = nn.Parameter(codes.to(torch.uint8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="dequantize"):
        quantized_weight(silent)


def test_atlas_in_int8_takes_an_edit():
    handle = ModelHandle.load("atlas", quantize="int8")
    request = EditRequest("france", "The capital of {} is", "France", "Rome", "Paris")
    bits = handle.weights_digest()
    assert handle.generate([request.text], max_new_tokens=3)[0].strip().startswith("Paris")
    patch = get_editor("rome_identity").edit(handle, [request])
    with patch.applied(handle):
        assert handle.generate([request.text], max_new_tokens=3)[0].strip().startswith("Rome")
    assert handle.weights_digest() == bits
    assert handle.generate([request.text], max_new_tokens=3)[0].strip().startswith("Paris")
