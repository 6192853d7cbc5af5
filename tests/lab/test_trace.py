"""Hooks: what they read and write on every family, and that they leave nothing behind."""

from __future__ import annotations

import pytest
import torch

from lab.arch import Role
from lab.errors import ConfigError
from lab.handle import ModelHandle
from lab.trace import Site, trace
from tests.tiny import FAMILIES, tiny_handle

TEXTS = ["The capital of France is", "Tokyo"]


def hooks_on(handle: ModelHandle) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in handle.model.modules()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_of_every_family(family: str) -> None:
    handle = tiny_handle(family)
    batch = handle.encode(TEXTS)
    key, value = Site(Role.MLP_OUT, 1, "in"), Site(Role.MLP_OUT, 1)
    sites = [
        key,
        value,
        Site(Role.BLOCK, 1),
        Site(Role.ATTN, 1),
        Site(Role.ATTN, 1, "in"),
        Site(Role.FINAL_NORM),
    ]
    with trace(handle, sites) as recording:
        logits = recording.run(batch)
    assert logits is not None and torch.equal(logits, handle.logits(batch))
    weight = handle.weight(Role.MLP_OUT, 1)
    bias = getattr(handle.module(Role.MLP_OUT, 1), "bias", None)
    rows, pos = batch.input_ids.shape
    assert recording[key].shape == (rows, pos, weight.shape[1])
    expected = recording[key] @ weight.canonical().T + (0 if bias is None else bias.detach())
    assert torch.allclose(recording[value], expected, atol=1e-5)
    for site in sites[2:]:
        assert recording[site].shape == (rows, pos, handle.hidden_size)
    assert hooks_on(handle) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site",
    [Site(Role.MLP_OUT, 1), Site(Role.BLOCK, 1), Site(Role.ATTN, 1, "in"), Site(Role.MLP_OUT, 1, "in")],
)
def test_writes_change_the_outcome_and_are_recorded(family: str, site: Site) -> None:
    handle = tiny_handle(family)
    batch = handle.encode(TEXTS)
    clean = handle.logits(batch)

    def push(value: torch.Tensor) -> torch.Tensor:
        assert value.shape[:2] == batch.input_ids.shape
        changed = value.clone()
        # A ramp: a layer norm takes a constant shift out again.
        changed[0, -1] += torch.linspace(-1, 1, value.shape[-1])
        return changed

    with trace(handle, [site], {site: push}) as recording:
        dirty = recording.run(batch)
    with trace(handle, [site]) as plain:
        plain.run(batch)
    assert dirty is not None
    assert (dirty[0, -1] - clean[0, -1]).abs().max() > 1e-3
    assert torch.equal(dirty[0, :-1], clean[0, :-1])
    difference = recording[site] - plain[site]
    assert torch.allclose(difference[0, -1], torch.linspace(-1, 1, difference.shape[-1]), atol=1e-5)
    assert torch.equal(handle.logits(batch), clean)


def test_stop_cuts_the_pass() -> None:
    handle = tiny_handle("llama")
    seen: list[int] = []
    for layer in range(handle.n_layers):
        handle.module(Role.BLOCK, layer).register_forward_pre_hook(
            lambda *_args, layer=layer: seen.append(layer)
        )
    site = Site(Role.MLP_OUT, 1, "in")
    with trace(handle, [site], stop=site) as recording:
        assert recording.run(handle.encode(TEXTS)) is None
    assert seen == [0, 1]
    assert site in recording


def test_nothing_is_left_after_an_exception_or_a_wrong_site() -> None:
    handle = tiny_handle("llama")

    def broken(_value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("boom")

    with (
        pytest.raises(RuntimeError, match="boom"),
        trace(handle, writes={Site(Role.MLP, 0): broken}) as recording,
    ):
        recording.run(handle.encode(TEXTS))
    assert hooks_on(handle) == 0
    with pytest.raises(ConfigError, match="layer 7"), trace(handle, [Site(Role.MLP, 0), Site(Role.MLP, 7)]):
        pass
    assert hooks_on(handle) == 0


def test_reading_what_was_never_reached_says_so() -> None:
    handle = tiny_handle("llama")
    with trace(handle, [Site(Role.MLP, 2)], stop=Site(Role.MLP, 0)) as recording:
        recording.run(handle.encode(TEXTS))
        with pytest.raises(ConfigError, match="nothing was read"):
            recording[Site(Role.MLP, 2)]


def test_nested_traces_see_each_other_and_close_in_order() -> None:
    handle = tiny_handle("llama")
    batch = handle.encode(TEXTS)
    site = Site(Role.MLP, 1)
    with trace(handle, writes={site: lambda value: value * 0}), trace(handle, [site]) as inner:
        inner.run(batch)
        assert inner[site].abs().max() == 0
    with trace(handle, [site]) as outer:
        outer.run(batch)
        assert outer[site].abs().max() > 0


def test_gradients_flow_when_asked() -> None:
    handle = tiny_handle("llama")
    handle.model.requires_grad_(False)
    delta = torch.zeros(handle.hidden_size, requires_grad=True)
    with trace(handle, writes={Site(Role.MLP, 0): lambda value: value + delta}, detach=False) as recording:
        logits = recording.run(handle.encode(TEXTS))
    assert logits is not None
    logits.logsumexp(-1).sum().backward()
    assert delta.grad is not None and delta.grad.abs().max() > 0
