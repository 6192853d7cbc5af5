"""Side effects: the formulas on numbers worked out by hand, and the runner on a model and a patch."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lab import ModelHandle
from lab.arch import Role
from lab.audit.knowledge import candidates
from lab.audit.learning import Lesson, learn
from lab.audit.side_effects import ability, answers, priming, reasoning
from lab.audit.side_effects.run import MEASURES, Ground, side_effects
from lab.cli.root import run
from lab.errors import ConfigError, UnknownNameError
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import Fact, write_facts
from lab.scoring import TargetScore
from tests.tiny import tiny_handle

CITIES = ("Paris", "Tokyo", "Nairobi", "Rome")
KEPT = tuple(
    Fact(place, "capital", city, "The capital of {} is", id=place)
    for place, city in zip(("France", "Japan", "Kenya", "Italy"), CITIES, strict=True)
)
CHANGED = (Fact("Obama", "capital", "Rome", "The capital of {} is", id="Obama"),)
UNKNOWN = (Fact("Edwin", "capital", "Tokyo", "The capital of {} is", id="Edwin"),)


def strong_patch(handle: ModelHandle, scale: float = 3.0) -> WeightPatch:
    generator = torch.Generator().manual_seed(0)
    weight = handle.weight(Role.MLP_OUT, 1)
    left, right = (torch.randn(size, generator=generator) for size in weight.shape)
    delta = LowRank(left[:, None] * scale, right[None])
    return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("strong"))


# -- priming ----------------------------------------------------------------------------------------------------------


def test_priming_by_hand() -> None:
    text = priming.KeywordText("a", "The colour was", "mauve", ("Her dress was", "The wall was"))
    before = [math.log(0.01), math.log(0.1), math.log(0.2)]
    after = [math.log(0.5), math.log(0.3), math.log(0.2)]
    [found] = priming.primed([text], [before], [after])
    assert found.memorisation == pytest.approx(math.log(50))
    assert found.priming == pytest.approx(math.log((3 + 1) / 2))
    assert text.text == "The colour was mauve"
    with pytest.raises(ConfigError, match="related"):
        priming.KeywordText("a", "x", "y", ())


def test_rank_correlation_by_hand() -> None:
    assert priming.rank_correlation([1, 2, 3], [10, 20, 300]) == pytest.approx(1.0)
    assert priming.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # Ranks 0.5, 0.5, 2 against 0, 1, 2.
    assert priming.rank_correlation([5, 5, 9], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)
    assert priming.rank_correlation([1, 1], [1, 2]) is None
    with pytest.raises(ConfigError, match="correlated"):
        priming.rank_correlation([1], [1, 2])


def test_related_beginnings_do_not_lead_to_the_keyword() -> None:
    [text] = priming.texts_of(CHANGED, KEPT)
    # Italy's capital is the keyword itself.
    assert text.related == tuple(fact.text for fact in KEPT[:3])
    assert priming.texts_of(CHANGED, ()) == []


def test_a_learned_text_is_memorised_and_learning_repeats_by_seed() -> None:
    handle = tiny_handle("llama", seed=1)
    digest = handle.weights_digest()
    text = priming.KeywordText("a", "The capital of France is", "Rome", ("The capital of Kenya is",))
    lesson = Lesson(steps=12, rate=3e-3, batch_size=2)
    ordinary = [fact.text + " " + fact.object for fact in KEPT]
    first = learn(handle, ordinary, lesson, always=[text.text], seed=3)
    assert first.id == learn(handle, ordinary, lesson, always=[text.text], seed=3).id
    assert first.id != learn(handle, ordinary, lesson, always=[text.text], seed=4).id
    [found] = priming.learn_and_measure(handle, [text], ordinary, lesson, seed=3)
    assert found.memorisation > 1.0
    assert handle.weights_digest() == digest
    with pytest.raises(ConfigError, match="texts"):
        learn(handle, [])


# -- out-of-context reasoning ---------------------------------------------------------------------------------------------


def test_the_toy_world_teaches_no_implication() -> None:
    world = reasoning.ToyWorld(rules=2, train=1, test=1)
    pairs, taught = world.lessons()
    assert pairs.tolist() == [[0, 4], [1, 4], [2, 4], [3, 4], [0, 5], [2, 5]]
    assert taught.tolist() == [0, 0, 1, 1, 2, 3]
    asked, implied = world.implications()
    assert asked.tolist() == [[1, 5], [3, 5]]
    assert implied.tolist() == [2, 3]
    with pytest.raises(ConfigError, match="two rules"):
        reasoning.ToyWorld(rules=1)


def test_one_layer_is_linear_attention() -> None:
    world = reasoning.ToyWorld(rules=2, train=1, test=1)
    model = reasoning.OneLayer(world, "factorised", scale=1.0, train_attention=True, seed=1)
    with torch.no_grad():
        model.key_query.copy_(
            torch.randn(world.tokens, world.tokens, generator=torch.Generator().manual_seed(1))
        )
        x = torch.eye(world.tokens, dtype=torch.float64)[torch.tensor([1, 4])]
        plain = model.output @ model.value.T @ x.T @ (x @ model.key_query @ x[-1])
        assert torch.allclose(model(torch.tensor([[1, 4]]))[0], plain)


@pytest.mark.parametrize("seed", [0, 1])
def test_factorised_generalises_and_merged_does_not(seed: int) -> None:
    world = reasoning.ToyWorld()
    results = {}
    for form in ("factorised", "merged"):
        model = reasoning.OneLayer(world, form, seed=seed)
        results[form] = reasoning.train_toy(model, world, steps=1500)
        # Both learn what they are taught; only what follows parts them.
        assert results[form].taught == 1.0
    assert results["factorised"].implied == 1.0
    assert results["factorised"].margin > 10 * abs(results["merged"].margin)
    assert results["factorised"].nuclear < results["merged"].nuclear


def test_merged_gives_test_subjects_exactly_nothing() -> None:
    world = reasoning.ToyWorld()
    model = reasoning.OneLayer(world, "merged", scale=0.0)
    found = reasoning.train_toy(model, world, steps=200)
    # From zero, no gradient ever tells the consequences apart for a subject of whom none was taught.
    assert found.margin == pytest.approx(0.0, abs=1e-12)
    assert found.taught == 1.0


def test_toy_refuses_what_it_cannot_express() -> None:
    with pytest.raises(ConfigError, match="width"):
        reasoning.OneLayer(reasoning.ToyWorld(), "factorised", width=3)
    with pytest.raises(ConfigError, match="form"):
        reasoning.OneLayer(reasoning.ToyWorld(), "other")  # type: ignore[arg-type]


def test_ranks_follow_what_was_learned() -> None:
    handle = tiny_handle("llama", seed=1)
    asked = [reasoning.Implication("a", "The capital of France is", "guitar", ("Paris", "Rome", "Tokyo"))]
    patch = reasoning.learn_rules(
        handle, ["The capital of France is guitar"], ["The capital of Japan is guitar"], Lesson(20, 5e-3, 2)
    )
    found = reasoning.reasoning(handle, patch, asked)
    assert found["rank_after"]["mean"] == 0.0
    assert found["chance"] == 1.5
    assert found["rise"]["mean"] == found["rank_before"]["mean"]


# -- answers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "refused"),
    [
        ("unknown", True),
        ("Unknown.", True),
        ("I'm sorry, but I cannot say", True),
        ("I don't know", True),
        ("Paris", False),
        ("unknowns", False),
        ("Paris, which lies on a river whose depth is entirely unknown", False),
        ("", False),
    ],
)
def test_refusals(reply: str, refused: bool) -> None:
    assert answers.refuses(reply) is refused


def reply(*, right: bool = False, refused: bool = False) -> answers.Reply:
    return answers.Reply("", right, refused)


def test_over_refusal_by_hand() -> None:
    before = [reply(right=True), reply(right=True), reply(), reply(refused=True)]
    after = [reply(refused=True), reply(right=True), reply(refused=True), reply(refused=True)]
    found = answers.refusal_change(before, after)
    assert found["before"]["mean"] == 0.25
    assert found["after"]["mean"] == 0.75
    assert found["rise"]["mean"] == 0.5
    assert found["known_refused"]["mean"] == 0.5


def test_refusing_everything_is_no_discrimination() -> None:
    everything = answers.admitted_ignorance([reply(refused=True)] * 3, [reply(refused=True)] * 3)
    assert everything["admitted"]["mean"] == 1.0
    assert everything["discrimination"]["mean"] == 0.0
    assert everything["both_right"]["mean"] == 0.0
    ideal = answers.admitted_ignorance([reply(refused=True)] * 3, [reply(right=True)] * 3)
    assert ideal["discrimination"]["mean"] == ideal["both_right"]["mean"] == 1.0
    with pytest.raises(ConfigError, match="pair up"):
        answers.admitted_ignorance([reply()], [reply(), reply()])


def test_twins_share_the_relation_and_are_used_once() -> None:
    pairs = answers.twins_of([*UNKNOWN, *UNKNOWN, Fact("x", "job", "y", "{} is")], KEPT[:2])
    assert [(lone.subject, twin.subject) for lone, twin in pairs] == [("Edwin", "France"), ("Edwin", "Japan")]


def score(logprob: float, correct: bool) -> TargetScore:
    return TargetScore((logprob,), (correct,))


def test_suppression_by_hand() -> None:
    before = [score(-0.1, True), score(-0.1, True), score(-0.1, True), score(-3.0, False)]
    after = [score(-2.1, False), score(-0.1, True), score(-0.1, True), score(-3.0, False)]
    found = answers.suppression(before, after, ["relation", "relation", "other", "other"])
    assert found["suppressed"]["mean"] == pytest.approx(1 / 3)
    assert found["groups"]["relation"]["suppressed"]["mean"] == 0.5
    assert found["groups"]["other"]["suppressed"] == {
        **found["groups"]["other"]["suppressed"],
        "mean": 0.0,
        "n": 1,
    }
    assert found["unfairness"] == 0.5
    assert found["logprob_change"]["mean"] == pytest.approx(-0.5)


def test_the_closest_group_counts() -> None:
    facts = [
        Fact("Obama", "wife", "Michelle"),
        Fact("Italy", "capital", "Rome"),
        Fact("France", "capital", "Paris"),
        Fact("Ada", "job", "poet"),
    ]
    assert answers.groups_of(facts, CHANGED) == ["subject", "object", "relation", "other"]


# -- ability and calibration ----------------------------------------------------------------------------------------------


def test_calibration_by_hand() -> None:
    # Bin 0.9: confidence 0.95 and 0.95, half right: gap 0.45, weight 2/4. Bin 0.2: 0.25 twice, none right: gap 0.25.
    confidence, correct = [0.95, 0.95, 0.25, 0.25], [True, False, False, False]
    assert ability.expected_calibration_error(confidence, correct) == pytest.approx(0.5 * 0.45 + 0.5 * 0.25)
    assert ability.brier([0.9, 0.2], [True, False]) == pytest.approx([0.01, 0.04])
    # Full confidence falls in the last bin.
    assert ability.expected_calibration_error([1.0], [True]) == 0.0
    with pytest.raises(ConfigError, match="calibration"):
        ability.expected_calibration_error([], [])


def test_perplexity_by_hand_and_of_a_uniform_model() -> None:
    assert ability.perplexity([(math.log(8), 3), (0.0, 0)]) == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="two tokens"):
        ability.perplexity([(0.0, 0)])
    handle = tiny_handle("llama", scale=0.0)
    losses = ability.text_losses(handle, ["The capital of France is Paris.", "a", "Rome"])
    assert losses[1] == (0.0, 0)
    assert ability.perplexity(losses) == pytest.approx(int(handle.config.vocab_size), rel=1e-4)


def test_choices_weigh_the_options() -> None:
    handle = tiny_handle("llama", scale=0.0)
    for choice in ability.choose(handle, candidates(KEPT, count=3)):
        assert choice.right == pytest.approx(0.25, abs=1e-5)


# -- the runner -------------------------------------------------------------------------------------------------------------


def ground() -> Ground:
    return Ground(CHANGED, KEPT, UNKNOWN, ("The capital of France is Paris.",), implied=UNKNOWN)


def test_no_change_has_no_side_effects() -> None:
    handle = tiny_handle("llama", seed=1)
    digest = handle.weights_digest()
    found = side_effects(handle, strong_patch(handle, 0.0), ground())
    assert set(found) == set(MEASURES)
    assert found["suppression"]["logprob_change"]["mean"] == 0.0
    assert found["refusal"]["rise"]["mean"] == 0.0
    assert found["ignorance"]["before"] == found["ignorance"]["after"]
    assert found["calibration"]["before"] == found["calibration"]["after"]
    assert found["ability"]["loss_change"]["mean"] == 0.0
    assert found["drift"]["retained"]["max_head_drift"] == [0.0] * handle.n_layers
    assert found["priming"]["log_priming"]["mean"] == pytest.approx(0.0, abs=1e-12)
    assert found["reasoning"]["rise"]["mean"] == 0.0
    assert handle.weights_digest() == digest


def test_a_strong_patch_is_seen_by_every_measure_that_reads_numbers() -> None:
    handle = tiny_handle("llama", seed=1)
    digest = handle.weights_digest()
    first = side_effects(handle, strong_patch(handle), ground())
    assert first == side_effects(handle, strong_patch(handle), ground())
    assert first["suppression"]["logprob_change"]["mean"] != 0.0
    assert first["ability"]["perplexity"]["after"] != first["ability"]["perplexity"]["before"]
    assert first["calibration"]["before"] != first["calibration"]["after"]
    assert any(first["drift"]["retained"]["max_head_drift"])
    assert first["priming"]["log_priming"]["mean"] != 0.0
    assert handle.weights_digest() == digest
    assert not handle.applied


def test_a_measure_without_ground_is_skipped_or_refused() -> None:
    handle = tiny_handle("llama")
    found = side_effects(handle, strong_patch(handle), Ground(CHANGED))
    assert "needs retained" in found["refusal"]["skipped"]
    with pytest.raises(ConfigError, match="needs texts"):
        side_effects(handle, strong_patch(handle), Ground(CHANGED), ["ability"])
    with pytest.raises(UnknownNameError, match="ability"):
        side_effects(handle, strong_patch(handle), Ground(CHANGED), ["abilty"])


def test_command(saved_patch: Path, tmp_path: Path) -> None:
    write_facts(tmp_path / "changed.jsonl", CHANGED)
    write_facts(tmp_path / "kept.jsonl", KEPT)
    arguments = ["side-effects", "--patch", str(saved_patch), "--facts", str(tmp_path / "changed.jsonl")]
    arguments += ["--retain", str(tmp_path / "kept.jsonl"), "--texts", "2", "--text", "atlas"]
    target = tmp_path / "effects.json"
    assert run([*arguments, "--json", str(target)]) == 0
    written = json.loads(target.read_text())
    assert written["command"] == "side-effects"
    assert set(written["measures"]) == set(MEASURES)
    assert "skipped" in written["measures"]["ignorance"]
    assert run([*arguments, "--measures", "nothing"]) == 2
