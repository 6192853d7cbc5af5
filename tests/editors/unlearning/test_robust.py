"""Hidden states, perturbations, neurons, merging and closed form: what is particular to each method."""

from __future__ import annotations

import functools

import pytest
import torch

from editors.keys import read_sites
from editors.rows import request_rows
from editors.unlearning import get_unlearner
from editors.unlearning.localised import contributions
from editors.unlearning.merging import ignore_top, reinforce
from editors.unlearning.perturbed import ball_search
from editors.unlearning.procedure import real_norms
from editors.unlearning.rocr import CONTEXTS
from lab.arch import Role
from lab.errors import BaseMismatchError, ConfigError
from lab.patch import Dense, Provenance, WeightPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.stats import Corpus, StatsCache
from lab.tokens import join_target
from lab.trace import Site, trace
from tests.editors.unlearning.test_gradient import FORGET, RETAIN, logprob
from tests.tiny import tiny_handle

NEVER = {"stop_above": None, "stop_retain": None}
QUICK = {"lr": 5e-3, "epochs": 2, **NEVER}


@functools.cache
def handle_of(family="llama"):
    return tiny_handle(family, layers=2, scale=1.5)


def patch_of(name, **settings):
    return get_unlearner(name, **settings).unlearn(handle_of(), FORGET, RETAIN)


@pytest.mark.parametrize("name", ["rmu", "adv_rmu"])
def test_rmu_moves_two_matrices_and_scales_its_goal_with_the_states(name):
    made = {scale: patch_of(name, **QUICK, layer=1, scale=scale) for scale in (1.0, 10.0)}
    names = {handle_of().weight(Role.MLP_OUT, layer).name for layer in (0, 1)}
    starts = []
    for patch in made.values():
        assert set(patch.deltas) == names
        history = patch.provenance.extra["history"]
        assert history[1]["forget"] < history[0]["forget"]
        assert history[0]["retain"] == pytest.approx(0.0, abs=1e-9)
        starts.append(history[0]["forget"])
    assert starts[1] > 20 * starts[0]
    with pytest.raises(ConfigError, match="layer 9"):
        patch_of(name, layer=9)


def test_the_search_restores_answers_within_its_ball_and_not_on_padding():
    handle, site = handle_of(), Site(Role.BLOCK, 0)
    from editors.unlearning.trainer import UnlearningTrainer

    made = get_unlearner("adv_ga", **NEVER, radius=0.2, inner_steps=5)
    run = UnlearningTrainer(handle, made.objective, made.config, FORGET, (), 0)
    clean = run.answers("answer", [0, 1], grad=False, reads=(site,))
    found = run.answers("answer", [0, 1], grad=False, reads=(site,), writes=ball_search(run, [0, 1], site))
    change = found.states[site] - clean.states[site]
    assert not bool(clean.real.all())
    assert bool((change[~clean.real] == 0).all())
    limit = 0.2 * real_norms(clean.states[site], clean.real)
    assert bool((real_norms(change, clean.real) <= limit * 1.001).all())

    def said(answers):
        lines = answers.lines
        return float(lines.row_losses(lines.of(answers.logits)).mean())

    assert said(found) < said(clean) - 0.1


@pytest.mark.parametrize("targeted", [True, False])
def test_lat_keeps_a_perturbation_for_some_updates(targeted):
    patch = patch_of("lat", lr=1e-3, epochs=1, model_steps=3, weights="full", targeted=targeted, **NEVER)
    history = patch.provenance.extra["history"]
    assert len(history) == 3
    assert history[2]["forget"] < history[0]["forget"]


def test_contributions_are_activation_times_slope():
    handle = tiny_handle("gpt2", layers=2, width=16, dtype=torch.float64)
    pair, site = (FORGET[0].text, FORGET[0].object), Site(Role.MLP_OUT, 1, "in")
    found = contributions(handle, [pair], [1])[0, 0]

    neuron = int(found.argmax())

    def chance(position, factor):
        def write(states):
            changed = states.clone()
            changed[:, position, neuron] *= factor
            return changed

        with trace(handle, writes={site: write}):
            return score_targets(handle, [pair])[0].probability

    head, tail = join_target(handle.tokenizer, *pair)
    positions = range(len(head) + len(tail) - 1)
    slopes = [(chance(at, 1 + 1e-5) - chance(at, 1 - 1e-5)) / 2e-5 for at in positions]
    assert float(found[neuron]) == pytest.approx(max(slopes), rel=1e-4)
    assert max(slopes) > 1e-8


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_klue_moves_the_weights_of_few_neurons_only(family):
    handle = handle_of(family)
    made = get_unlearner("klue", share=0.05, skip_forgotten=False, **{**QUICK, "epochs": 1})
    patch = made.unlearn(handle, FORGET, RETAIN)
    out = {layer: patch.deltas[handle.weight(Role.MLP_OUT, layer).name].dense() for layer in (0, 1)}
    moved = sum(int((delta.abs().sum(0) > 0).sum()) for delta in out.values())
    wanted = round(0.05 * 2 * out[0].shape[1])
    assert 0 < moved <= wanted
    inner = [patch.deltas[handle.weight(Role.MLP_IN, layer).name].dense() for layer in (0, 1)]
    assert 0 < sum(int((delta.abs().sum(1) > 0).sum()) for delta in inner) <= wanted
    assert patch.provenance.extra["passes"] == [{"facts": 2, "neurons": wanted}]
    with pytest.raises(ConfigError, match="chooses its weights"):
        get_unlearner("klue", weights="lora")


