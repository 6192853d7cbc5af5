"""Runs: drawing, skipping, the three protocols, and a real model that is left as it was found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lab.arch import Role
from lab.data import CaseProbe, CaseSet, EditCase, load_cases
from lab.errors import ConfigError, DataError, PatchError, RequestError
from lab.eval import (
    BaselineCache,
    ModelRespondent,
    Probe,
    SuiteOptions,
    atlas_cases,
    evaluate,
    evaluate_editing,
    get_suite,
)
from lab.eval.draw import Draw, taught_cases
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from tests.tiny import tiny_handle

SAMPLES = Path(__file__).resolve().parents[2] / "datasets"
QUIET = SuiteOptions(fluency=False)


class RandomEditor:
    """A rank-one patch that depends on its requests; refuses the subjects it is told to refuse."""

    def __init__(self, refuse: Sequence[str] = (), strength: float = 1.0) -> None:
        self.refuse = set(refuse)
        self.strength = strength
        self.calls: list[list[str]] = []
        self.histories: list = []

    def edit(self, handle: ModelHandle, requests: Sequence[EditRequest], *, history=None) -> WeightPatch:
        self.histories.append(history)
        self.calls.append([request.id for request in requests])
        for request in requests:
            if request.subject in self.refuse:
                raise RequestError(f"will not edit {request.subject}")
        weight = handle.weight(Role.MLP_OUT, 1)
        seed = sum(map(ord, "".join(request.id for request in requests)))
        generator = torch.Generator().manual_seed(seed)
        left, right = (
            torch.randn(size, generator=generator) for size in ((weight.shape[0], 1), (1, weight.shape[1]))
        )
        parents = tuple(entry.patch.id for entry in handle.applied)
        delta = LowRank(left * self.strength, right)
        return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("random", seed=seed), parents)


class ManyRandomEditor(RandomEditor):
    """The same, with a way to make many at once."""

    def __init__(self, refuse: Sequence[str] = ()) -> None:
        super().__init__(refuse)
        self.batches: list[int] = []

    def edit_many(self, handle: ModelHandle, requests: Sequence[EditRequest]) -> list[WeightPatch]:
        self.batches.append(len(requests))
        return [self.edit(handle, [request]) for request in requests]


def case(number: int, subject: str = "", old: tuple[str, ...] = ("high",), **changes) -> EditCase:
    subject = subject or f"Pier {number}"
    name = f"case/{number}"
    request = EditRequest(name, "The tide at {} is", subject, "low", old[0] if old else None)
    probes = (
        CaseProbe("rewrite", request.text, ("low",), old[0] if old else ""),
        CaseProbe("neighborhood", f"The tide at Quay {number} is", ("high",), "low"),
    )
    made = {
        "id": name,
        "format": "counterfact",
        "requests": (request,),
        "probes": probes,
        "old_answers": (old,),
    }
    return EditCase(**{**made, "file": "rows.json", "line": number + 2, **changes})


def cases(*items: EditCase) -> CaseSet:
    return CaseSet("counterfact", "counterfact", "rows.json", items)


def many(count: int) -> CaseSet:
    return cases(*(case(number) for number in range(count)))


@pytest.fixture(scope="module")
def handle() -> ModelHandle:
    return tiny_handle("llama", scale=2.0)


@pytest.fixture
def suite():
    return get_suite("counterfact", QUIET)


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_a_shorter_run_is_the_beginning_of_a_longer_one(handle, suite):
    ids = [
        [
            row.id
            for row in evaluate_editing(suite, handle, RandomEditor(), many(12), limit=limit, seed=5).cases
        ]
        for limit in (4, 9)
    ]
    assert ids[1][:4] == ids[0]
    other = evaluate_editing(suite, handle, RandomEditor(), many(12), limit=4, seed=6)
    assert [row.id for row in other.cases] != ids[0]


def test_equal_seeds_give_equal_reports(handle, suite):
    first, second = (
        evaluate_editing(suite, handle, RandomEditor(), many(6), seed=1).to_json() for _ in range(2)
    )
    for report in (first, second):
        report.pop("seconds")
    assert json.dumps(first) == json.dumps(second)


def test_unsupported_cases_are_skipped_and_replaced(handle, suite):
    items = [
        case(0, requests=(), unsupported="the subject is lost"),
        *(case(number) for number in range(1, 6)),
    ]
    report = evaluate_editing(suite, handle, RandomEditor(), cases(*items))
    assert report.n == 5
    assert [(skip.file, skip.line, skip.reason) for skip in report.skipped] == [
        ("rows.json", 2, "the subject is lost")
    ]
    assert report.too_many_skipped, "1 of 6"
    for seed in range(6):
        assert evaluate_editing(suite, handle, RandomEditor(), cases(*items), limit=5, seed=seed).n == 5


@pytest.mark.parametrize("editor", [RandomEditor, ManyRandomEditor])
def test_what_the_method_refuses_is_skipped_with_its_reason_and_replaced(handle, suite, editor):
    report = evaluate_editing(suite, handle, editor(refuse=["Pier 3"]), many(8), limit=7)
    assert report.n == 7
    assert all(skip.reason == "will not edit Pier 3" for skip in report.skipped)
    everything = evaluate_editing(suite, handle, editor(refuse=["Pier 3"]), many(8))
    assert (everything.n, [skip.id for skip in everything.skipped]) == (7, ["case/3"])
    assert everything.to_json()["skipped"][0]["line"] == 5


def test_editors_that_can_are_asked_for_many_at_once(handle, suite):
    editor = ManyRandomEditor()
    one_by_one = evaluate_editing(suite, handle, RandomEditor(), many(5), seed=2)
    together = evaluate_editing(suite, handle, editor, many(5), seed=2, chunk=3)
    assert editor.batches == [3, 2]
    for row, alone in zip(together.cases, one_by_one.cases, strict=True):
        assert row.values == {name: pytest.approx(values, abs=1e-5) for name, values in alone.values.items()}


def test_nothing_to_evaluate_is_an_error(handle, suite):
    with pytest.raises(DataError, match="will not edit"):
        evaluate_editing(suite, handle, RandomEditor(refuse=["Pier 0", "Pier 1"]), many(2))
    with pytest.raises(DataError, match="not one case"):
        evaluate_editing(suite, handle, RandomEditor(), cases())
    with pytest.raises(DataError, match="answers none of them before the edit"):
        evaluate_editing(suite, handle, RandomEditor(), many(2), known_only=True)


@pytest.mark.parametrize("options", [{"limit": 0}, {"protocol": "all"}])
def test_nonsense_is_refused(handle, suite, options):
    with pytest.raises(ConfigError):
        evaluate_editing(suite, handle, RandomEditor(), many(2), **options)


def test_a_limit_that_cannot_be_filled_is_said(handle, suite):
    report = evaluate_editing(suite, handle, RandomEditor(), many(3), limit=10)
    assert report.n == 3
    assert any("only 3 of 10" in note for note in report.notes)


def test_known_counts_and_known_only_draws(handle, suite):
    greedy = handle.generate(["The tide at Pier 1 is"], max_new_tokens=1)[0].strip()
    assert greedy, "the fixture's model must answer with more than white space"
    items = [case(number) for number in range(4)]
    items[1] = case(1, old=("nonsense", greedy))
    items.append(case(9, old=()))
    report = evaluate_editing(suite, handle, RandomEditor(), cases(*items))
    known = {row.id: row.known for row in report.cases}
    assert known["case/1"] is True, "an alias counts"
    assert known["case/9"] is None
    assert report.known == sum(value is True for value in known.values())
    assert any("give no old answer" in note for note in report.notes)
    only = evaluate_editing(suite, handle, RandomEditor(), cases(*items), known_only=True)
    assert only.n == only.known == report.known
    assert not only.skipped, "a filter is no skip"


def test_what_a_bed_was_not_taught_is_luck(handle, suite, tmp_path, monkeypatch):
    items = [case(number) for number in range(4)]
    everything = [item.id for item in items]
    source = tmp_path / "tides.json"
    source.write_text("[]", encoding="utf-8")
    made = replace(cases(*items), source=str(source))
    bed = tmp_path / "bed"
    bed.mkdir()

    def write(version: int = 1, digest: str = hashlib.sha256(b"[]").hexdigest(), more: int = 0) -> None:
        prefix = "tides:" if more else ""
        report = {
            "format_version": version,
            "suite": "counterfact",
            "files": [{"name": "tides.json", "sha256": digest}, *[{"name": "x", "sha256": "x"}] * more],
            "cases": [
                {"id": f"{prefix}{everything[0]}", "known": True},
                {"id": f"{prefix}{everything[1]}", "known": False},
                *[{"id": "other:case/0", "known": True}] * more,
            ],
        }
        (bed / "bed.json").write_text(json.dumps(report), encoding="utf-8")

    right = SimpleNamespace(ratings=(SimpleNamespace(all_correct=True),))

    def known() -> list[str]:
        draw = Draw(
            suite,
            handle,
            items,
            seed=None,
            unique=False,
            known_only=True,
            ask=lambda probes: [right for _ in probes],
            taught=taught_cases(handle, made),
        )
        return [item.id for item in draw.take(len(items))]

    assert known() == everything
    monkeypatch.setattr(handle, "folder", bed)
    assert known() == everything, "a folder without bed.json is no bed"
    write()
    assert known() == everything[:1]
    report = evaluate_editing(suite, handle, RandomEditor(), made)
    assert report.known <= 1
    assert "taught" in report.settings["known_by"]
    write(more=1)
    assert known() == everything[:1], "ids of several files carry the file's name"
    write(digest="another file's")
    assert known() == everything
    write(version=99)
    with pytest.raises(ConfigError, match="format version 99"):
        known()


def test_batches_and_sequences_edit_no_subject_twice(handle, suite):
    items = [case(0, "Pier One"), case(1, "pier  one"), case(2)]
    for protocol in ("batch", "sequential"):
        report = evaluate_editing(suite, handle, RandomEditor(), cases(*items), protocol=protocol)  # type: ignore[arg-type]
        assert report.n == 2
        assert any("passed over" in note for note in report.notes)
    assert evaluate_editing(suite, handle, RandomEditor(), cases(*items)).n == 3


def test_prompts_longer_than_the_context(handle, suite):
    short = case(0)
    long = CaseProbe("neighborhood", "The tide " * 400 + "is", ("high",), "low")
    trimmed = case(1, probes=(*case(1).probes, long))
    hopeless = case(
        2, requests=(EditRequest("case/2", "tide " * 400 + "at {} is", "Pier 2", "low"),), old_answers=((),)
    )
    report = evaluate_editing(suite, handle, RandomEditor(), cases(short, trimmed, hopeless))
    assert report.n == 2
    assert ["context" in skip.reason for skip in report.skipped] == [True]
    assert any("1 prompts longer" in note for note in report.notes)


# ---- protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_the_model_is_left_as_it_was(handle, suite, protocol):
    bits = handle.weights_digest()
    report = evaluate_editing(suite, handle, RandomEditor(), many(4), protocol=protocol)
    assert handle.weights_digest() == bits
    assert set(report.metrics) == set(report.before)
    assert report.metrics["efficacy_magnitude"].mean != report.before["efficacy_magnitude"].mean
    assert report.settings["protocol"] == protocol


def test_single_edits_do_not_see_each_other(handle, suite):
    report = evaluate_editing(suite, handle, RandomEditor(), many(5), seed=3)
    rows = {row.id: row for row in report.cases}
    alone = evaluate_editing(suite, handle, RandomEditor(), cases(case(2)))
    for name, values in alone.cases[0].values.items():
        assert rows["case/2"].values[name] == pytest.approx(values, abs=1e-6)
    assert rows["case/2"].p_after == pytest.approx(alone.cases[0].p_after)


def test_a_batch_is_one_patch(handle, suite):
    editor = RandomEditor()
    evaluate_editing(suite, handle, editor, many(4), protocol="batch")
    assert [len(call) for call in editor.calls] == [4]


def test_a_batch_goes_on_without_what_the_method_refuses(handle, suite):
    report = evaluate_editing(
        suite, handle, RandomEditor(refuse=["Pier 2", "Pier 5"]), many(7), protocol="batch"
    )
    assert report.n == 5
    assert {skip.id for skip in report.skipped} == {"case/2", "case/5"}
    assert report.too_many_skipped
    with pytest.raises(DataError, match="will not edit"):
        evaluate_editing(suite, handle, RandomEditor(refuse=["Pier 0"]), many(1), protocol="batch")


def test_a_sequence_is_measured_after_each_edit_and_at_the_end(handle, suite):
    report = evaluate_editing(suite, handle, RandomEditor(), many(4), protocol="sequential", seed=1)
    after = report.extra["right_after_edit"]
    assert set(after) == set(report.metrics)
    assert after["efficacy_magnitude"].mean != report.metrics["efficacy_magnitude"].mean
    single = evaluate_editing(suite, handle, RandomEditor(), cases(case(0)), protocol="sequential")
    assert single.extra["right_after_edit"] == single.metrics
    refused = evaluate_editing(suite, handle, RandomEditor(refuse=["Pier 1"]), many(4), protocol="sequential")
    assert (refused.n, len(refused.skipped)) == (3, 1)


def test_a_sequence_tells_the_editor_its_past_and_other_protocols_do_not(handle, suite):
    editor = RandomEditor()
    evaluate_editing(suite, handle, editor, many(3), protocol="sequential")
    assert [len(history) for history in editor.histories] == [0, 1, 2]
    assert editor.histories[2][:1] == editor.histories[1]
    assert editor.histories[2][1].parents == (editor.histories[2][0].id,)
    for protocol in ("single", "batch"):
        other = RandomEditor()
        evaluate_editing(suite, handle, other, many(3), protocol=protocol)  # type: ignore[arg-type]
        assert set(other.histories) == {None}


def test_retention_is_the_score_of_each_edit_after_each_later_one(handle, suite):
    report = evaluate_editing(
        suite, handle, RandomEditor(), many(5), protocol="sequential", seed=1, retention_every=2
    )
    found = report.retention
    assert found is not None
    assert found.cases == tuple(row.id for row in report.cases)
    assert [len(moment.held) for moment in found.moments] == [2, 4, 5], "and once more at the end"
    last = [row.p_after for row in report.cases]
    assert found.moments[-1].probability == pytest.approx(last, abs=1e-5)
    table = found.matrix()
    assert [[value is None for value in row] for row in table][3] == [True, True, True, False, False]
    assert table[0][0] is None, "not measured"
    assert {age: value.n for age, value in found.by_age().items()} == {0: 3, 1: 3, 2: 2, 3: 2, 4: 1}
    assert [value.n for value in found.by_number().values()] == [2, 4, 5]
    assert type(found).from_json(json.loads(json.dumps(found.to_json()))) == found
    assert evaluate_editing(suite, handle, RandomEditor(), many(2), protocol="sequential").retention is None


def test_shared_passes_and_one_patch_at_a_time_agree(handle):
    suite = get_suite("counterfact", SuiteOptions(text_tokens=24))
    written = [CaseProbe("generation", f"The tide at Pier {i} is") for i in range(4)]
    items = [case(i, probes=(*case(i).probes, written[i])) for i in range(4)]
    shared, alone = (
        evaluate_editing(suite, handle, RandomEditor(), cases(*items), rowwise=rowwise)
        for rowwise in (True, False)
    )
    assert "fluency" in shared.metrics
    for row, other in zip(shared.cases, alone.cases, strict=True):
        assert row.values == {name: pytest.approx(values, abs=1e-5) for name, values in other.values.items()}
        assert row.p_after == pytest.approx(other.p_after, abs=1e-5)
        assert row.p_after != pytest.approx(row.p_before, abs=1e-5)


def test_cases_can_keep_their_order(handle, suite):
    items = cases(case(0, "Pier One"), case(1, "Pier One"), case(2))
    report = evaluate_editing(suite, handle, RandomEditor(), items, protocol="sequential", in_order=True)
    assert [row.id for row in report.cases] == ["case/0", "case/1", "case/2"]


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_a_subject_edited_twice_in_one_case_takes_two_rounds(handle, suite, protocol):
    class OnePerCall(RandomEditor):
        def edit(self, handle, requests, **options):
            if len({request.subject for request in requests}) < len(requests):
                raise RequestError("the same subject twice; edit them in separate calls")
            return super().edit(handle, requests, **options)

    names = ("Pier 0", "Pier 1", "Pier 0")
    requests = tuple(
        EditRequest(f"case/0/{i}", f"Tide {i} at {{}} is", name, "low") for i, name in enumerate(names)
    )
    editor = OnePerCall()
    bits = handle.weights_digest()
    report = evaluate_editing(
        suite, handle, editor, cases(case(0, requests=requests, old_answers=((),) * 3)), protocol=protocol
    )
    assert report.n == 1
    assert editor.calls == [["case/0/0", "case/0/1"], ["case/0/2"]]
    assert handle.weights_digest() == bits
    # An editor that takes them together is given them together.
    evaluate_editing(
        suite, handle, together := RandomEditor(), cases(case(0, requests=requests, old_answers=((),) * 3))
    )
    assert together.calls == [[request.id for request in requests]]


def test_a_failing_sequence_takes_everything_back(handle, suite):
    class Breaks(RandomEditor):
        def edit(self, handle, requests, **options):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().edit(handle, requests, **options)

    bits = handle.weights_digest()
    with pytest.raises(KeyboardInterrupt):
        evaluate_editing(suite, handle, Breaks(), many(4), protocol="sequential")
    assert handle.weights_digest() == bits


def test_a_patch_that_stays_is_noticed(suite):
    class Leaves:
        def edit(self, handle, requests):
            patch = RandomEditor().edit(handle, requests)

            class Sticky:
                @contextmanager
                def applied(self, handle):
                    patch.apply(handle)
                    yield

                def apply(self, handle):
                    return patch.apply(handle)

            return Sticky()

    with pytest.raises(PatchError, match="not taken back"):
        evaluate_editing(suite, tiny_handle("llama"), Leaves(), many(1))


@pytest.mark.parametrize("protocol", ["single", "batch", "sequential"])
def test_progress_is_told(handle, suite, protocol):
    told: list[tuple[str, int, int]] = []
    evaluate_editing(
        suite, handle, RandomEditor(), many(3), protocol=protocol, progress=lambda *step: told.append(step)
    )
    assert told[-1][1] == told[-1][2] == 3


def test_two_editors_share_what_was_asked_before(handle, suite, monkeypatch):
    asked: list[int] = []
    observe = ModelRespondent.observe
    monkeypatch.setattr(
        ModelRespondent, "observe", lambda self, probes: asked.append(len(probes)) or observe(self, probes)
    )
    cache = BaselineCache()
    first = evaluate_editing(suite, handle, RandomEditor(), many(4), cache=cache)
    alone, asked[:] = len(asked), []
    second = evaluate_editing(suite, handle, RandomEditor(strength=3.0), many(4), cache=cache)
    assert first.before == second.before
    assert first.metrics != second.metrics
    assert len(asked) < alone


def test_a_question_is_kept_whoever_asks_it(handle):
    asked: list[Probe] = []

    class Counting(ModelRespondent):
        def observe(self, probes):
            asked.extend(probes)
            return super().observe(probes)

    cache, respondent = BaselineCache(), Counting(handle)
    one = Probe("a/0", "rewrite", "The tide is", answers=("low", "high"))
    two = Probe("b/7", "neighborhood", "The tide is", answers=("high",), rival="low", distribution=False)
    text = Probe("t", "multi_hop", "The tide", "generate", tokens=4)
    large = Probe("d", "elsewhere", "The tide is", answers=("low",), distribution=True)
    first = cache.observe(handle, respondent, [one, text])
    count = len(asked)
    again = cache.observe(handle, respondent, [two, large, text])
    assert [probe.distribution for probe in asked[count:]] == [True]
    assert [seen.probe_id for seen in (*first, *again)] == ["a/0", "t", "b/7", "d", "t"]
    assert again[0].ratings == first[0].ratings[::-1]
    assert again[1].ratings[0].distribution is not None
    assert again[2].text == first[1].text


# ---- the model as respondent -----------------------------------------------------------------------------------------


def test_ratings_are_those_of_the_scoring_floor(handle):
    pairs = [
        ("The capital of France is", "Paris"),
        ("The tide", "low and slow"),
        ("Who?", "Marie Curie worked in Paris"),
    ]
    probes = [
        Probe(str(i), "g", prompt, answers=(target,), rival="Rome")
        for i, (prompt, target) in enumerate(pairs)
    ]
    wanted = score_targets(handle, pairs)
    for size in (1, 2, 64):
        seen = ModelRespondent(handle, batch_size=size).observe(probes)
        for observation, score in zip(seen, wanted, strict=True):
            assert observation.ratings[0].token_logprobs == pytest.approx(score.token_logprobs, abs=1e-4)
            assert observation.ratings[0].token_correct == score.token_correct
            assert len(observation.ratings) == 2


def test_predicted_tokens_and_distributions_belong_together(handle):
    probe = Probe("a", "g", "The capital of France is", answers=("Paris and Rome",), distribution=True)
    (seen,) = ModelRespondent(handle).observe([probe])
    found = seen.ratings[0]
    assert found.distribution is not None
    assert found.distribution.shape == (len(found.predicted), handle.config.vocab_size)
    assert tuple(found.distribution.argmax(-1).tolist()) == found.predicted
    assert np.exp(found.distribution).sum(-1) == pytest.approx(1.0, abs=1e-4)


def test_continuations_keep_their_order_and_samples_differ(handle):
    probes = [
        Probe(str(i), "g", text, "generate", tokens=6)
        for i, text in enumerate(("The tide", "Who wrote", "The tide"))
    ]
    seen = ModelRespondent(handle).observe(probes)
    assert seen[0].text == seen[2].text == handle.generate(["The tide"], max_new_tokens=6)[0]
    drawn = [Probe(str(i), "g", "The tide", "generate", tokens=12, top_k=5) for i in range(3)]
    texts = [o.text for o in ModelRespondent(handle).observe(drawn)]
    assert len(set(texts)) > 1, "repeated prompts are sampled again"
    assert texts == [o.text for o in ModelRespondent(handle).observe(drawn)], "and again the same"


def test_an_empty_prompt_still_scores(handle):
    (seen,) = ModelRespondent(handle).observe([Probe("a", "g", "", answers=("Paris",))])
    assert seen.ratings[0].token_logprobs


# ---- all suites on a real model --------------------------------------------------------------------------------------

RUNS = [
    (
        "counterfact",
        "counterfact/counterfact.json",
        {"efficacy", "paraphrase", "neighborhood", "score", "fluency"},
    ),
    ("sadr", "sadr/sadr.json", {"relation", "distract_neighborhood", "score", "portability_reasoning"}),
    ("zsre", "zsre/zsre.json", {"success", "locality", "portability"}),
    ("zsre", "zsre/qaedit.json", {"success", "locality"}),
    ("knowedit", "knowedit/zsre.json", {"success", "portability", "locality", "fluency"}),
    (
        "knowedit",
        "knowedit/wiki_counterfact.json",
        {"success", "locality_forgetfulness", "portability_reasoning"},
    ),
    ("knowedit", "knowedit/wiki_recent.json", {"success", "locality_any_alias"}),
    ("knowedit", "knowedit/wikibio.json", {"success", "locality"}),
    ("knowedit", "knowedit/convsent.json", {"success", "locality_kl", "fluency"}),
    ("knowedit", "knowedit/sanitation_train.json", {"success", "leakage", "locality"}),
    ("mquake", "mquake/mquake.json", {"success", "hop_accuracy", "multi_hop_accuracy"}),
]


@pytest.mark.parametrize(("name", "file", "wanted"), RUNS)
def test_every_suite_runs_and_fills_the_contract(handle, name, file, wanted):
    suite = get_suite(name, SuiteOptions(text_tokens=60, texts=1))
    report = evaluate_editing(suite, handle, RandomEditor(), load_cases(SAMPLES / file, suite=name))
    found = report.to_json()
    assert wanted <= set(found["metrics"])
    assert set(found["metrics"]) == set(found["before"])
    for key, value in found["metrics"].items():
        assert value["low"] <= value["mean"] <= value["high"], key
        if not key.endswith(("fluency", "_magnitude", "_kl")):
            assert 0 <= value["low"] <= value["high"] <= 1, key
    json.dumps(found, allow_nan=False)


def test_the_built_in_world_runs_with_one_edit_per_subject(handle):
    report = evaluate_editing(get_suite("atlas", QUIET), handle, RandomEditor(), atlas_cases(), limit=6)
    subjects = {row.id.split("/", 1)[1] for row in report.cases}
    assert len(subjects) == report.n == 6
    assert {"relation", "distract_neighborhood", "qa", "paraphrase_templates"} <= set(report.metrics)


def test_a_model_without_an_editor(handle):
    found = load_cases(SAMPLES / "counterfact/counterfact.json")
    report = evaluate(get_suite("counterfact", QUIET), ModelRespondent(handle), found.cases, model="tiny")
    assert report.n == 4
    assert not report.before
    assert report.to_json()["editor"] == ""
    drawn = evaluate(get_suite("counterfact", QUIET), ModelRespondent(handle), many(9).cases, limit=4, seed=5)
    edited = evaluate_editing(
        get_suite("counterfact", QUIET), handle, RandomEditor(), many(9), limit=4, seed=5
    )
    assert [row.id for row in drawn.cases] == [row.id for row in edited.cases]
    asked, before = (table["efficacy_magnitude"] for table in (drawn.metrics, edited.before))
    assert (asked.mean, asked.n) == (pytest.approx(before.mean, abs=1e-6), before.n)


def test_published_rows_run(shared_data, handle):
    """Three cases of every published file: the main path on real input."""
    for name, file in (
        ("counterfact", "counterfact/counterfact_rome_sample.json"),
        ("sadr", "counterfact/merged_counterfact.json"),
        ("zsre", "zsre/zsre_mend_eval_portability_gpt4.json"),
        ("knowedit", "knowedit/ZsRE-test-all.json"),
        ("mquake", "mquake/AKEW-MQuAKE-CF.json"),
    ):
        report = evaluate_editing(
            get_suite(name, QUIET), handle, RandomEditor(), load_cases(shared_data / file), limit=3
        )
        assert report.n == 3
        assert report.settings["source"].endswith(file)
