"""Tuning: what is proposed, what is kept, that the written preset is what was found, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

import editors.tune as tuning
from editors.base import get_editor
from editors.presets import find_preset
from editors.tune import propose_places, tune, tuning_cases
from editors.tune_records import Trial, TuneOptions
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.errors import ConfigError, DataError, OutputExistsError, UnknownNameError
from lab.eval import SuiteOptions, evaluate_editing, get_suite
from lab.eval.atlas import atlas_cases
from lab.handle import ModelHandle
from lab.records import EditRequest
from tests.commands import call, result
from tests.standin import CAPITALS
from tests.tiny import tiny_handle

PROMPT = "The capital of {} is"
QUICK = {"steps": 4}
GRIDS: dict[str, Any] = {"clamp": [0.5, 8.0], "weight_decay": []}


def capital_case(country: str, target: str) -> EditCase:
    """One edit of what the stand-in knows."""
    true = CAPITALS[country]
    others = [name for name in CAPITALS if name != country][:2]
    probes = [
        CaseProbe("rewrite", PROMPT.format(country), (target,), true),
        CaseProbe("paraphrase", f"{country} has its capital in", (target,), true),
        *(CaseProbe("neighborhood", PROMPT.format(name), (CAPITALS[name],), target) for name in others),
    ]
    request = EditRequest(f"capital/{country}", PROMPT, country, target, true)
    return EditCase(request.id, "counterfact", (request,), tuple(probes), ((true,),), "own.json", 1)


CASES = CaseSet(
    "counterfact",
    "counterfact",
    "own.json",
    (capital_case("France", "Rome"), capital_case("Kenya", "Lima"), capital_case("Peru", "Tokyo")),
)


def counterfact():
    return get_suite("counterfact", SuiteOptions(fluency=False))


@pytest.fixture
def handle(standin):
    return ModelHandle.load("atlas")


def options(**changes: Any) -> TuneOptions:
    return TuneOptions(**{"limit": 2, "samples": 2, "settings": QUICK, "grids": GRIDS, **changes})


def tuned(handle, folder, spec="rome_identity", **changes: Any):
    return tune(handle, spec, counterfact(), CASES, folder, options(**changes))


class TestPlaces:
    def test_the_presets_own_come_first_then_the_strongest(self):
        assert propose_places([0.1, 0.3, 0.2, 0.0, 0.9], (2,), 2) == [(2,), (1,), (0,)]
        assert propose_places([0.1, 0.3, 0.2, 0.0, 0.9], (0,), 2) == [(0,), (1,), (2,)]

    def test_windows_are_as_wide_as_the_presets_and_leave_the_last_block_out(self):
        assert propose_places([0.0, 0.4, 0.5, 0.2, 9.0], (0, 1), 2) == [(0, 1), (1, 2), (2, 3)]
        assert propose_places([0.3, 0.7], (0, 1), 5) == [(0, 1), (0,)]
        assert propose_places([0.3], (0,), 5) == [(0,)]


def test_more_edited_facts_count_before_the_score_and_the_margin_decides_between_equals():
    def trial(n: int, score: float | None, margin: float) -> Trial:
        return Trial({"layers": [0]}, n, score, {}, margin, (), 0.0)

    ordered = [
        trial(0, None, 0.0),
        trial(1, 1.0, 0.9),
        trial(2, 0.0, 0.9),
        trial(2, 1.0, 0.1),
        trial(2, 1.0, 0.2),
    ]
    shuffled = [ordered[place] for place in (3, 0, 4, 2, 1)]
    assert sorted(shuffled, key=lambda each: each.rank) == ordered


class TestTune:
    def test_the_preset_that_was_written_is_what_was_found(self, handle, tmp_path):
        before = handle.weights_digest()
        found = tuned(handle, tmp_path / "out", grids={**GRIDS, "weight_decay": [0.25]})
        assert handle.weights_digest() == before
        assert len(found.facts) == 2
        best = max(found.trials, key=lambda trial: trial.rank)
        assert found.best == best
        assert best.score is not None
        assert best.n == 2
        report = evaluate_editing(
            counterfact(),
            handle,
            get_editor("rome_identity", **QUICK, **best.settings),
            CaseSet("counterfact", "counterfact", "own.json", tuple(c for c in CASES if c.id in found.facts)),
        )
        assert report.metrics["score"].mean == pytest.approx(best.score)
        magnitudes = [report.metrics[f"{part}_magnitude"].mean for part in counterfact().score_parts]
        assert best.margin == pytest.approx(sum(size or 0.0 for size in magnitudes) / 3, rel=1e-4)

        file = str(tmp_path / "out" / "preset.toml")
        preset = find_preset(handle, "rome", file)
        assert preset.chosen == "file"
        assert list(preset.values["layers"]) == list(best.settings["layers"])
        assert preset.values["clamp"] == best.settings["clamp"]
        assert preset.values["steps"] == QUICK["steps"]
        assert preset.values["lr"] == found.base.values["lr"]
        assert preset.penalty == found.base.penalty

        request = CASES.cases[0].requests[0]
        plain = get_editor("rome_identity", **QUICK, **best.settings).edit(handle, [request])
        read = get_editor("rome_identity", preset=file).edit(handle, [request])
        assert read.provenance.config == plain.provenance.config
        assert (tmp_path / "out" / "tune.png").read_bytes().startswith(b"\x89PNG")
        kept = json.loads((tmp_path / "out" / "tune.json").read_text())
        assert [row["score"] for row in kept["candidates"]] == [trial.score for trial in found.trials]
        assert len(kept["trace"]["effects"]["subject_last"]) == handle.n_layers

    def test_every_place_meets_every_clamp_and_further_settings_vary_the_best(self, handle, tmp_path):
        found = tuned(handle, tmp_path / "out", grids={**GRIDS, "weight_decay": [0.25]})
        first, later = found.trials[:-1], found.trials[-1]
        places = {tuple(trial.settings["layers"]) for trial in first}
        assert places == {(0,), (1,)}
        assert [trial.settings["clamp"] for trial in first] == [0.5, 8.0] * 2
        strongest = max(first, key=lambda trial: trial.rank)
        assert later.settings == {**strongest.settings, "weight_decay": 0.25}

    def test_it_goes_on_without_repeating_anything(self, handle, tmp_path, monkeypatch):
        calls = {"trace": 0, "evaluate": 0}
        trace, evaluate = tuning.causal_trace, tuning.evaluate_editing

        def traced(*words: Any, **named: Any):
            calls["trace"] += 1
            return trace(*words, **named)

        def evaluated(*words: Any, **named: Any):
            calls["evaluate"] += 1
            if calls["evaluate"] == 3:
                raise KeyboardInterrupt
            return evaluate(*words, **named)

        monkeypatch.setattr(tuning, "causal_trace", traced)
        monkeypatch.setattr(tuning, "evaluate_editing", evaluated)
        with pytest.raises(KeyboardInterrupt):
            tuned(handle, tmp_path / "out")
        assert calls == {"trace": 2, "evaluate": 3}
        assert not (tmp_path / "out" / "preset.toml").exists()

        whole = tuned(handle, tmp_path / "out")
        assert calls == {"trace": 2, "evaluate": 5}
        text = (tmp_path / "out" / "preset.toml").read_text()
        again = tuned(handle, tmp_path / "out")
        assert calls == {"trace": 2, "evaluate": 5}
        assert again == whole
        assert (tmp_path / "out" / "preset.toml").read_text() == text
        wider = tuned(handle, tmp_path / "out", grids={**GRIDS, "clamp": [0.5, 8.0, 2.0]})
        assert calls == {"trace": 2, "evaluate": 7}
        assert len(wider.trials) == 6

    def test_the_seed_decides_everything(self, handle, tmp_path):
        one, other = (tuned(handle, tmp_path / name, seed=3) for name in ("one", "other"))
        assert [(t.settings, t.score, t.parts) for t in one.trials] == [
            (t.settings, t.score, t.parts) for t in other.trials
        ]
        assert one.effects == other.effects
        texts = [(tmp_path / name / "preset.toml").read_text() for name in ("one", "other")]
        assert texts[0] == texts[1]

    def test_windows_of_several_layers_and_a_penalty(self, handle, tmp_path):
        found = tuned(
            handle,
            tmp_path / "out",
            spec="memit+sadr",
            settings={"steps": 3, "gamma": 0.5},
            grids={"clamp": [4.0], "weight_decay": [], "mom2_weight": [10.0]},
            limit=1,
        )
        assert [list(trial.settings["layers"]) for trial in found.trials] == [[0, 1], [0, 1]]
        assert found.trials[1].settings["mom2_weight"] == 10.0
        file = str(tmp_path / "out" / "preset.toml")
        preset = find_preset(handle, "memit", file)
        assert (preset.penalty["gamma"], preset.penalty["steps"]) == (0.5, 3)
        request = CASES.cases[0].requests[0]
        plain = get_editor("memit+sadr", steps=3, gamma=0.5, **found.best.settings).edit(handle, [request])
        read = get_editor("memit+sadr", preset=file).edit(handle, [request])
        assert read.provenance.config == plain.provenance.config

    def test_a_candidate_that_cannot_work_does_not_end_the_run(self, handle, tmp_path):
        found = tuned(handle, tmp_path / "out", grids={"clamp": [-1.0, 4.0], "weight_decay": []}, limit=1)
        broken = [trial for trial in found.trials if trial.settings["clamp"] < 0]
        assert [trial.n for trial in broken] == [0, 0]
        assert all("clamp must be positive" in trial.skipped[0] for trial in broken)
        assert found.best.settings["clamp"] == 4.0
        with pytest.raises(ConfigError, match="no candidate could edit a single fact"):
            tuned(handle, tmp_path / "none", grids={"clamp": [-1.0], "weight_decay": []}, limit=1)


class TestFacts:
    def test_test_facts_of_the_built_in_world_are_refused(self, tmp_path):
        suite = get_suite("atlas")
        with pytest.raises(DataError, match="is a test fact"):
            tune(tiny_handle(), "rome_identity", suite, atlas_cases(split="test"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_built_in_worlds_cases_are_dev_facts_and_ask_no_test_fact(self):
        from lab.atlas.world import load_world

        world = load_world()
        cases = tuning_cases("atlas")
        assert {case.file for case in cases.cases} == {"atlas:dev"}
        asked = {probe.prompt for case in cases.cases for probe in case.probes}
        assert not asked & {fact.text for fact in world.split("test")}
        # Without the exclusion some neighbours would be test facts.
        loose = {probe.prompt for case in atlas_cases(split="dev").cases for probe in case.probes}
        assert loose & {fact.text for fact in world.split("test")}
        for group in ("rewrite", "paraphrase", "neighborhood", "relation"):
            assert any(case.of(group) for case in cases.cases)

    def test_an_evaluation_files_subjects_and_prompts_stay_out(self, tmp_path):
        row = {
            "case_id": 1,
            "requested_rewrite": {
                "prompt": PROMPT,
                "target_new": {"str": "Lima"},
                "target_true": {"str": "Nairobi"},
                "subject": "Kenya",
            },
            "paraphrase_prompts": ["Kenya has its capital in"],
            "neighborhood_prompts": ["The capital of France is", "The capital of Japan is"],
            "generation_prompts": [],
        }
        file = tmp_path / "own.json"
        file.write_text(json.dumps([row]))
        (case,) = tuning_cases("counterfact", str(file), exclude=[capital_case("France", "Rome")]).cases
        assert [probe.prompt for probe in case.of("neighborhood")] == ["The capital of Japan is"]
        with pytest.raises(DataError, match="no case is left"):
            tuning_cases("counterfact", str(file), exclude=[capital_case("Kenya", "Rome")])

    def test_a_model_that_knows_nothing_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="knows none of these facts"):
            tuned(tiny_handle(), tmp_path / "out")


class TestRefusals:
    @pytest.mark.parametrize("spec", ["ft_l", "grace", "lora", "ice", "serac"])
    def test_editors_without_a_value_search(self, spec, tmp_path):
        with pytest.raises(ConfigError, match=f"'{spec}' searches no value at a layer.*rome"):
            tuned(tiny_handle(), tmp_path / "out", spec=spec, settings={})

    def test_unknown_names(self, tmp_path):
        with pytest.raises(UnknownNameError, match="rome"):
            tuned(tiny_handle(), tmp_path / "out", spec="romee")
        with pytest.raises(ConfigError, match=r"no setting 'stesp'.*steps"):
            tuned(tiny_handle(), tmp_path / "out", settings={"stesp": 3})
        with pytest.raises(ConfigError, match=r"no setting 'clmap'.*clamp"):
            tuned(tiny_handle(), tmp_path / "out", grids={"clmap": [1.0]})
        with pytest.raises(ConfigError, match="layers are what is tuned"):
            tuned(tiny_handle(), tmp_path / "out", settings={"layers": [1]})
        with pytest.raises(ConfigError, match="list of numbers"):
            tuned(tiny_handle(), tmp_path / "out", grids={"clamp": ["much"]})

    def test_a_suite_without_a_score(self, tmp_path):
        with pytest.raises(ConfigError, match="'atlas_chains' has no score"):
            tune(tiny_handle(), "rome", get_suite("atlas_chains"), CASES, tmp_path / "out")

    def test_folders_of_another_run_or_of_something_else(self, handle, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").write_text("mine")
        with pytest.raises(OutputExistsError, match="no tuning run"):
            tuned(handle, tmp_path / "full")
        few = {"grids": {"clamp": [4.0], "weight_decay": []}, "limit": 1, "places": 1}
        tuned(handle, tmp_path / "out", **few)
        with pytest.raises(ConfigError, match="a tuning run with another seed"):
            tuned(handle, tmp_path / "out", **few, seed=1)


class TestPresetFile:
    ROW = '[[preset]]\nname = "own"\nsource = "mine"\n'

    def test_what_is_wrong_with_it_is_said(self, tmp_path):
        handle, file = tiny_handle(), tmp_path / "own.toml"
        for text, message in (
            ("preset = 3", "must hold one"),
            (self.ROW * 2, "must hold one"),
            ("[[preset]]\nname = 3\n", "needs a text 'name'"),
            ("[[preset]\n", "is no TOML"),
            (self.ROW + "rome = 3\n", "must be a section"),
            (self.ROW + "[preset.rome]\nlayers = 3\n", "must be a list of layer numbers"),
            (self.ROW + "[preset.rome]\nlayers = [7]\n", "has only 3"),
            (self.ROW + "n_layers = 9\n[preset.rome]\nlayers = [1]\n", "n_layers 9.*has 3"),
            (self.ROW + "[preset.memit]\nlayers = [1]\n", "no values for 'rome'"),
        ):
            file.write_text(text)
            with pytest.raises(ConfigError, match=message):
                find_preset(handle, "rome", str(file))
        with pytest.raises(ConfigError, match="cannot be read"):
            find_preset(handle, "rome", str(tmp_path / "absent.toml"))

    def test_a_models_own_config_cannot_name_a_file(self, tmp_path):
        handle, file = tiny_handle(), tmp_path / "own.toml"
        file.write_text(self.ROW + "[preset.rome]\nlayers = [1]\nclamp = 3.0\n")
        assert find_preset(handle, "rome", str(file)).values == {"layers": (1,), "clamp": 3.0}
        handle.config.knowlab_preset = str(file)
        with pytest.raises(UnknownNameError):
            find_preset(handle, "rome")


class TestCommand:
    def test_tune_then_edit(self, capsys, tmp_path, standin):
        rows = []
        for number, (country, target) in enumerate((("France", "Rome"), ("Kenya", "Lima"))):
            case = capital_case(country, target)
            rows.append(
                {
                    "case_id": number,
                    "requested_rewrite": {
                        "prompt": PROMPT,
                        "target_new": {"str": target},
                        "target_true": {"str": CAPITALS[country]},
                        "subject": country,
                    },
                    "paraphrase_prompts": [probe.prompt for probe in case.of("paraphrase")],
                    "neighborhood_prompts": [probe.prompt for probe in case.of("neighborhood")],
                    "generation_prompts": [],
                }
            )
        file = tmp_path / "dev.json"
        file.write_text(json.dumps(rows))
        out = tmp_path / "tuned"
        words = [
            "tune",
            "--editor",
            "rome_identity",
            "--suite",
            "counterfact",
            "--data",
            file,
            "--limit",
            "1",
        ]
        words += ["--places", "1", "--grid", "clamp=[4.0]", "--grid", "weight_decay=[]", "--set", "steps=4"]
        document = result(capsys, tmp_path, *words, "--out", out)
        assert document["command"] == "tune"
        assert document["best"] in document["candidates"]
        assert document["preset"] == str(out / "preset.toml")
        edit = [
            "edit",
            "--prompt",
            PROMPT,
            "--subject",
            "Kenya",
            "--target",
            "Lima",
            "--editor",
            "rome_identity",
        ]
        made = result(capsys, tmp_path, *edit, "--preset", out / "preset.toml")
        assert made["undo"]["bit_identical"] is True

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--editor", "rome"], "give --out"),
            (["--editor", "ike", "--out", "x"], "searches no value"),
            (["--grid", "clamp=4", "--out", "x"], "--grid takes a list"),
        ],
    )
    def test_wrong_words(self, words, message, capsys, standin, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, _, err = call(capsys, "tune", *words)
        assert code == 2
        assert message in err
        assert not (tmp_path / "x").exists()
