"""WISE: the margin loss, shards and merging, and the router."""

from __future__ import annotations

import pytest
import torch

from editors import get_editor
from editors.side_memory import (
    WiseMemory,
    activation_distance,
    activation_name,
    activation_of,
    shifted,
    ties,
)
from editors.wise import SideTraining, WiseConfig, margin_loss
from lab.arch import Role
from lab.errors import ConfigError
from lab.memory import MemoryPatch, memories_of
from lab.patch import Dense, Provenance, WeightPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.tokens import pad_rows
from lab.trace import Site, trace
from tests.tiny import FAMILIES, tiny_handle

FRANCE = EditRequest("france", "The capital of {} is", "France", "Rome")
OBAMA = EditRequest("obama", "{}'s wife is", "Barack Obama", "Marie Curie")
KENYA = EditRequest("kenya", "The capital of {} is", "Kenya", "Tokyo")
UNRELATED = "Marie Curie worked in"
TEXTS = [FRANCE.text, UNRELATED, OBAMA.text]
QUICK = {
    "layers": (1,),
    "steps": 12,
    "lr": 0.1,
    "mask_ratio": 0.5,
    "alpha": 0.1,
    "beta": 1.0,
    "gamma": 0.5,
    "irrelevant": (UNRELATED,),
    "prefixes": ["The guitar. {}"],
}


def quick(**more):
    return get_editor("wise", **{**QUICK, **more})


def memory_of(handle, *, layer=1, seed=0, scale=0.5, threshold=0.0, names=("x",)):
    generator = torch.Generator().manual_seed(seed)
    delta = scale * torch.randn(1, *handle.weight(Role.MLP_OUT, layer).shape, generator=generator)
    memory = WiseMemory(layer, "mlp_out", activation_name(handle), delta, (threshold,), (names,))
    return MemoryPatch(handle.fingerprint, memory, Provenance("test"))


def logits(handle, texts=TEXTS):
    return handle.logits(handle.encode(texts))


# -- mathematics --------------------------------------------------------------------------------------------------


def test_the_margin_loss_is_the_mean_of_what_violates_each_margin():
    inside, outside = torch.tensor([4.0, 8.0, 30.0]), torch.tensor([6.0])
    # Apart: 6 - 4 + 3 and 6 - 8 + 3 violate, 6 - 30 + 3 does not; outside exceeds 2 by 4; 4 and 8 miss 20 by 16 and 12.
    assert float(margin_loss(inside, outside, 2.0, 20.0, 3.0)) == pytest.approx(
        (5 + 1) / 2 + 4 + (16 + 12) / 2
    )
    held = torch.tensor([30.0, 40.0], requires_grad=True)
    loss = margin_loss(held, torch.tensor([1.0]), 2.0, 20.0, 3.0)
    assert float(loss.detach()) == 0.0
    assert torch.equal(torch.autograd.grad(loss, held)[0], torch.zeros(2))


def test_ties_trims_elects_a_sign_and_averages_what_agrees():
    first = torch.tensor([[3.0, -2.0, 0.1, 4.0]])
    second = torch.tensor([[1.0, 5.0, -0.2, -6.0]])
    # Three of four entries are kept; the signs of the sums are +, +, -, -.
    merged = ties(torch.stack([first, second]), 0.75)
    assert torch.allclose(merged, torch.tensor([[2.0, 5.0, 0.0, -6.0]]))
    assert torch.equal(ties(first[None], 1.0), first)


def test_distances_are_means_over_the_tokens_that_count():
    own, side = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    side[0, 0], side[0, 1], side[0, 2] = (torch.tensor(pair) for pair in ((3.0, 4.0), (1.0, 0.0), (9.0, 9.0)))
    side[1, 2] = float("nan")
    tokens = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()
    found = activation_distance(lambda value: value, own, side, tokens)
    assert found.tolist() == [3.0, 0.0]


