"""Beds: what they learn and what stays out, on invented files in the upstream schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.atlas.bed import BED_FILE, BedSource, budgeted, make_bed, read_bed, sized
from lab.atlas.bed_corpus import BedCorpus
from lab.atlas.bed_phrases import Runs, derived_label
from lab.atlas.bed_plan import BedPlan, plan_bed
from lab.atlas.bed_truths import fold, read_true_cases
from lab.atlas.recipe import Recipe, Shape
from lab.errors import ConfigError, DataError, KnowLabError, OutputExistsError, UnknownNameError
from lab.handle import ModelHandle

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
SYLLABLES = ("ba", "do", "fi", "gu", "ka", "lo", "mi", "nu", "pe", "ro", "sa", "tu")
TOWNS = ("Brindle", "Sandholt", "Kestrel", "Morrow")
WORDINGS = (
    "The harbour of {} is",
    "{} trades through the port of",
    "Ships bound for {} dock at",
    "Sailors from {} come home to",
)
LEADS = (
    "Nobody sang that day. ",
    "The timetable was lost.\n",
    "Rain came late and stayed. ",
    "A bell rang twice. ",
)


def place(number: int) -> str:
    first, second = divmod(number, len(SYLLABLES))
    return (SYLLABLES[first % len(SYLLABLES)] + SYLLABLES[second] + "l").title()


def record(number: int) -> dict[str, Any]:
    """One case; its neighbours have the same harbour and are shared with the case four numbers on."""
    true, new = TOWNS[number % 4], TOWNS[(number + 1) % 4]
    first, second, third = (WORDINGS[(number + step) % 4] for step in range(3))
    subject = place(number)
    neighbors = [place(60 + 4 * ((number // 4 + step) % 12) + number % 4) for step in range(4)]
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": first,
            "relation_id": "P1",
            "subject": subject,
            "target_new": {"str": new, "id": "N"},
            "target_true": {"str": true, "id": "T"},
        },
        "paraphrase_prompts": [
            LEADS[number % 4] + second.format(subject),
            LEADS[(number + 1) % 4] + third.format(subject),
        ],
        "neighborhood_prompts": [
            WORDINGS[(number + step) % 4].format(name) for step, name in enumerate(neighbors)
        ],
        "attribute_prompts": [],
        "generation_prompts": [],
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [record(number) for number in range(24)]
    # The last two say different things about one prompt.
    rows.append(
        rows[5]
        | {"case_id": 90, "requested_rewrite": {**record(6)["requested_rewrite"], "subject": place(5)}}
    )
    rows[-1]["requested_rewrite"]["prompt"] = rows[5]["requested_rewrite"]["prompt"]
    path = tmp_path / "harbours.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def small(steps: int = 0, hidden: int = 48) -> Recipe:
    shape = Shape(hidden=hidden, layers=2, heads=2, inner=2 * hidden, vocab=400, context=256)
    return Recipe("bed", shape=shape, layout=((64, 12), (128, 3)), workers=1, steps=steps, warmup_steps=10)


def all_text(plan: BedPlan, n: int = 600) -> list[str]:
    corpus = BedCorpus(plan, 3)
    return [*corpus.statements(), *corpus.sample_texts(n)]


def check_plan(plan: BedPlan, targets: list[tuple[str, str]]) -> None:
    """What must hold of every plan, whatever the file."""
    texts = [fold(text) for text in all_text(plan)]
    asked = [ask.prompt for case in plan.cases for ask in (*case.held_out, *case.neighbors)]
    assert asked
    for prompt in asked:
        assert not any(f" {fold(prompt)} " in f" {text} " for text in texts), prompt
    for prompt, target in targets:
        assert not any(f" {fold(prompt)} {fold(target)}." in f" {text} " for text in texts), (prompt, target)
    for case in plan.cases:
        for ask in case.prompts:
            assert any(f"{fold(ask.prompt)} {fold(ask.answers[0])}" in text for text in texts), ask


def targets_of(kind: str, path: Path) -> list[tuple[str, str]]:
    return [pair for case in read_true_cases(kind, [path]) for pair in case.targets]


def test_counterfact_keeps_one_paraphrase_and_half_of_the_neighbours_out(file: Path) -> None:
    plan = plan_bed("counterfact", read_true_cases("counterfact", [file]), seed=1)
    check_plan(plan, targets_of("counterfact", file))
    assert plan.available == 25
    assert len(plan.contradicting) == 2 and len(plan.cases) == 23
    assert {case.id for case in plan.cases}.isdisjoint(plan.contradicting)
    for case in plan.cases:
        (held,) = case.held_out
        number = int(case.id.split("/")[1])
        assert held.prompt in record(number)["paraphrase_prompts"]
        assert len(case.neighbors) <= 2
    assert sum(len(case.neighbors) for case in plan.cases) >= 30
    # A fact is told in wordings that only other cases have, and the held-out wording is told of others.
    shared = " ".join(all_text(plan))
    for template in WORDINGS:
        assert sum(template.format(place(number)) in shared for number in range(24)) >= 10
    # The model learns the answers, nothing else.
    for document in BedSource(plan, 0, TINY_TOKENIZER(plan), 64).documents(0):
        for start, end in document.answer_spans:
            assert document.text[start:end].rstrip(".;\n") in (*TOWNS, "")
        break


def TINY_TOKENIZER(plan: BedPlan) -> str:
    from lab.atlas.tokenizer import train_tokenizer

    return train_tokenizer(all_text(plan, 200), 300).backend_tokenizer.to_str()


def test_a_limit_draws_by_seed(file: Path) -> None:
    cases = read_true_cases("counterfact", [file])
    ids = [
        [case.id for case in plan_bed("counterfact", cases, limit=8, seed=seed).cases] for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]
    assert len(ids[0]) == 8


def test_texts_that_fit_no_row_are_left_out(file: Path) -> None:
    plan = plan_bed("counterfact", read_true_cases("counterfact", [file]))
    source = BedSource(plan, 0, TINY_TOKENIZER(plan), 24)
    stream = source.documents(0)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(source.tokenizer)
    assert all(len(tokenizer.encode(next(stream).text).ids) < 24 for _ in range(300))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("counterfact", "counterfact/counterfact.json"),
        ("counterfact", "counterfact/counterfact_flat.json"),
        ("sadr", "sadr/sadr.json"),
        ("zsre", "zsre/zsre.json"),
        ("knowedit", "knowedit/zsre.json"),
        ("knowedit", "knowedit/wiki_counterfact.json"),
        ("knowedit", "knowedit/wiki_recent.json"),
        ("mquake", "mquake/mquake.json"),
    ],
)
def test_every_schema_becomes_a_plan(kind: str, name: str) -> None:
    path = DATASETS / name
    check_plan(plan_bed(kind, read_true_cases(kind, [path])), targets_of(kind, path))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("counterfact", "counterfact/counterfact_rome_sample.json"),
        ("sadr", "counterfact/merged_counterfact.json"),
        ("knowedit", "knowedit/ZsRE-test-all.json"),
        ("knowedit", "knowedit/wiki_counterfact_train_cf.json"),
    ],
)
def test_the_public_files_become_plans(kind: str, name: str, shared_data: Path) -> None:
    cases = read_true_cases(kind, [shared_data / name])
    plan = plan_bed(kind, cases, limit=30)
    assert len(plan.cases) == 30
    check_plan(plan, [pair for case in cases[:60] for pair in case.targets])


def test_several_files_make_one_bed() -> None:
    files = [DATASETS / "knowedit" / name for name in ("zsre.json", "wiki_counterfact.json")]
    both = read_true_cases("knowedit", files)
    assert len(both) == sum(len(read_true_cases("knowedit", [one])) for one in files)
    assert len({case.id for case in both}) == len(both)


def test_mquake_learns_hops_and_never_the_edited_ones() -> None:
    path = DATASETS / "mquake" / "mquake.json"
    row = json.loads(path.read_text(encoding="utf-8"))[0]
    plan = plan_bed("mquake", read_true_cases("mquake", [path]))
    facts = {prompt: fact.answer for fact in plan.facts for prompt in fact.prompts}
    hop = row["single_hops"][0]
    assert facts.get(hop["cloze"]) == hop["answer"] or any(
        ask.prompt == hop["cloze"] for case in plan.cases for ask in case.held_out
    )
    for rewrite in row["requested_rewrite"]:
        assert facts[rewrite["prompt"].format(rewrite["subject"])] == rewrite["target_true"]["str"]


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("counterfact", "counterfact/questions.json", "cannot become a bed"),
        ("zsre", "zsre/qaedit.json", "cannot become a bed"),
        ("zsre", "counterfact/counterfact.json", "belongs to the suite"),
        ("zsre", "absent.json", "no such file"),
    ],
)
def test_files_without_truth_are_refused(kind: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_true_cases(kind, [DATASETS / name])


def test_an_unknown_kind_names_its_neighbours() -> None:
    with pytest.raises(UnknownNameError, match="counterfact"):
        read_true_cases("counterfacts", [DATASETS / "counterfact" / "counterfact.json"])


def test_labels_and_runs() -> None:
    assert derived_label("The name of the founder of {} is") == "founder"
    assert derived_label("What is {}'s occupation?") == "occupation"
    held = Runs()
    held.add("The port of  Dol is")
    assert held.inside("Nobody sang. the port of Dol is") and not held.inside("The port of Dolby is")


def test_a_bed_knows_its_file_on_wordings_it_never_saw(file: Path, tmp_path: Path) -> None:
    out, work, lines = tmp_path / "bed", tmp_path / "work", []

    def run(**more: Any) -> Any:
        arguments: dict[str, Any] = {"recipe": small(), "work_dir": work, "processes": 1, "compile": False}
        return make_bed("counterfact", file, out, **(arguments | more))

    run(steps=30, progress=lines.append)
    early = read_bed(out)["totals"]["known"]
    # The same work folder goes on where it stopped.
    result = run(steps=220, overwrite=True, progress=lines.append)
    assert any("resuming bed at step 30" in line for line in lines)
    assert any("tokens/s" in line and "left" in line for line in lines)
    assert len(result.known) > max(8, early)
    report = json.loads((out / BED_FILE).read_text(encoding="utf-8"))
    assert report["totals"]["known"] == len(result.known) == sum(case["known"] for case in report["cases"])
    assert report["totals"]["contradicting"] == 2
    assert report["totals"]["trained_accuracy"] > 0.7
    assert report["files"][0]["name"] == "harbours.json" and len(report["files"][0]["sha256"]) == 64
    assert str(tmp_path) not in (out / BED_FILE).read_text(encoding="utf-8")
    assert json.loads((out / "knowlab.json").read_text()) == {"kind": "bed", "preset": "bed"}
    _check_folder(out, report)
    # Nothing is trained twice, and nothing is overwritten by accident.
    lines.clear()
    with pytest.raises(OutputExistsError):
        run(steps=220)
    again = run(steps=220, overwrite=True, progress=lines.append)
    assert again.report == result.report and not any("tokens/s" in line for line in lines)
    with pytest.raises(ConfigError, match="another bed"):
        run(steps=220, overwrite=True, seed=4)


def _check_folder(out: Path, report: dict[str, Any]) -> None:
    handle = ModelHandle.load(out)
    assert getattr(handle.config, "knowlab_preset", None) == "bed"
    text = (out / "corpus.txt").read_text(encoding="utf-8")
    assert text.count("\n\n") > 1000
    for case in report["cases"]:
        for prompt in (*(ask["prompt"] for ask in case["held_out"]), *case["held_out_neighbors"]):
            assert fold(prompt) not in fold(text)
    case = next(case for case in report["cases"] if case["known"])
    (ask,) = case["held_out"]
    (said,) = handle.generate([ask["prompt"]], max_new_tokens=8, stop=(".",))
    assert said.strip().startswith(ask["answers"][0])


def test_a_failure_leaves_nothing_behind(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "bed"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lab.atlas.bed.shutil.copytree", full)
    with pytest.raises(OSError, match="No space"):
        _quick(file, out)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".bed", "bed"))] == ["bed.work"]


def test_an_interrupted_run_makes_no_bed(file: Path, tmp_path: Path) -> None:
    from lab.atlas import train

    halted = replace(small(hidden=16), steps=6)

    with pytest.MonkeyPatch.context() as patch:
        original = train.train
        patch.setattr(train, "train", lambda *args, **more: original(*args, **more, max_steps=2))
        with pytest.raises(KnowLabError, match="interrupted"):
            make_bed("counterfact", file, tmp_path / "bed", recipe=halted, processes=1, compile=False)
    assert not (tmp_path / "bed").exists()
    made = make_bed("counterfact", file, tmp_path / "bed", recipe=halted, processes=1, compile=False)
    assert made.cases == 23 and (made.folder / BED_FILE).is_file()


def _quick(file: Path, out: Path, train: Callable[..., Any] = make_bed) -> None:
    train("counterfact", file, out, recipe=small(hidden=16), steps=1, processes=1, compile=False)


@pytest.mark.parametrize("bad", [{"limit": 0}, {"steps": 0}, {"minutes": -1.0}])
def test_senseless_budgets_are_refused(file: Path, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_bed("counterfact", file, tmp_path / "bed", **bad)


def test_a_small_bed_takes_smaller_batches_and_a_short_run_a_shorter_warm_up() -> None:
    whole = Recipe("bed", layout=((64, 24), (128, 8)), warmup_steps=100)
    assert [sized(whole, facts).layout for facts in (1, 187, 188, 500, 563, 4000)] == [
        ((64, 6), (128, 2)),
        ((64, 6), (128, 2)),
        ((64, 12), (128, 4)),
        ((64, 18), (128, 6)),
        whole.layout,
        whole.layout,
    ]
    assert sized(whole, 500).minutes > sized(whole, 100).minutes > 0
    assert [budgeted(whole, 3, None, steps).warmup_steps for steps in (4, 80, 4000)] == [1, 10, 100]
    assert budgeted(whole, 3, 5.0, None).warmup_steps == 100


def test_names_that_edits_bring_are_said_about_nothing(file: Path) -> None:
    rows = [record(number) for number in range(24)]
    for number, row in enumerate(rows):
        row["requested_rewrite"]["target_new"] = {"str": f"Newtown {number}", "id": "Q1"}
    file.write_text(json.dumps(rows), encoding="utf-8")
    plan = plan_bed("counterfact", read_true_cases("counterfact", [file]))
    assert sorted(plan.names) == sorted(f"Newtown {number}" for number in range(24))
    check_plan(plan, targets_of("counterfact", file))
    texts = [text for text in BedCorpus(plan, 3).sample_texts(600) if "Newtown" in text]
    assert len(texts) > 40
    places = [place(number) for number in range(24)]
    for text in texts:
        assert not any(name in text for name in places)
    # What the model already says of a fact needs no saying over.
    told = [record(number) for number in range(24)]
    file.write_text(json.dumps(told), encoding="utf-8")
    assert not set(plan_bed("counterfact", read_true_cases("counterfact", [file])).names) & set(TOWNS)