def test_roka_holds_siblings_to_what_the_model_says():
    free = patch_of("roka", **{**QUICK, "epochs": 6}, retain_weight=1e-6).provenance.extra["history"]
    held = patch_of("roka", **{**QUICK, "epochs": 6}, retain_weight=5.0).provenance.extra["history"]
    assert held[-1]["retain"] <= free[-1]["retain"] + 1e-6
    assert free[-1]["forget"] < free[0]["forget"]


def test_a_task_vector_is_what_a_fine_tune_changes_negated():
    training = {"lr": 2e-3, "epochs": 2}
    learned = reinforce(handle_of(), FORGET, **training)
    patch = patch_of("task_vector", strength=2.0, **training)
    assert set(patch.deltas) == set(learned.deltas)
    for name, delta in learned.deltas.items():
        assert torch.allclose(patch.deltas[name].dense(), -2.0 * delta.dense())
    before = logprob(handle_of())
    with learned.applied(handle_of()):
        assert logprob(handle_of()) > before + 0.1


def test_msa_takes_its_vectors_from_the_earlier_state():
    earlier = tiny_handle("llama", layers=2, scale=1.2, seed=4)
    training = {"lr": 2e-3, "epochs": 2}
    patch = patch_of("msa", before=earlier, strength=1.5, keep_strength=0.5, **training)
    away, kept = (reinforce(earlier, facts, **training) for facts in (FORGET, RETAIN))
    for name, delta in patch.deltas.items():
        expected = -1.5 * away.deltas[name].dense() + 0.5 * kept.deltas[name].dense()
        assert torch.allclose(delta.dense(), expected, atol=1e-7)
    assert patch.base == handle_of().fingerprint
    with pytest.raises(BaseMismatchError, match="earlier state"):
        patch_of("msa", before=tiny_handle("llama", layers=2, width=16), **training)


def test_the_largest_changes_are_left_out():
    change = {"a": torch.tensor([[1.0, -9.0], [0.0, 3.0]]), "b": torch.tensor([2.0, -5.0, 0.5])}
    patch = WeightPatch("base", {name: Dense(each) for name, each in change.items()}, Provenance("x"))
    pruned = ignore_top(patch, 0.4)
    assert pruned.deltas["a"].dense().tolist() == [[1.0, 0.0], [0.0, 3.0]]
    assert pruned.deltas["b"].dense().tolist() == [2.0, 0.0, 0.5]
    assert ignore_top(patch, 0.0) is patch
    with pytest.raises(ConfigError, match="share"):
        ignore_top(patch, 1.0)
    with pytest.raises(ConfigError, match="share"):
        get_unlearner("ignore_k", share=2)


def test_rocr_sends_a_subject_to_its_decoy(tmp_path):
    handle = tiny_handle("gpt2", layers=2, dtype=torch.float64)
    text = "The capital of France is Paris and the wife of Barack Obama is in the city of Rome. " * 30
    (tmp_path / "corpus.txt").write_text(text)
    resources = {"stats": StatsCache(tmp_path / "s"), "corpus": Corpus(str(tmp_path / "corpus.txt"), 400)}
    # Almost all directions, no ridge, one context: the update solves for the key exactly.
    made = get_unlearner(
        "rocr", layers=(1,), ridge=1e-9, energy=0.9999, decoy="Japan", own_prompts=False, **resources
    )
    patch = made.unlearn(handle, FORGET[:1])
    assert patch.rank == 1

    def states(subject):
        rows = [
            row
            for each in CONTEXTS
            for row in request_rows(handle, EditRequest("x", each, subject, "it"), ["{}"])
        ]
        site = Site(Role.BLOCK, 1)
        return read_sites(handle, rows, [site], site)[site]

    goal, before = states("Japan")[0], states("France")
    with patch.applied(handle):
        after = states("France")
    assert float((after[0] - goal).norm()) < 0.5 * float((before[0] - goal).norm())
    assert patch.carry[0].tensors["layer 1"].shape == (128, 1)
    with pytest.raises(ConfigError, match="mode"):
        get_unlearner("rocr", mode="far")