# Families whose norms compute in fp64; RMS norms round to fp32.
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_gradients_of_both_losses_are_those_of_finite_differences(family):
    handle = tiny_handle(family, dtype=torch.float64, scale=1.5)
    site = Site(Role.MLP_OUT, 1)
    config = WiseConfig(alpha=0.1, beta=20.0, gamma=5.0)
    contexts = ["{}", "The guitar. {}"]
    function = activation_of(activation_name(handle))
    training = SideTraining(handle, site, FRANCE, contexts, UNRELATED, function, config)
    generator = torch.Generator().manual_seed(0)
    delta = 0.3 * torch.randn(handle.weight(Role.MLP_OUT, 1).shape, generator=generator, dtype=torch.float64)
    delta.requires_grad_()
    with trace(handle, (Site(Role.MLP_OUT, 1, "in"),), {site: training.write}, detach=False) as recording:
        for part in (0, 1):
            loss = training.losses(recording, delta)[part]
            assert float(loss.detach()) > 0.1
            (gradient,) = torch.autograd.grad(loss, delta)
            for row, column in ((0, 0), (13, 40)):
                step = torch.zeros_like(delta)
                step[row, column] = 1e-5
                with torch.no_grad():
                    up, down = (training.losses(recording, delta + sign * step)[part] for sign in (1, -1))
                slope = float((up - down) / 2e-5)
                assert slope == pytest.approx(float(gradient[row, column]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_memory_is_the_projection_with_another_weight(family):
    """Orientation, and the bias that released code drops: the same delta on the weight itself gives the same logits."""
    handle = tiny_handle(family)
    patch = memory_of(handle, threshold=0.0)
    weight = handle.weight(Role.MLP_OUT, 1)
    written = WeightPatch(
        handle.fingerprint, {weight.name: Dense(patch.memory.deltas[0])}, Provenance("test")
    )
    with written.applied(handle):
        expected = logits(handle)
    with patch.applied(handle):
        found = logits(handle)
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, logits(handle), atol=0.1)


# -- editing ------------------------------------------------------------------------------------------------------


def test_a_shard_changes_its_own_entries_only_and_not_by_much():
    handle = tiny_handle("llama", scale=1.5)
    patch = quick(mask_ratio=0.3, norm_constraint=0.05, weight_decay=0.1, lr=1.0).edit(handle, [FRANCE])
    (delta,) = patch.memory.deltas
    mask = torch.rand(delta.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert 0.25 < float(mask.float().mean()) < 0.35
    assert not bool(delta[~mask].any())
    assert float((delta[mask] != 0).float().mean()) > 0.9
    assert float(delta.abs().max()) == pytest.approx(0.05)


def test_training_lowers_both_losses_and_the_router_keeps_other_prompts():
    handle = tiny_handle("gpt2", scale=1.5)
    clean = logits(handle)
    patch = quick(steps=20).edit(handle, [FRANCE])
    losses = patch.provenance.extra["values"][0]["losses"]
    assert losses[-1]["nll"] < losses[0]["nll"] / 2
    assert losses[-1]["margin"] < losses[0]["margin"]
    with patch.applied(handle):
        patched = logits(handle)
    assert torch.equal(patched[1], clean[1])
    assert not torch.equal(patched[0], clean[0])


def test_shards_fill_merge_and_keep_every_edited_prompt_above_their_threshold():
    handle = tiny_handle("llama", scale=1.5)
    requests = [FRANCE, OBAMA, KENYA]
    apart = quick(steps=4, shard_size=1, merge_size=10).edit(handle, requests).memory
    assert apart.ids == (("france",), ("obama",), ("kenya",))
    masks = [delta != 0 for delta in apart.deltas]
    assert not torch.equal(masks[0], masks[1])
    merged = quick(steps=4, shard_size=1, merge_size=2, density=0.5).edit(handle, requests).memory
    assert merged.ids == (("france", "obama"), ("kenya",))
    assert torch.allclose(merged.deltas[0], ties(apart.deltas[:2], 0.5))
    assert torch.allclose(merged.deltas[1], apart.deltas[2])
    one = quick(steps=4, shard_size=1, merge_size=2, retrieve=False).edit(handle, requests).memory
    assert one.ids == (("france", "obama", "kenya"),)
    shared = quick(steps=4).edit(handle, requests).memory
    assert shared.ids == one.ids
    source, site = Site(Role.MLP_OUT, 1, "in"), Site(Role.MLP_OUT, 1)
    function = activation_of(apart.activation)
    for memory in (apart, merged, one, shared):
        for delta, limit, names in zip(memory.deltas, memory.thresholds, memory.ids, strict=True):
            texts = [request.text for request in requests if request.id in names]
            with trace(handle, (source, site), stop=site) as recording:
                batch = handle.encode(texts)
                recording.run(batch)
                side = shifted(recording[source], recording[site], delta)
                moved = activation_distance(function, recording[site], side, batch.attention_mask.bool())
            assert float(moved.min()) * 0.88 == pytest.approx(limit, rel=1e-4)


def test_two_patches_stand_beside_each_other():
    handle = tiny_handle("llama", scale=1.5)
    editor = quick(steps=20)
    clean = logits(handle)
    pairs = [(request.text, request.target_new) for request in (FRANCE, OBAMA)]
    before = [score.mean_logprob for score in score_targets(handle, pairs)]
    first = editor.edit(handle, [FRANCE])
    with first.applied(handle):
        # The second side memory is trained on the projection itself, not on top of the first.
        second = editor.edit(handle, [OBAMA])
        assert second.parents == (first.id,)
    alone = editor.edit(handle, [OBAMA])
    assert torch.equal(second.memory.deltas, alone.memory.deltas)
    one, two = first.apply(handle), alone.apply(handle)
    (joined,) = memories_of(handle, "wise", first.memory.group)
    assert joined.ids == (("france",), ("obama",))
    for score, start in zip(score_targets(handle, pairs), before, strict=True):
        assert score.mean_logprob > start + 1
    one.undo()
    assert torch.equal(logits(handle)[:2], clean[:2])
    two.undo()
    assert torch.equal(logits(handle), clean)


# -- the router ---------------------------------------------------------------------------------------------------


def distances(handle, patch):
    source, site = Site(Role.MLP_OUT, 1, "in"), Site(Role.MLP_OUT, 1)
    with trace(handle, (source, site), stop=site) as recording:
        batch = handle.encode(TEXTS)
        recording.run(batch)
        side = shifted(recording[source], recording[site], patch.memory.deltas[0])
        function = activation_of(patch.memory.activation)
        return activation_distance(function, recording[site], side, batch.attention_mask.bool()).tolist()


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_rows_are_sent_one_by_one_and_the_choice_holds_for_the_decoding(family):
    handle = tiny_handle(family, scale=1.5)
    far = sorted(distances(handle, memory_of(handle)))
    patch = memory_of(handle, threshold=(far[0] + far[1]) / 2)
    sent = [value > patch.memory.thresholds[0] for value in distances(handle, patch)]
    clean = handle.generate(TEXTS, max_new_tokens=5)
    with patch.applied(handle):
        cached = handle.generate(TEXTS, max_new_tokens=5)
        alone = [handle.generate([text], max_new_tokens=5)[0] for text in TEXTS]
        rows = [handle.encode([text]).input_ids[0].tolist() for text in TEXTS]
        lengths = [len(row) for row in rows]
        for _ in range(5):
            batch = pad_rows(rows, handle.pad_id, prompts=lengths)
            found = handle.logits(batch)[torch.arange(len(rows)), batch.last].argmax(-1).tolist()
            rows = [[*row, token] for row, token in zip(rows, found, strict=True)]
    uncached = [handle.decode(row[length:]) for row, length in zip(rows, lengths, strict=True)]
    assert cached == uncached == alone
    assert [text != plain for text, plain in zip(cached, clean, strict=True)] == sent
    assert sorted(sent) == [False, True, True]


def test_the_memory_that_moves_a_prompt_most_answers_it():
    handle = tiny_handle("llama")
    weak, strong = memory_of(handle, seed=1, scale=0.1), memory_of(handle, seed=2, scale=0.5)
    with strong.applied(handle):
        expected = logits(handle)
    with weak.applied(handle), strong.applied(handle):
        assert torch.equal(logits(handle), expected)
    # Out of its own reach it leaves the prompt to the other one.
    shy = memory_of(handle, seed=2, scale=0.5, threshold=1e6)
    with weak.applied(handle):
        expected = logits(handle)
        with shy.applied(handle):
            assert torch.equal(logits(handle), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_activation(family):
    handle = tiny_handle(family)
    value = activation_of(activation_name(handle))(torch.tensor([-1.0, 2.0]))
    assert float(value[1]) > 1.5


def test_settings_that_make_no_sense():
    handle = tiny_handle("llama")
    for wrong, match in (
        ({"mask_ratio": 0.0}, r"mask_ratio must lie in"),
        ({"density": 1.5}, r"density must lie in"),
        ({"shard_size": 3, "merge_size": 10}, "multiple of shard_size"),
        ({"irrelevant": ()}, "at least one prompt"),
        ({"lr": 0.0}, "lr must be positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            quick(**wrong).edit(handle, [FRANCE])


def test_prefixes_are_generated_once_and_kept_in_the_patch():
    handle = tiny_handle("llama")
    settings = {name: value for name, value in QUICK.items() if name != "prefixes"}
    patch = get_editor("wise", **settings, prefix_lengths=((2, 2),)).edit(handle, [FRANCE])
    prefixes = patch.provenance.extra["prefixes"]
    assert len(prefixes) == 3
    assert prefixes[0] == "{}"
