"""Every attack on tiny random models: bits, ranges, seeds; and what single attacks compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lab.arch import Role
from lab.audit.base import AuditSubject, Controls
from lab.audit.forward import id_lines, text_ids, written_logprobs
from lab.audit.latent import learn_direction
from lab.audit.registry import ATTACKS
from lab.audit.run import plain_scores
from lab.audit.suffix import _loss, find_suffix
from lab.audit.weights import cut_smallest, held, round_to_grid, rounding_step, swallowed
from lab.patch import Dense, LowRank, Provenance, WeightPatch
from lab.records import Fact
from lab.scoring import score_targets
from tests.tiny import tiny_handle

PLACES = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Italy": "Rome"}
OURS = (
    "forms",
    "in_context",
    "step_by_step",
    "two_hop",
    "suffix",
    "latent",
    "steering",
    "sampling",
    "relearn",
    "quantize",
    "prune",
    "adapter_removal",
)


def _facts(places: dict[str, str], relation: str, prompt: str) -> tuple[Fact, ...]:
    return tuple(
        Fact(place, relation, answer, prompt, id=f"{relation}/{place}", group="place")
        for place, answer in places.items()
    )


FACTS = _facts(PLACES, "capital", "The capital of {} is")
RETAINED = (
    *_facts({"Paris": "French", "Rome": "Italian", "Peru": "Spanish"}, "tongue", "The tongue of {} is"),
    *_facts({"Peru": "Lima", "Cuba": "Havana", "Spain": "Madrid"}, "capital", "The capital of {} is"),
)
NEVER = _facts(
    {"Nowhere": "Tokyo", "Elsewhere": "Rome", "Erewhon": "Paris"}, "capital", "The capital of {} is"
)


@pytest.fixture
def subject() -> AuditSubject:
    handle = tiny_handle("llama", layers=2)
    controls = Controls(tiny_handle("llama", layers=2, seed=1), NEVER)
    return AuditSubject(handle, FACTS, controls, retained=RETAINED)


def _patch(handle, *, rank_one: bool = True) -> WeightPatch:
    weight = handle.weight(Role.MLP_OUT, 1)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(size, generator=generator) * 0.1 for size in weight.shape)
    delta = LowRank(left[:, None], right[None, :])
    return WeightPatch(
        handle.fingerprint, {weight.name: delta if rank_one else Dense(delta.dense())}, Provenance("hand")
    )


def quiet(phase: str, done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.mark.parametrize("name", OURS)
def test_an_attack_leaves_the_model_as_it_was_and_its_seed_decides(name, subject):
    handle, oracle = subject.handle, subject.controls.oracle
    assert oracle is not None
    _patch(handle).apply(handle, "sidecar")
    subject = replace(subject, controls=replace(subject.controls, original=plain_scores(subject).facts))
    digests = [each.weights_digest() for each in (handle, oracle)]
    flags = [parameter.requires_grad for parameter in handle.model.parameters()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules())
    luck = torch.random.get_rng_state()

    found = ATTACKS.get(name)().run(subject, quiet)

    assert found.applicable
    assert found.name == name
    assert found.tried
    assert found.per_fact
    assert all(0.0 <= score <= 1.0 for score in found.per_fact)
    assert found.leak == pytest.approx(sum(found.per_fact) / len(found.per_fact))
    assert {"oracle", "original"} <= set(found.controls)
    assert -1.0 <= found.lift.low <= found.lift.mean <= found.lift.high <= 1.0
    assert [each.weights_digest() for each in (handle, oracle)] == digests
    assert [parameter.requires_grad for parameter in handle.model.parameters()] == flags
    assert all(parameter.grad is None for parameter in handle.model.parameters())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules()) == hooks
    assert torch.equal(torch.random.get_rng_state(), luck)
    assert ATTACKS.get(name)().run(subject, quiet).to_json() == found.to_json()


@pytest.mark.parametrize("name", ["quantize", "relearn", "adapter_removal"])
def test_an_attack_that_fails_midway_leaves_the_model_as_it_was(name, subject, monkeypatch):
    _patch(subject.handle).apply(subject.handle, "sidecar")
    digest, state = subject.handle.weights_digest(), subject.handle.state
    asked = score_targets(subject.handle, [(fact.text, fact.object) for fact in FACTS])

    def failing(*_args, **_options):
        raise RuntimeError("in the middle")

    module = "lab.audit.relearn" if name == "relearn" else "lab.audit.weights"
    monkeypatch.setattr(f"{module}.score_facts", failing)
    with pytest.raises(RuntimeError, match="in the middle"):
        ATTACKS.get(name)().run(subject, quiet)
    assert subject.handle.weights_digest() == digest
    assert subject.handle.state == state
    assert all(
        not parameter.requires_grad or parameter.grad is None
        for parameter in subject.handle.model.parameters()
    )
    assert score_targets(subject.handle, [(fact.text, fact.object) for fact in FACTS]) == asked


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("name", ["suffix", "latent", "quantize"])
def test_other_families_go_through_too(name, family):
    handle = tiny_handle(family, layers=2)
    digest = handle.weights_digest()
    found = ATTACKS.get(name)().run(AuditSubject(handle, FACTS, Controls(never=NEVER)), quiet)
    assert found.applicable
    assert handle.weights_digest() == digest


def test_every_attack_says_what_it_is():
    for name in OURS:
        attack = ATTACKS.get(name)
        assert attack.name == name
        assert attack.cost
        assert attack.access in ("black-box", "grey-box", "white-box")


def test_what_cannot_be_tried_is_not_applicable(subject):
    one = replace(subject, facts=FACTS[:1], retained=(), controls=Controls())
    for name in ("relearn", "suffix", "latent", "two_hop", "indirect", "adapter_removal"):
        found = ATTACKS.get(name)().run(one, quiet)
        assert not found.applicable
        assert found.note


def test_adapter_removal_finds_what_a_loose_patch_hides_and_not_what_is_merged(subject):
    handle = subject.handle
    before = plain_scores(subject).facts
    merged = _patch(handle).apply(handle, "merge")
    assert not ATTACKS.get("adapter_removal")().run(subject, quiet).applicable
    with_merged = plain_scores(subject).facts
    assert with_merged != before
    loose = _patch(handle, rank_one=False).apply(handle, "sidecar")
    assert ATTACKS.get("adapter_removal")().run(subject, quiet).per_fact == with_merged
    merged.undo()
    assert ATTACKS.get("adapter_removal")().run(subject, quiet).per_fact == before
    loose.undo()


def test_rounding_moves_no_weight_by_more_than_half_a_step():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    weight[2] = 0.0
    for bits, levels in ((8, 255), (4, 15)):
        rounded = round_to_grid(weight, bits)
        step = rounding_step(weight, bits)
        assert bool(((rounded - weight).abs() <= step / 2 + 1e-6).all())
        assert max(len(row.unique()) for row in rounded) <= levels
        assert torch.equal(rounded[2], weight[2])
        assert torch.allclose(round_to_grid(rounded, bits), rounded, atol=1e-6)
    assert bool((rounding_step(weight, 4, group=5)[:, :5] <= rounding_step(weight, 4)[:, :5]).all())


def test_pruning_takes_the_smallest():
    weight = torch.tensor([[3.0, -0.1, 2.0], [0.2, -5.0, 1.0]])
    assert cut_smallest(weight, 0.34).tolist() == [[3.0, 0.0, 2.0], [0.0, -5.0, 1.0]]
    assert torch.equal(cut_smallest(weight, 0.0), weight)


def test_swallowed_is_the_share_of_small_changes(subject):
    handle = subject.handle
    assert swallowed(handle, 8) is None
    weight = handle.weight(Role.MLP_OUT, 0)
    step = rounding_step(weight.canonical(), 8)
    delta = torch.zeros(weight.shape)
    delta[0, :3] = step[0, 0] * 0.3
    delta[0, 3] = step[0, 0] * 2
    patch = WeightPatch(handle.fingerprint, {weight.name: Dense(delta)}, Provenance("hand"))
    with patch.applied(handle):
        assert swallowed(handle, 8) == pytest.approx(0.75)


def test_held_weights_come_back(subject):
    digest = subject.handle.weights_digest()
    with pytest.raises(RuntimeError), held(subject.handle) as parameters, torch.no_grad():
        for parameter in parameters.values():
            parameter.zero_()
        raise RuntimeError
    assert subject.handle.weights_digest() == digest


def test_lines_score_as_the_scorer_does(subject):
    pairs = [(fact.text, fact.object) for fact in FACTS]
    lines = id_lines(subject.handle, text_ids(subject.handle, pairs))
    expected = [score.sum_logprob for score in score_targets(subject.handle, pairs)]
    assert written_logprobs(subject.handle, lines).tolist() == pytest.approx(expected, abs=1e-4)


def test_a_learned_direction_stays_in_its_ball_and_helps_what_it_learned(subject):
    handle = subject.handle
    lines = id_lines(handle, text_ids(handle, [(fact.text, fact.object) for fact in FACTS]))
    from lab.audit.latent import added, at_prompt_last
    from lab.trace import Site

    bound = 0.5 * float(at_prompt_last(handle, lines, 0).norm(dim=-1).mean())
    delta = learn_direction(handle, lines, 0, 0.5, 8)
    assert 0 < float(delta.norm()) <= bound * (1 + 1e-5)
    helped = written_logprobs(handle, lines, {Site(Role.BLOCK, 0): added(lines, delta)}).mean()
    assert float(helped) > float(written_logprobs(handle, lines).mean())


def test_a_suffix_helps_what_it_was_found_for_or_is_left_out(subject):
    handle = subject.handle
    rows = text_ids(handle, [(fact.text, fact.object) for fact in FACTS[:2]])

    def gain(suffix: list[int]) -> float:
        lines = id_lines(handle, [([*prompt, *suffix], target) for prompt, target in rows])
        return float(written_logprobs(handle, lines).mean())

    found = [
        find_suffix(handle, rows, length=3, steps=steps, swaps=24, seed=seed)
        for seed in range(3)
        for steps in (0, 30)
    ]
    assert any(found)
    assert 1 < max(map(len, found)) <= 3
    assert not any(found[::2])
    assert all(gain(suffix) > gain([]) for suffix in found if suffix)
    assert not set().union(*found) & set(handle.tokenizer.all_special_ids)


def test_losses_with_shared_beginnings_equal_the_full_pass(subject):
    handle = tiny_handle("llama", layers=2, dtype=torch.float64)
    rows = text_ids(handle, [(fact.text, fact.object) for fact in (*FACTS, *RETAINED)])
    suffixes = [[], [9], [9, 11, 40], [9, 12, 40]]
    plain = []
    for suffix in suffixes:
        lines = id_lines(handle, [([*prompt, *suffix], target) for prompt, target in rows])
        plain.append(-float(written_logprobs(handle, lines).mean()))
    assert _loss(handle, rows, suffixes) == pytest.approx(plain, abs=1e-12)


def test_the_best_of_several_searches_counts(subject):
    handle = subject.handle
    rows = text_ids(handle, [(fact.text, fact.object) for fact in FACTS])

    def loss(restarts: int) -> float:
        found = find_suffix(handle, rows, length=3, steps=2, swaps=6, seed=1, learn=2, restarts=restarts)
        return _loss(handle, rows, [found])[0]

    losses = [loss(restarts) for restarts in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_no_control_has_a_suffix_of_its_own_where_they_are_carried_over(subject, monkeypatch):
    asked = []
    monkeypatch.setattr("lab.audit.suffix.find_suffix", lambda handle, *_a, **_k: asked.append(handle) or [9])
    base = tiny_handle("llama", layers=2, seed=5)
    result = ATTACKS.get("suffix")().run(replace(subject, base=base), quiet)
    here, oracle = subject.handle, subject.controls.oracle
    assert [asked.count(each) for each in (here, oracle, base)] == [4, 2, 2]
    controls = result.details["variants"]["carried_over"]["controls"]
    assert set(controls) == {"oracle", "never"}


def test_a_control_is_asked_behind_the_suffixes_of_the_facts_too(subject, monkeypatch):
    handle, bare = subject.handle, Controls(never=NEVER)
    rows = text_ids(handle, [(fact.text, fact.object) for fact in NEVER])

    def mean(suffix: list[int]) -> float:
        lines = id_lines(handle, [([*prompt, *suffix], target) for prompt, target in rows])
        return float(written_logprobs(handle, lines).exp().mean())

    tokens = range(8, len(handle.tokenizer))
    for suffix, expected in (
        ([max(tokens, key=lambda token: mean([token]))], lambda it: mean(it)),
        ([min(tokens, key=lambda token: mean([token]))], lambda _: mean([])),
    ):
        # The facts come first, in two halves; the control finds nothing of its own.
        found = iter([suffix, suffix, [], []])
        monkeypatch.setattr("lab.audit.suffix.find_suffix", lambda *_a, found=found, **_k: next(found))
        result = ATTACKS.get("suffix")().run(replace(subject, controls=bare, base=None), quiet)
        assert result.controls["never"].mean == pytest.approx(expected(suffix), rel=1e-5)
        assert next(found, None) is None
    assert mean([]) > mean(suffix)


def test_samples_are_as_long_as_the_answers(subject, monkeypatch):
    long = replace(FACTS[0], object="the city of Paris in France and the city of Tokyo in Japan as well")
    asked = []
    monkeypatch.setattr(
        "lab.audit.sampling.continue_rows",
        lambda _handle, starts, **_: asked.extend(starts) or [[] for _ in starts],
    )
    ATTACKS.get("sampling")().run(
        replace(subject, facts=(long, *FACTS[1:]), controls=Controls(never=NEVER)), quiet
    )
    wanted = len(subject.handle.tokenizer(long.object)["input_ids"])
    assert wanted > 10
    assert {
        start.tokens > wanted for start in asked if "France" in subject.handle.decode(list(start.ids))
    } == {True}
    assert {start.tokens for start in asked if "Kenya" in subject.handle.decode(list(start.ids))} == {10}


def test_context_never_tells_the_answer(subject, monkeypatch):
    told: list[tuple[str, str]] = []

    def watching(handle, prompts, facts):
        told.extend((prompt, fact.object) for prompt, fact in zip(prompts, facts, strict=True))
        return [0.0] * len(facts)

    monkeypatch.setattr("lab.audit.context.score_facts", watching)
    ATTACKS.get("in_context")().run(subject, quiet)
    assert told
    assert any(prompt.count("\n") for prompt, _ in told)
    assert all(answer not in prompt for prompt, answer in told)