def test_rocr_holds_other_subjects_and_pushes_further(tmp_path):
    handle = tiny_handle("gpt2", layers=2, dtype=torch.float64)
    text = "The capital of France is Paris and the wife of Barack Obama is in the city of Rome. " * 30
    (tmp_path / "corpus.txt").write_text(text)
    resources = {"stats": StatsCache(tmp_path / "s"), "corpus": Corpus(str(tmp_path / "corpus.txt"), 400)}
    site = Site(Role.BLOCK, 1)

    def moved(**settings):
        made = get_unlearner(
            "rocr", layers=(1,), ridge=1e-6, energy=0.9999, mode="reject", steps=5, **settings, **resources
        )
        patch = made.unlearn(handle, FORGET, RETAIN)
        found = []
        for subject in (FORGET[0].subject, RETAIN[0].subject):
            rows = request_rows(handle, EditRequest("x", CONTEXTS[1], subject, "it"), ["{}"])
            before = read_sites(handle, rows, [site], site)[site]
            with patch.applied(handle):
                found.append(float((read_sites(handle, rows, [site], site)[site] - before).norm()))
        return found, patch

    (free, free_other), _ = moved()
    (held, held_other), patch = moved(hold=10.0)
    assert held_other / held < 0.5 * free_other / free
    assert patch.provenance.extra["held_subjects"] == len({fact.subject for fact in RETAIN})
    (pushed, _), _ = moved(push=3.0, searches=2)
    assert pushed > 1.5 * free
    with pytest.raises(ConfigError, match="hold"):
        get_unlearner("rocr", hold=-1.0)


def test_needle_changes_the_columns_it_names():
    patch = patch_of("needle", columns=2, candidates=4, mode="zero")
    named = {(each["layer"], each["column"]) for each in patch.provenance.extra["columns"]}
    found = set()
    for layer in (0, 1):
        weight = handle_of().weight(Role.MLP_OUT, layer)
        if weight.name in patch.deltas:
            delta = patch.deltas[weight.name].dense()
            for column in torch.nonzero(delta.abs().sum(0))[:, 0].tolist():
                found.add((layer, column))
                assert torch.equal(delta[:, column], -weight.canonical()[:, column])
    assert found == named and len(named) == 2
    best = max(patch.provenance.extra["columns"], key=lambda each: each["lost"])
    assert best["lost"] > 0
    with pytest.raises(ConfigError, match="candidates"):
        get_unlearner("needle", columns=5, candidates=2)


def test_erasing_by_edit_says_what_the_editor_was_asked():
    quick = {"editor": "ft_m", "layers": (1,), "steps": 2, "lr": 0.01}
    refused = patch_of("erase_edit", **quick, refusals=("unknown",)).provenance
    assert set(refused.extra["targets"].values()) == {"unknown"}
    assert refused.config["editor"] == "ft_m"
    nothing = patch_of("erase_edit", **quick, target="null").provenance
    assert set(nothing.extra["targets"].values()) == {handle_of().tokenizer.eos_token}
    with pytest.raises(ConfigError, match="blank"):
        get_unlearner("erase_edit", target=" ")


def test_a_refusal_stands_before_prompts_while_it_is_applied():
    handle = handle_of()
    patch = patch_of("in_context", scope="all", layout="plain", text="Nobody knows {subject}")
    assert handle.rewrite(["Who?"]) == ["Who?"]
    with patch.applied(handle):
        (asked,) = handle.rewrite(["Who?"])
    assert asked.endswith("Who?") and "Nobody knows France, Barack Obama" in asked
    assert handle.rewrite(["Who?"]) == ["Who?"]


def test_ga_lora_can_take_away_what_was_just_learned():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    learned = reinforce(handle, FORGET, lr=5e-3, epochs=8)
    with learned.applied(handle):
        known = logprob(handle)
        made = get_unlearner("ga_lora", lr=0.02, epochs=6, mismatches=2, **NEVER)
        patch = made.unlearn(handle, FORGET, RETAIN)
        assert patch.parents == (learned.id,)
        with patch.applied(handle):
            assert logprob(handle) < known - 0.5
