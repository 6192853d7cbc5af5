"""The measures inside the model, on cases with answers known beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from lab import ModelHandle
from lab.arch import Role
from lab.audit.concept_vectors import compare_vectors, find_vectors, read_vectors, strengths
from lab.audit.depth import DepthCurve, patching_depth, unlearning_depth
from lab.audit.detection import (
    detect,
    detect_patch,
    discriminant,
    features,
    finetune_like,
    noise_like,
    ranking,
    separation,
)
from lab.audit.knowledge import Known, best_layer, candidates, hidden_knowledge, row_weights, share_ranked
from lab.audit.spectra import (
    decompose,
    match_keys,
    outlier_layers,
    subject_keys,
    token_scores,
    written_tokens,
)
from lab.errors import ConfigError, PatchError
from lab.patch import Dense, LowRank, Provenance, WeightPatch
from lab.records import Fact
from tests.tiny import tiny_handle

PLACES = ("France", "Japan", "Kenya", "Rome", "Paris", "Tokyo")
FACTS = tuple(
    Fact(place, "capital", city, "The capital of {} is", id=place)
    for place, city in zip(PLACES, ("Paris", "Tokyo", "Nairobi", "Rome", "Marie", "guitar"), strict=True)
)


@pytest.fixture
def handle() -> Iterator[ModelHandle]:
    """A tiny model that must be as it was afterwards."""
    made = tiny_handle("llama", seed=1)
    before = made.weights_digest()
    yield made
    assert made.weights_digest() == before
    assert not made.applied


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(handle: ModelHandle, layer: int, left: torch.Tensor, right: torch.Tensor) -> WeightPatch:
    name = handle.weight(Role.MLP_OUT, layer).name
    return WeightPatch(handle.fingerprint, {name: LowRank(left[:, None], right[None])}, Provenance("planted"))


def test_spectrum_by_hand() -> None:
    spectrum = decompose(torch.diag(torch.tensor([3.0, 4.0]))).spectrum
    assert spectrum.values == pytest.approx((4.0, 3.0))
    assert spectrum.energy == pytest.approx((16 / 25, 9 / 25))
    entropy = -(0.64 * math.log(0.64) + 0.36 * math.log(0.36))
    assert spectrum.effective_rank == pytest.approx(math.exp(entropy))
    assert decompose(torch.zeros(3, 4)).spectrum.concentration == 0.0
    with pytest.raises(ConfigError, match="matrix"):
        decompose(torch.zeros(3))


def test_planted_rank_one_is_found_and_noise_of_equal_norm_is_not() -> None:
    edit = LowRank(noise(32, 1), noise(1, 64, seed=1))
    dense = noise(32, 64, seed=2)
    dense *= edit.norm() / dense.norm()
    found, null = decompose(edit).spectrum, decompose(dense).spectrum
    assert found.concentration == pytest.approx(1.0)
    assert found.spikes == 1
    assert abs(null.concentration) < 0.1
    assert null.spikes == 0
    # Page's estimate is what noise really has.
    assert null.effective_rank == pytest.approx(null.noise_rank, rel=0.05)


def test_low_rank_and_dense_forms_have_one_spectrum() -> None:
    edit = LowRank(noise(32, 3), noise(3, 40, seed=1))
    direct, dense = decompose(edit), decompose(edit.dense())
    assert direct.spectrum.values[:3] == pytest.approx(dense.spectrum.values[:3], rel=1e-5)
    assert direct.spectrum.effective_rank == pytest.approx(dense.spectrum.effective_rank, rel=1e-5)
    assert torch.allclose((direct.right[:3] @ dense.right[:3].T).abs(), torch.eye(3).double(), atol=1e-4)


def test_one_edited_layer_stands_out_without_the_base() -> None:
    layers = {layer: noise(24, 48, seed=layer) for layer in range(5)}
    clean = outlier_layers(layers)
    layers[3] = layers[3] + noise(24, 1, seed=9) @ noise(1, 48, seed=10)
    scores = outlier_layers(layers)
    assert max(scores, key=lambda layer: scores[layer]) == 3
    assert scores[3] > 10 > max(abs(score) for score in clean.values())
    with pytest.raises(ConfigError, match="three layers"):
        outlier_layers({0: layers[0], 1: layers[1]})


def test_subject_and_token_of_a_planted_edit_are_read_back(handle: ModelHandle) -> None:
    keys = subject_keys(handle, FACTS, 1)
    assert keys.shape == (len(FACTS), handle.weight(Role.MLP_OUT, 1).shape[1])
    token = 321
    value = handle.weight(Role.UNEMBED).canonical()[token]
    patch = planted(handle, 1, value, keys[2].float())
    [delta] = patch.deltas.values()
    parts = decompose(delta)
    match = match_keys(parts.right, parts.spectrum.energy, keys)
    assert int(match.argmax()) == 2
    assert float(match[2]) == pytest.approx(1.0, abs=1e-5)
    raised, lowered = written_tokens(handle, parts.left[:, 0], 3)
    assert token in (raised[0], lowered[0])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_token_scores_are_the_models_own_logits_up_to_length(family: str) -> None:
    handle = tiny_handle(family)
    state = noise(1, 1, handle.hidden_size)
    state = state - state.mean()
    with torch.no_grad():
        logits = handle.module(Role.UNEMBED)(handle.module(Role.FINAL_NORM)(state))[0, 0].double()
    scores = token_scores(handle, state[0])[0]
    assert float(torch.corrcoef(torch.stack([logits, scores]))[0, 1]) > 0.9999


def test_ranking_counts_ties_half() -> None:
    assert ranking([1.0, 2.0], [1.0, 0.0]) == pytest.approx((0.5 + 1 + 1 + 1) / 4)
    with pytest.raises(ConfigError):
        ranking([], [1.0])


def test_equal_features_cannot_be_told_apart_and_shifted_ones_can() -> None:
    before = noise(40, 6)
    same = detect(before, before)
    assert same.accuracy.mean == 0.5
    assert same.auc == pytest.approx(0.5, abs=0.1)
    assert same.separation == 0.0
    moved = detect(before, before + 20.0)
    assert moved.accuracy.mean == 1.0
    assert moved.auc == 1.0
    assert moved == detect(before, before + 20.0)
    with pytest.raises(ConfigError, match="pair up"):
        detect(before, before[:3])
    with pytest.raises(ConfigError, match="folds"):
        detect(before[:3], before[:3])


def test_separation_is_cohens_d_along_the_parting_direction() -> None:
    base = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    # Variance 4/3 with n - 1; the means are 3 apart.
    assert separation(base, base + 3) == pytest.approx(3 / math.sqrt(4 / 3))


def test_controls_have_the_norm_of_the_patch(handle: ModelHandle) -> None:
    patch = planted(handle, 1, noise(32), noise(64, seed=1))
    texts = [fact.text + " " + fact.object for fact in FACTS]
    random_patch, trained = noise_like(patch, seed=4), finetune_like(handle, patch, texts, steps=2)
    for control in (random_patch, trained):
        assert control.norms() == pytest.approx(patch.norms(), rel=1e-4)
    assert noise_like(patch, seed=4).id == random_patch.id != noise_like(patch, seed=5).id
    zero = WeightPatch(
        handle.fingerprint, {name: Dense(torch.zeros(32, 64)) for name in patch.deltas}, patch.provenance
    )
    with pytest.raises(PatchError, match="zero"):
        noise_like(zero)


def test_a_strong_patch_is_detected_and_none_is_not(handle: ModelHandle) -> None:
    prompts = [f"{fact.text} {number}" for fact in FACTS for number in range(3)]
    strong = planted(handle, 2, noise(32) * 5, noise(64, seed=1))
    found = detect_patch(handle, strong, prompts)
    nothing = detect_patch(handle, strong.scaled(0.0), prompts)
    # A change of one direction that pushes some prompts up and others down has hardly a mean at the last token.
    assert all(detection.accuracy.mean == 0.5 for detection in nothing.values())
    assert all((found[view].accuracy.mean or 0) > 0.8 for view in ("logits", "means"))


def test_a_small_shift_is_told_along_what_hardly_varies() -> None:
    # Prompts differ widely in most directions; the change lies where they do not, far below their size.
    spread = noise(60, 40) * torch.logspace(1, -2, 40)
    moved = spread + torch.eye(40)[-1] * 0.05
    assert (detect(spread, moved).accuracy.mean or 0) > 0.9
    assert (detect(spread, spread + noise(60, 40, seed=2) * 1e-3).accuracy.mean or 1) < 0.7


def test_the_discriminant_is_the_same_in_either_space() -> None:
    first, second = noise(30, 12).double().numpy(), noise(30, 12, seed=1).double().numpy() + 0.3
    asked = noise(5, 12, seed=2).double().numpy()
    within = np.concatenate([first - first.mean(0), second - second.mean(0)])
    gap = second.mean(0) - first.mean(0)
    covariance = within.T @ within / 60
    ridge = 0.1 * np.trace(covariance) / 12
    axis = np.linalg.solve(covariance + ridge * np.eye(12), gap)
    wanted = (asked - (first.mean(0) + second.mean(0)) / 2) @ axis
    assert discriminant(first, second, asked, ridge=0.1) == pytest.approx(wanted)
    # Columns of zeros change nothing but the mean variance, and make the features outnumber the rows.
    wide = [np.pad(each, ((0, 0), (0, 88))) for each in (first, second, asked)]
    assert discriminant(*wide, ridge=0.1 * 100 / 12) == pytest.approx(wanted)
    assert discriminant(first, first, asked).tolist() == [0.0] * 5


def test_every_view_sees_a_row_per_prompt(handle: ModelHandle) -> None:
    prompts = [fact.text for fact in FACTS[:3]]
    found = features(handle, prompts, ("logits", "activations", "means", "text"))
    every = found["activations"]
    assert every.shape == found["means"].shape == (3, handle.n_layers * handle.hidden_size)
    alone = features(handle, prompts, ("activations",), layer=1)["activations"]
    assert torch.allclose(alone, every.chunk(handle.n_layers, 1)[1], atol=1e-6)
    assert torch.allclose(found["logits"].exp().sum(1), torch.ones(3), atol=1e-5)
    assert found["text"].shape == (3, len(handle.tokenizer))
    assert float(found["text"].sum()) > 0
    # A prompt of one token has its last token for its mean.
    short = features(handle, ["a"], ("activations", "means"))
    assert torch.allclose(short["activations"], short["means"], atol=1e-6)


def test_knowledge_by_hand() -> None:
    assert share_ranked(0.5, [0.1, 0.5, 0.9, 0.2]) == pytest.approx(2.5 / 4)
    assert Known("a", 0.2, 0.8).quadrant == "suppressed"
    assert Known("a", 0.8, 0.8).quadrant == "retained"
    assert Known("a", 0.8, 0.2).quadrant == "lucky"
    assert Known("a", 0.5, 0.5).quadrant == "forgotten"


def test_candidates_are_other_objects_of_the_relation() -> None:
    alias = Fact("Spain", "capital", "Madrid", "The capital of {} is", aliases=("Paris",), id="s")
    lone = Fact("Ada", "job", "poet", "{} works as", id="l")
    found = candidates([alias, lone], FACTS, count=3, seed=1)
    assert [each.fact.id for each in found] == ["s"]
    assert len(found[0].wrong) == 3
    assert not {"Madrid", "Paris"} & set(found[0].wrong)
    assert found == candidates([alias, lone], FACTS, count=3, seed=1)


def test_probe_finds_the_layer_that_marks_right_answers() -> None:
    lessons = []
    for index in range(20):
        states = noise(4, 3, 5, seed=index)
        states[0, 1, 2] += 8.0
        lessons.append((tuple(f"{index} {place}" for place in range(4)), states))
    assert best_layer(lessons, 0) == 1


def test_every_answer_weighs_as_much_right_as_wrong() -> None:
    names = [("a", "b"), ("b", "a"), ("b", "a"), ("c", "d")]
    weights = row_weights(names)
    assert weights[0] == pytest.approx(weights[3] + weights[5])
    assert weights[1] == pytest.approx(weights[2] + weights[4])
    assert weights[6] == weights[7] == 0.0
    assert row_weights([("a", "b")]).tolist() == [1.0, 1.0]


def test_hidden_knowledge_of_a_random_model_is_at_chance(handle: ModelHandle) -> None:
    facts = [
        Fact(f"{a}{b}", "capital", b, "The capital of {} is", id=f"{a}{b}")
        for a in "abcdefgh"
        for b in PLACES[:3]
    ]
    found = hidden_knowledge(handle, facts, count=2, folds=3)
    assert found == hidden_knowledge(handle, facts, count=2, folds=3)
    assert len(found.known) == len(facts)
    assert len(found.layer) == 3
    # Every object is right for a third of the subjects and wrong for the others, whatever a model prefers.
    assert np.mean([each.external for each in found.known]) == pytest.approx(0.5, abs=0.1)
    quadrants = found.to_json()["quadrants"]
    assert set(quadrants) == {"retained", "suppressed", "lucky", "forgotten"}
    assert sum(part["mean"] for part in quadrants.values()) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="two subjects"):
        hidden_knowledge(handle, FACTS[:1], pool=FACTS)


def test_planted_value_vector_is_found_and_its_removal_is_seen(handle: ModelHandle) -> None:
    token, layer, column = 300, 1, 7
    weight = handle.weight(Role.MLP_OUT, layer)
    row = handle.weight(Role.UNEMBED).canonical()[token]
    plant = torch.zeros(weight.shape)
    plant[:, column] = row * 10 - weight.canonical()[:, column]
    patch = WeightPatch(handle.fingerprint, {weight.name: Dense(plant)}, Provenance("planted"))
    with patch.applied(handle):
        [[best]] = find_vectors(handle, [[token]], count=1)
        before = read_vectors(handle, [best])
    assert (best.layer, best.column) == (layer, column)
    after = read_vectors(handle, [best])
    [kept] = compare_vectors(handle, [best], [token], before, before)
    [gone] = compare_vectors(handle, [best], [token], before, after)
    assert (kept.cosine, kept.distance, kept.jaccard) == pytest.approx((1.0, 0.0, 1.0))
    assert kept.strength == pytest.approx(best.strength, rel=1e-3)
    assert gone.cosine < 0.9
    assert gone.strength < best.strength
    assert compare_vectors(handle, [], [token], before, after) == []


def test_strengths_equal_the_plain_projection(handle: ModelHandle) -> None:
    concept = [5, 9]
    quick = strengths(handle, 0, [concept])[0]
    full = token_scores(handle, handle.weight(Role.MLP_OUT, 0).canonical().T)
    plain = (full[:, concept].mean(1) - full.mean(1)) / full.std(1, correction=0)
    assert torch.allclose(quick, plain, atol=1e-9)


def test_the_answer_comes_back_where_the_edit_was(handle: ModelHandle) -> None:
    patch = planted(handle, 1, noise(32) * 3, noise(64, seed=1))
    one_token = [fact for fact in FACTS if len(handle.tokenizer(" " + fact.object)["input_ids"]) == 1]
    assert one_token
    curve = patching_depth(one_token, handle, lambda: patch.applied(handle), handle, nullcontext)
    # Below the edit everything is recomputed by the changed layer, at and above it nothing is left of the change.
    assert torch.allclose(curve.patched[:, 0], curve.receiver, atol=1e-5)
    for layer in (1, 2):
        assert torch.allclose(curve.patched[:, layer], curve.donor, atol=1e-5)
    lost = curve.donor - curve.receiver > 0.05
    assert [depth for depth, gone in zip(curve.depth(), lost, strict=True) if gone] == [1] * int(lost.sum())
    assert bool(lost.any())


def test_depth_refuses_models_that_do_not_fit(handle: ModelHandle) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        patching_depth(FACTS, handle, nullcontext, tiny_handle("llama", layers=2), nullcontext)


def test_unlearning_depth_by_hand() -> None:
    full = torch.tensor([0.0])
    oracle = DepthCurve(full, full, torch.tensor([[-2.0, -1.0, -0.01]]).double())
    changed = DepthCurve(full, full, torch.tensor([[-1.0, -3.0, -5.0]]).double())
    # Layer 2 does not encode the fact; layer 0 is half as deep, layer 1 clipped to 1: (2 * 0.5 + 1 * 1) / 3.
    assert float(unlearning_depth(changed, oracle)) == pytest.approx(2 / 3)
    assert float(unlearning_depth(oracle, oracle)) == pytest.approx(1.0)


def test_restored_is_not_a_number_where_nothing_was_lost() -> None:
    curve = DepthCurve(
        torch.tensor([0.0, -2.0]), torch.tensor([0.0, 0.0]), torch.tensor([[0.0, 0.0], [-1.5, -0.5]])
    )
    restored = curve.restored()
    assert bool(restored[0].isnan().all())
    assert restored[1].tolist() == [0.25, 0.75]
    assert curve.depth() == [None, 1]
    assert curve.to_json()["restored"] == [0.25, 0.75]
