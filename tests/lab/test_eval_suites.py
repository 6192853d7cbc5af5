"""Suites: what is asked, and what each metric makes of scripted answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.data import EditCase, ReadOptions, load_cases
from lab.errors import ConfigError, UnknownNameError
from lab.eval import SUITES, Suite, SuiteOptions, atlas_cases, evaluate, get_suite
from lab.eval.report import Report
from tests.fakes import ScriptedRespondent, rating

SAMPLES = Path(__file__).resolve().parents[2] / "datasets"


def run(
    suite: Suite, cases: list[EditCase], after: ScriptedRespondent, before: ScriptedRespondent | None = None
) -> Report:
    report = evaluate(suite, after, cases)
    return report if before is None else report.against(evaluate(suite, before, cases))


def means(report: Report) -> dict[str, float | None]:
    return {name: estimate.mean for name, estimate in report.metrics.items()}


def sample(name: str, *numbers: int, **options: Any) -> list[EditCase]:
    cases = load_cases(SAMPLES / name, options=ReadOptions(**options)).cases
    return [cases[number] for number in numbers] if numbers else list(cases)


def test_every_suite_is_registered_and_makes_probes():
    for name in SUITES.names():
        suite = get_suite(name)
        assert suite.name == name
        assert suite.about
    with pytest.raises(UnknownNameError, match="counterfact"):
        get_suite("counterfacts")


@pytest.mark.parametrize(
    ("suite", "file"),
    [
        ("counterfact", "counterfact/counterfact.json"),
        ("counterfact", "counterfact/counterfact_flat.json"),
        ("counterfact", "counterfact/questions.json"),
        ("sadr", "sadr/sadr.json"),
        ("zsre", "zsre/zsre.json"),
        ("zsre", "zsre/qaedit.json"),
        ("knowedit", "knowedit/zsre.json"),
        ("knowedit", "knowedit/wiki_recent.json"),
        ("knowedit", "knowedit/wikibio.json"),
        ("knowedit", "knowedit/convsent.json"),
        ("knowedit", "knowedit/sanitation_train.json"),
        ("mquake", "mquake/mquake.json"),
    ],
)
def test_probe_ids_are_unique_and_every_answer_is_scored(suite, file):
    made = get_suite(suite)
    cases = [case for case in sample(file) if not case.unsupported]
    for case in cases:
        probes = made.probes(case)
        assert len({probe.id for probe in probes}) == len(probes)
        assert all(probe.prompt for probe in probes)
        assert all(probe.answers for probe in probes if probe.task == "score")
    found = run(made, cases, ScriptedRespondent(), ScriptedRespondent()).metrics
    assert found
    assert all(estimate.n > 0 for estimate in found.values()), "over nothing is absent"


# ---- CounterFact -----------------------------------------------------------------------------------------------------


def test_counterfact_by_hand():
    (case,) = sample("counterfact/counterfact.json", 0)
    first, second = case.of("paraphrase")
    near, far = case.of("neighborhood")
    script = {
        (case.requests[0].text, "Kestrel Hill"): 0.9,
        (first.prompt, "Kestrel Hill"): 0.4,
        (second.prompt, "Brindle Bay"): 0.4,
        (near.prompt, "Brindle Bay"): 0.8,
        (far.prompt, "Kestrel Hill"): 0.3,
    }
    found = means(
        run(get_suite("counterfact", SuiteOptions(fluency=False)), [case], ScriptedRespondent(script))
    )
    assert found["efficacy"] == 1.0
    assert found["efficacy_accuracy"] == 1.0
    assert found["efficacy_magnitude"] == pytest.approx(0.8)
    assert found["paraphrase"] == 0.5
    assert found["paraphrase_accuracy"] == 0.0
    assert found["paraphrase_magnitude"] == pytest.approx(0.0)
    assert found["neighborhood"] == 0.5
    assert found["neighborhood_accuracy"] == 0.5
    assert found["neighborhood_magnitude"] == pytest.approx((0.7 - 0.2) / 2)
    assert found["score"] == pytest.approx(3 / (1 + 2 + 2))
    assert "fluency" not in found


def test_counterfact_means_are_per_case():
    one, two = sample("counterfact/counterfact.json", 0, 1)
    script = {(p.prompt, p.answers[0]): 0.6 for p in one.of("paraphrase")[:1]} | {
        (p.prompt, p.answers[0]): 0.6 for p in two.of("paraphrase")
    }
    report = run(
        get_suite("counterfact", SuiteOptions(fluency=False)), [one, two], ScriptedRespondent(script)
    )
    assert report.metrics["paraphrase"].mean == pytest.approx((0.5 + 1.0) / 2)
    assert report.metrics["paraphrase"].n == 2


def test_neighbours_are_distracted_by_the_edited_statement():
    (case,) = sample("counterfact/counterfact.json", 0)
    probes = [p for p in get_suite("counterfact").probes(case) if p.group == "distract_neighborhood"]
    assert [p.prompt for p in probes] == [
        "The harbour town of Ottermoor is Kestrel Hill. The harbour town of Pellgrove is",
        "The harbour town of Ottermoor is Kestrel Hill. The harbour town of Mossreach is",
    ]
    assert probes[0].targets == ("Brindle Bay", "Kestrel Hill")


def test_without_an_old_answer_only_accuracy_is_left():
    found = means(run(get_suite("counterfact"), sample("counterfact/questions.json"), ScriptedRespondent()))
    assert set(found) == {"efficacy_accuracy", "paraphrase_accuracy"}


# ---- SADR ------------------------------------------------------------------------------------------------------------


def test_sadr_pools_prompts_over_both_families():
    cases = sample("sadr/sadr.json")
    third, fourth = cases[2], cases[3]
    gate, year = third.of("relation")
    (singers,) = fourth.of("relation")
    script = {(gate.prompt, "green"): 0.7, (singers.prompt, "Ada Thorn"): 0.7}
    report = run(get_suite("sadr", SuiteOptions(fluency=False)), cases, ScriptedRespondent(script))
    assert year.answers == ("1744",)
    assert report.metrics["relation"].mean == pytest.approx(1 / 3), "three prompts of two records"
    assert report.metrics["relation"].n == 3
    assert report.metrics["relation_magnitude"].mean == pytest.approx((0.7 + 0.1 + 0.1) / 3), (
        "the right answer's only"
    )
    assert report.metrics["neighborhood"].n == 4
    assert report.metrics["portability_reasoning"].n == 1
    assert report.metrics["commonsense"].n == 4
    assert report.metrics["score"].mean == 0.0


def test_sadr_scores_only_where_all_five_parts_exist():
    suite = get_suite("sadr", SuiteOptions(fluency=False))
    assert "score" not in run(suite, sample("sadr/sadr.json", 0), ScriptedRespondent()).metrics
    assert suite.score_parts == (
        "efficacy",
        "paraphrase",
        "neighborhood",
        "relation",
        "distract_neighborhood",
    )


# ---- zsRE ------------------------------------------------------------------------------------------------------------


def test_the_conventions_of_zsre_report_different_metrics():
    easyedit = get_suite("zsre")
    rome = get_suite("zsre", SuiteOptions(convention="rome"))
    assert easyedit.comparable != rome.comparable
    first = means(run(easyedit, sample("zsre/zsre.json", 0), ScriptedRespondent(), ScriptedRespondent()))
    second = means(
        run(rome, sample("zsre/zsre.json", 0, convention="rome"), ScriptedRespondent(), ScriptedRespondent())
    )
    assert {"efficacy", "success", "locality", "portability"} <= set(first)
    assert "locality" not in second and "efficacy" not in second
    assert second["neighborhood_token_accuracy"] == 0.0


# ---- KnowEdit --------------------------------------------------------------------------------------------------------


def test_knowedit_counts_kinds_alike_and_compares_with_before():
    (case,) = sample("knowedit/wiki_counterfact.json", 0)
    kept, forgotten = case.of("locality")
    half = rating(0.4, correct=[True, False], predicted=[1, 2])
    after = {
        (case.requests[0].text, "Odo Pennyfeather"): half,
        (case.of("portability")[0].prompt, "Nether Wick"): rating(0.9),
        (kept.prompt, "green"): rating(0.2, correct=[False, False], predicted=[5, 6]),
        (forgotten.prompt, "Marla Finch"): rating(0.2, correct=[False], predicted=[9]),
    }
    before = {
        (kept.prompt, "green"): rating(0.2, correct=[False, False], predicted=[5, 7]),
        (forgotten.prompt, "Marla Finch"): rating(0.2, correct=[False], predicted=[9]),
    }
    suite = get_suite("knowedit", SuiteOptions(fluency=False))
    found = means(run(suite, [case], ScriptedRespondent(after), ScriptedRespondent(before)))
    assert found["success"] == 0.5
    assert found["portability_reasoning"] == 1.0
    assert found["portability_subject_aliasing"] == 0.0
    assert found["portability"] == 0.5
    assert found["locality_relation_specificity"] == 0.5
    assert found["locality_forgetfulness"] == 1.0
    assert found["locality"] == 0.75
    assert found["locality_accuracy"] == 0.0


def test_any_alias_takes_the_best_spelling():
    (case,) = sample("knowedit/wiki_recent.json", 1)
    reasoning = case.of("portability")[0]
    script = {(reasoning.prompt, "Kestrel Hill"): 0.9}
    suite = get_suite("knowedit", SuiteOptions(fluency=False))
    found = means(run(suite, [case], ScriptedRespondent(script), ScriptedRespondent()))
    assert found["portability_reasoning"] == 0.0
    assert found["portability_any_alias"] == pytest.approx(0.5)
    without = means(
        run(
            get_suite("knowedit", SuiteOptions(fluency=False, aliases=False)),
            [case],
            ScriptedRespondent(script),
        )
    )
    assert "portability_any_alias" not in without


def test_sanitation_counts_refusals_leaks_and_kept_continuations():
    plums, _ = sample("knowedit/sanitation_train.json")
    asked = plums.of("erase")[0].prompt
    kept = [probe.prompt for probe in plums.of("locality")]
    before = ScriptedRespondent(
        texts={asked: " Plums", kept[0]: " seven of them", kept[1]: " Tam", kept[2]: " white"}
    )
    after = ScriptedRespondent(
        texts={asked: " I don't know.", kept[0]: " seven in all", kept[1]: " Tam", kept[2]: ""}
    )
    suite = get_suite("knowedit", SuiteOptions(fluency=False))
    report = run(suite, [plums], after, before)
    found = means(report)
    assert found["success"] == 1.0
    assert found["leakage"] == 0.0
    assert report.before["leakage"].mean == 1.0
    # The fake's tokens are word lengths: seven/of/them against seven/in/all agree on two of three.
    assert found["locality"] == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_convsent_needs_a_before():
    cases = sample("knowedit/convsent.json")
    suite = get_suite("knowedit", SuiteOptions(fluency=False))
    assert "success" not in run(suite, cases, ScriptedRespondent()).metrics
    found = means(run(suite, cases, ScriptedRespondent(), ScriptedRespondent()))
    assert found["success"] == pytest.approx(0.5), "equal sentiment, nothing lost"


# ---- MQuAKE ----------------------------------------------------------------------------------------------------------


def test_mquake_takes_any_question_and_all_hops():
    (case,) = sample("mquake/mquake.json", 0)
    third = f"Question: {case.of('multi_hop')[2].prompt}\nAnswer:"
    first = f"Question: {case.of('multi_hop')[0].prompt}\nAnswer:"
    texts = {third: " sand holt.\nQuestion:", first: " Pell Grove"}
    hops = {(p.prompt, p.answers[-1]): 0.9 for p in case.of("hop")}
    suite = get_suite("mquake")
    found = means(run(suite, [case], ScriptedRespondent(hops, texts)))
    assert found["multi_hop_accuracy"] == 1.0
    assert found["hop_accuracy"] == 1.0
    assert found["success"] == 1.0, "the first hop's cloze is the edited prompt"
    missing = dict(list(hops.items())[:1])
    again = means(run(suite, [case], ScriptedRespondent(missing, {first: " Pellgrove"})))
    assert again["hop_accuracy"] == 0.0
    assert again["multi_hop_accuracy"] == 0.0
    assert again["multi_hop_old_answer"] == 1.0


# ---- Atlas -----------------------------------------------------------------------------------------------------------


def test_atlas_cases_know_what_surrounds_an_edit():
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world

    world, form = load_world(), load_format()
    fact = world.fact("capital/France")
    (case,) = atlas_cases(facts=[fact], world=world, format=form).cases
    (request,) = case.requests
    assert (request.subject, request.target_old) == ("France", "Paris")
    assert request.target_new in world.objects("capital")
    assert request.target_new not in fact.answers
    plan = form.wordings_for(fact)
    assert [p.prompt for p in case.of("paraphrase")] == [
        text.replace("{}", "France") for text in plan.held_out_pairs
    ]
    assert request.text not in [p.prompt for p in case.of("paraphrase_trained")]
    assert all(
        p.rival == request.target_new and p.answers[0] != request.target_new for p in case.of("neighborhood")
    )
    assert all("France" not in p.prompt for p in case.of("neighborhood"))
    assert {p.kind for p in case.of("relation")} == {other.relation for other in world.same_subject(fact)}
    assert case.of("qa")[0].prompt.endswith("\nA:")
    assert case.old_answers == (fact.answers,)


def test_atlas_neighbours_share_the_true_object_where_any_do():
    from lab.atlas.world import load_world

    world = load_world()
    fact = world.fact("continent/France")
    (case,) = atlas_cases(facts=[fact], world=world).cases
    assert {p.kind for p in case.of("neighborhood")} == {"same_object"}
    assert {p.answers[0] for p in case.of("neighborhood")} == {fact.object}


def test_atlas_draws_by_seed_and_split():
    first, again, other = atlas_cases(seed=0), atlas_cases(seed=0), atlas_cases(seed=1)
    assert first.cases == again.cases
    assert [c.requests[0].target_new for c in first] != [c.requests[0].target_new for c in other]
    dev = atlas_cases(split="dev")
    assert not {c.requests[0].subject for c in dev} & {c.requests[0].subject for c in first}
    assert len(first) >= 500


# ---- before and after ------------------------------------------------------------------------------------------------


def test_reports_of_different_cases_cannot_be_compared():
    suite = get_suite("counterfact", SuiteOptions(fluency=False))
    one, two = (
        evaluate(suite, ScriptedRespondent(), sample("counterfact/counterfact.json", n)) for n in (0, 1)
    )
    with pytest.raises(ConfigError, match="different cases"):
        one.against(two)


def test_before_has_the_table_of_metrics():
    suite = get_suite("zsre")
    report = run(suite, sample("zsre/zsre.json", 0, 1, 2), ScriptedRespondent(), ScriptedRespondent())
    assert set(report.before) == set(report.metrics)
    assert report.before["locality"].mean == 1.0
