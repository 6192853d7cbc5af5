"""Readers: every published form becomes typed cases, and every broken row names its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.data import CaseSet, ReadOptions, load_cases, locate_subject, normalize_answer, read_rows
from lab.data.text import template_of
from lab.errors import ConfigError, DataError

SAMPLES = Path(__file__).resolve().parents[2] / "datasets"

FORMS = [
    ("counterfact/counterfact.json", "counterfact", "counterfact", 4),
    ("counterfact/counterfact_flat.json", "counterfact", "counterfact_flat", 4),
    ("counterfact/questions.json", "counterfact", "counterfact_questions", 4),
    ("sadr/sadr.json", "sadr", "sadr", 4),
    ("zsre/zsre.json", "zsre", "zsre", 4),
    ("zsre/qaedit.json", "zsre", "qaedit", 2),
    ("knowedit/zsre.json", "knowedit", "knowedit_fact", 4),
    ("knowedit/wiki_counterfact.json", "knowedit", "knowedit_fact", 2),
    ("knowedit/wiki_counterfact_requests.json", "knowedit", "knowedit_requests", 1),
    ("knowedit/wiki_recent.json", "knowedit", "knowedit_fact", 2),
    ("knowedit/wikibio.json", "knowedit", "knowedit_wikibio", 2),
    ("knowedit/convsent.json", "knowedit", "knowedit_convsent", 3),
    ("knowedit/sanitation_train.json", "knowedit", "knowedit_sanitation", 2),
    ("knowedit/sanitation_test.json", "knowedit", "knowedit_sanitation", 2),
    ("mquake/mquake.json", "mquake", "mquake", 2),
]


def sample(name: str, **options: Any) -> CaseSet:
    return load_cases(SAMPLES / name, options=ReadOptions(**options))


def write(folder: Path, rows: list, name: str = "rows.json") -> Path:
    path = folder / name
    path.write_text(
        "[\n" + ",\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n]\n",
        "utf-8",
    )
    return path


def rome_row(number: int, **changes) -> dict:
    rewrite = {
        "prompt": "The tide at {} is",
        "subject": f"Pier {number}",
        "target_new": {"str": "low"},
        "target_true": {"str": "high"},
    }
    row = {
        "case_id": number,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [],
        "neighborhood_prompts": [],
    }
    return row | changes


@pytest.mark.parametrize(("name", "suite", "form", "count"), FORMS)
def test_every_form_is_recognised_and_read(name, suite, form, count):
    cases = sample(name)
    assert (cases.suite, cases.format, len(cases)) == (suite, form, count)
    assert all(case.unsupported or case.requests for case in cases)
    assert all(probe.prompt and "{}" not in probe.prompt for case in cases for probe in case.probes)
    assert len({case.id for case in cases}) == count


@pytest.mark.parametrize(("name", "suite", "form", "count"), FORMS)
def test_lines_point_at_the_record(name, suite, form, count):
    for case in sample(name):
        # Sanitation's edits stand in its other half, whichever was given.
        text = Path(case.file).read_text("utf-8").split("\n")[case.line - 1]
        for request in case.requests[:1]:
            assert request.subject in text


def test_filled_prompts_become_templates_that_give_the_prompt_back():
    for name, *_ in FORMS:
        for case in sample(name):
            for request, probe in zip(case.requests, case.of("rewrite"), strict=False):
                assert request.text == probe.prompt


def test_counterfact_groups_and_rivals():
    case = sample("counterfact/counterfact.json").cases[0]
    assert case.requests[0].target_new == "Kestrel Hill"
    assert case.requests[0].target_old == "Brindle Bay"
    assert [(p.answers, p.rival) for p in case.of("neighborhood")] == [(("Brindle Bay",), "Kestrel Hill")] * 2
    assert case.of("paraphrase")[0].rival == "Brindle Bay"
    # Repeated generation prompts are meant: each is sampled.
    assert len(case.of("generation")) == 2


def test_the_flat_form_has_the_old_object_in_ground_truth():
    case = sample("counterfact/counterfact_flat.json").cases[0]
    assert (case.requests[0].target_new, case.requests[0].target_old) == ("Kestrel Hill", "Brindle Bay")


def test_a_question_without_old_answer_has_no_rival():
    case = sample("counterfact/questions.json").cases[0]
    assert case.old_answers == ((),)
    assert case.requests[0].target_old is None
    assert not case.of("rewrite")[0].rival


def test_both_families_of_sadr():
    first, _, third, fourth = sample("sadr/sadr.json")
    assert (first.meta["family"], third.meta["family"]) == ("counterfact", "wikidata")
    # A rewriting prompt competes with the old object, a locality prompt with the new one.
    assert first.of("neighborhood")[0].rival == "Kestrel Hill"
    assert third.of("relation")[0].rival == "Odo Pennyfeather"
    assert {p.kind: p.rival for p in third.of("portability")} == {
        "reasoning": "Marla Finch",
        "subject_alias": "Marla Finch",
    }
    assert first.of("commonsense")[0].answers == ("tie it to the quay.",)
    assert fourth.requests[0].subject == "the Gullhaven Choir"


def test_the_two_conventions_of_zsre():
    easyedit, rome = (sample("zsre/zsre.json", convention=name).cases[0] for name in ("easyedit", "rome"))
    assert (easyedit.requests[0].target_new, easyedit.requests[0].target_old) == ("Lena Croft", "Nell Sarto")
    assert easyedit.old_answers == (("Nell Sarto", "Eleanor Sarto"),)
    assert (rome.requests[0].target_new, rome.requests[0].target_old) == ("Nell Sarto", None)
    assert rome.of("rewrite")[0].answers == ("Nell Sarto", "Eleanor Sarto")
    # The prefix is for a T5 that was trained on it.
    assert easyedit.of("locality")[0].prompt == "what is the tallest tower in gullhaven"
    assert easyedit.of("portability") and not rome.of("portability")
    with pytest.raises(ConfigError, match="easyedit, rome"):
        sample("zsre/zsre.json", convention="mend")


def test_a_blank_target_is_valid_and_unsupported():
    blank = sample("zsre/zsre.json").cases[3]
    assert "empty" in blank.unsupported
    assert not blank.requests
    assert sample("zsre/zsre.json").cases[1].requests[0].target_new == "Aldous & Sons"


def test_a_subject_that_cannot_be_located_is_unsupported_with_its_reason():
    lost = sample("knowedit/zsre.json").cases[3]
    assert "Old Ferry Nine" in lost.unsupported
    assert lost.line == 5


def test_a_stray_asterisk_is_no_part_of_a_target():
    assert sample("zsre/qaedit.json").cases[0].requests[0].target_new == "Sib Marrow"
    assert [case.id for case in sample("zsre/qaedit.json")] == ["qaedit/NQ7", "qaedit/TQA7"]


def test_knowedit_keeps_every_alias_and_drops_blank_answers():
    recent = sample("knowedit/wiki_recent.json").cases[1]
    assert recent.of("portability")[0].answers == ("Highfold", "High Fold", "Kestrel Hill")
    assert recent.old_answers == ((),)
    counterfact = sample("knowedit/wiki_counterfact.json").cases[0]
    assert [p.kind for p in counterfact.of("locality")] == ["relation_specificity", "forgetfulness"]


def test_the_prepared_form_of_knowedit_reads_like_the_hosted_one():
    case = sample("knowedit/wiki_counterfact_requests.json").cases[0]
    assert [p.kind for p in case.of("portability")] == ["subject_aliasing", "subject_aliasing", "reasoning"]
    assert case.requests[0].target_old is None, "the placeholder is no answer"


def test_wikibio_finds_its_lower_case_subject():
    case = sample("knowedit/wikibio.json").cases[0]
    assert case.requests[0].prompt.startswith("This is a Wikipedia passage about {}. Nell")


def test_convsent_takes_the_next_entity_as_the_unrelated_one():
    first, _, last = sample("knowedit/convsent.json")
    assert {p.kind for p in first.of("opinion")} == {"same", "opposite"}
    assert all("Larkmere Fair" in p.prompt for p in first.of("elsewhere"))
    assert all("Gullhaven Choir" in p.prompt for p in last.of("elsewhere"))
    sentiment = "postively" if first.meta["sentiment"] == "positive" else "negatively"
    assert sentiment in first.requests[0].prompt
    assert sample("knowedit/convsent.json").cases == sample("knowedit/convsent.json").cases
    drawn = {sample("knowedit/convsent.json", seed=seed).cases[0].requests[0].text for seed in range(8)}
    assert len(drawn) > 1


def test_sanitation_is_one_case_per_answer_whichever_half_is_given():
    for half in ("train", "test"):
        plums, ox = sample(f"knowedit/sanitation_{half}.json")
        assert [len(case.requests) for case in (plums, ox)] == [2, 1]
        assert [p.prompt for p in plums.of("erase")] == [
            "Question:Which fruit is in a Dunwater tart?\nAnswer:"
        ]
        assert len(plums.of("locality")) == 3


def test_sanitation_without_its_other_half(tmp_path):
    train = tmp_path / "train.json"
    train.write_text((SAMPLES / "knowedit/sanitation_train.json").read_text("utf-8"), "utf-8")
    plums, _ = load_cases(train)
    assert len(plums.of("erase")) == 2
    assert len(plums.of("locality")) == 2
    alone = tmp_path / "alone_test.json"
    alone.write_text((SAMPLES / "knowedit/sanitation_test.json").read_text("utf-8"), "utf-8")
    with pytest.raises(DataError, match="names no subjects"):
        load_cases(alone)


def test_mquake_has_several_edits_and_aliases():
    case = sample("mquake/mquake.json").cases[1]
    assert [request.subject for request in case.requests] == ["the Gullhaven Choir", "Ada Thorn"]
    assert len({request.id for request in case.requests}) == 2
    assert case.of("multi_hop")[0].answers == ("Highfold", "High Fold")
    assert len(case.of("hop")) == 2


# ---- rows, lines and errors ------------------------------------------------------------------------------------------


def test_a_row_that_breaks_the_schema_names_file_and_line(tmp_path):
    broken = rome_row(2)
    del broken["requested_rewrite"]["target_new"]
    path = write(tmp_path, [rome_row(0), rome_row(1), broken, rome_row(3)])
    with pytest.raises(DataError, match=r"requested_rewrite\.target_new") as caught:
        load_cases(path)
    assert (caught.value.file, caught.value.line) == (str(path), 4)
    assert str(caught.value).startswith(f"{path}:4: ")
    cases = load_cases(path, skip_malformed=True)
    assert [case.id for case in cases] == ["counterfact/0", "counterfact/1", "counterfact/3"]
    assert [(skip.line, skip.file) for skip in cases.malformed] == [(4, str(path))]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"requested_rewrite": "text"}, "requested_rewrite"),
        ({"paraphrase_prompts": [1]}, "paraphrase_prompts"),
        ({"neighborhood_prompts": None}, "neighborhood_prompts"),
        ({"case_id": [1]}, "case_id"),
        ({"generation_prompts": {"a": 1}}, "generation_prompts"),
    ],
)
def test_wrong_types_are_refused(tmp_path, changes, field):
    path = write(tmp_path, [rome_row(0), rome_row(1, **changes)])
    with pytest.raises(DataError, match=field) as caught:
        load_cases(path)
    assert caught.value.line == 3


def test_broken_json_inside_a_list_costs_one_line(tmp_path):
    path = write(tmp_path, [rome_row(0), '{"case_id": 1, "requested', rome_row(2), "7", rome_row(4)])
    with pytest.raises(DataError, match="not JSON") as caught:
        load_cases(path)
    assert caught.value.line == 3
    cases = load_cases(path, skip_malformed=True)
    assert [case.line for case in cases] == [2, 4, 6]
    assert [skip.line for skip in cases.malformed] == [3, 5]


def test_a_cut_off_file_is_noticed(tmp_path):
    path = write(tmp_path, [rome_row(0), rome_row(1)])
    text = path.read_text("utf-8")
    path.write_text(text[: text.rindex("]")], "utf-8")
    with pytest.raises(DataError, match="cut off"):
        load_cases(path)
    path.write_text(text[: len(text) // 2 + 40], "utf-8")
    with pytest.raises(DataError, match=r"not JSON|cut off") as caught:
        load_cases(path)
    assert caught.value.line == 3


def test_a_missing_comma_is_noticed(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[\n{json.dumps(rome_row(0))}\n{json.dumps(rome_row(1))}\n]", "utf-8")
    with pytest.raises(DataError, match="comma") as caught:
        load_cases(path)
    assert caught.value.line == 3


def test_records_over_several_lines_keep_their_first_line(tmp_path):
    path = tmp_path / "pretty.json"
    path.write_text(json.dumps([rome_row(0), rome_row(1)], indent=2), "utf-8")
    first, second = load_cases(path)
    lines = path.read_text("utf-8").split("\n")
    assert lines[first.line - 1] == lines[second.line - 1] == "  {"
    assert second.line > first.line + 5


def test_json_lines_with_blank_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{json.dumps(rome_row(0))}\n\n{json.dumps(rome_row(1))}\n{{bad\n", "utf-8")
    with pytest.raises(DataError) as caught:
        load_cases(path)
    assert caught.value.line == 5
    assert [case.line for case in load_cases(path, skip_malformed=True)] == [2, 4]
    # The same content under a name that does not say so.
    other = tmp_path / "rows.txt"
    other.write_text(path.read_text("utf-8"), "utf-8")
    assert [case.line for case in load_cases(other, skip_malformed=True)] == [2, 4]


@pytest.mark.parametrize("text", ["", "  \n", "[]", "[\n]\n", "{}", "null", '"text"', "hello"])
def test_files_without_records_are_refused(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, "utf-8")
    with pytest.raises(DataError) as caught:
        load_cases(path)
    assert caught.value.file == str(path)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(DataError, match="UTF-8"):
        load_cases(path)


def test_absent_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_cases(tmp_path / "nothing.json")
    write(tmp_path, [rome_row(0)])
    with pytest.raises(DataError, match=r"is a folder.*rows\.json"):
        load_cases(tmp_path)


def test_a_hub_id_without_a_connection_says_what_to_do():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match="--data"):
        load_cases("nobody/knowlab-test-that-does-not-exist")


def test_a_file_of_another_suite_is_named(tmp_path):
    with pytest.raises(DataError, match="'zsre', not 'counterfact'"):
        load_cases(SAMPLES / "zsre/zsre.json", suite="counterfact")
    path = write(tmp_path, [{"who": 1, "what": 2}])
    with pytest.raises(DataError, match="who, what"):
        load_cases(path)


def test_repeated_case_numbers_stay_apart(tmp_path):
    cases = load_cases(write(tmp_path, [rome_row(7), rome_row(7), rome_row(8)]))
    assert [case.id for case in cases] == ["counterfact/7@2", "counterfact/7@3", "counterfact/8"]


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    path = write(tmp_path, [{"requested_rewrite": {}, "paraphrase_prompts": []}])
    with pytest.raises(DataError, match="not one of its 1 records"):
        load_cases(path, skip_malformed=True)


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "subject", "found"),
    [
        ("The tide at Pier One is", "Pier One", "Pier One"),
        ("The tide at Pier\u00a0One is", "Pier One", "Pier\u00a0One"),
        ("The tide at Pier\nOne is", "Pier One", "Pier\nOne"),
        ("pier one, the old Pier One,", "Pier One", "Pier One"),
        ("The tide at pier one is", "Pier One", "pier one"),
        ("Your home Ur lies in", "Ur", "Ur"),
        ("What is the name of Prince Odo of Tarn?", "Prince Odo, Duke of Tarn", "Prince Odo"),
        ("Who wrote Larkmere?", "Larkmere (novel)", "Larkmere"),
        ("Anna met Anna", "Anna", "Anna"),
    ],
)
def test_subjects_are_located(text, subject, found):
    place = locate_subject(text, subject)
    assert place is not None
    assert text[slice(*place)] == found
    prompt, spelled = template_of(text, subject) or ("", "")
    assert prompt.replace("{}", spelled) == text


def test_the_last_occurrence_is_taken():
    assert template_of("Anna met Anna", "Anna") == ("Anna met {}", "Anna")


@pytest.mark.parametrize(
    ("text", "subject"), [("By which company was OF 9 built?", "Old Ferry Nine"), ("x", ""), ("a {} b", "b")]
)
def test_subjects_that_are_not_there(text, subject):
    assert template_of(text, subject) is None


@given(st.text(min_size=1, max_size=12).filter(str.strip), st.text(max_size=20), st.text(max_size=20))
def test_a_template_always_gives_the_text_back(subject, left, right):
    text = f"{left} {subject} {right}"
    made = template_of(text, subject)
    if "{}" in text:
        assert made is None
    else:
        assert made is not None
        assert made[0].replace("{}", made[1]) == text


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("U.K.", "uk"),
        ("The  Bell Tower", "bell tower"),
        ("\uff21da", "Ada"),
        ("Washington, D.C.", "washington dc"),
    ],
)
def test_answers_fold(left, right):
    assert normalize_answer(left) == normalize_answer(right)


def test_answers_of_signs_only_stay_different():
    assert normalize_answer("***") != normalize_answer("!!!")
    assert normalize_answer("The") == "The"


@given(st.lists(st.sampled_from(["Ada", "the", "Bell", "U.K.", "d'Or", "7"]), min_size=1, max_size=4))
def test_folding_twice_changes_nothing_more(parts):
    once = normalize_answer(" ".join(parts))
    assert normalize_answer(once) == once or once.casefold() in ("the", "a", "an")


# ---- the published files, where they are at hand ---------------------------------------------------------------------

PUBLISHED = [
    ("counterfact/counterfact_rome_sample.json", "counterfact", 1685, 0),
    ("counterfact/counterfact-edit.json", "counterfact", 5153, 0),
    ("counterfact/counterfact_qna.json", "counterfact", 931, 0),
    ("counterfact/merged_counterfact.json", "sadr", 948, 0),
    ("zsre/zsre_mend_eval_portability_gpt4.json", "zsre", 774, 0),
    ("zsre/zsre_mend_train-1k.json", "zsre", 920, 2),
    ("zsre/qaedit_inter_1k.json", "zsre", 874, 0),
    ("knowedit/ZsRE-test-all.json", "knowedit", 1031, 1),
    ("knowedit/wiki_counterfact_train_cf.json", "knowedit", 1345, 0),
    ("knowedit/wiki_counterfact_test_easyedit_requests.json", "knowedit", 682, 0),
    ("knowedit/wiki_recent_recent_train.json", "knowedit", 510, 0),
    ("knowedit/wikibio-test-all.json", "knowedit", 254, 0),
    ("knowedit/wikibio-train-all.json", "knowedit", 414, 0),
    ("knowedit/convsent_blender_test.json", "knowedit", 357, 0),
    ("knowedit/sanitation_trivia_qa_train.json", "knowedit", 5, 0),
    ("knowedit/sanitation_trivia_qa_test.json", "knowedit", 5, 0),
    ("mquake/MQuAKE-hard.json", "mquake", 329, 0),
    ("mquake/AKEW-MQuAKE-CF.json", "mquake", 274, 0),
]


@pytest.mark.parametrize(("name", "suite", "count", "unsupported"), PUBLISHED)
def test_published_files_are_read_whole(shared_data, name, suite, count, unsupported):
    cases = load_cases(shared_data / name, suite=suite)
    assert len(cases) == count
    assert sum(bool(case.unsupported) for case in cases) == unsupported
    rows = {row.line: row.value for row in read_rows(shared_data / name)}
    for case in cases.cases[:50]:
        if case.file == str(shared_data / name):
            assert case.line in rows


def test_published_files_that_ask_for_no_edits(shared_data):
    with pytest.raises(DataError, match="causal tracing"):
        load_cases(shared_data / "counterfact/known_1000.json")
    with pytest.raises(DataError, match="no form"):
        load_cases(shared_data / "mquake/pokemqa_cls-filtered.json")


def test_published_answers_arrive(shared_data):
    """Spot checks against the files' own records, by line."""
    name = shared_data / "counterfact/counterfact_rome_sample.json"
    lines = name.read_text("utf-8").split("\n")
    for case in load_cases(name).cases[::97]:
        record = json.loads(lines[case.line - 1].rstrip(","))
        assert case.requests[0].target_new == record["requested_rewrite"]["target_new"]["str"]
        assert [p.prompt for p in case.of("neighborhood")] == record["neighborhood_prompts"]
        assert case.requests[0].text == record["requested_rewrite"]["prompt"].replace(
            "{}", record["requested_rewrite"]["subject"]
        )
    name = shared_data / "knowedit/wiki_recent_recent_train.json"
    lines = name.read_text("utf-8").split("\n")
    for case in load_cases(name).cases[::31]:
        record = json.loads(lines[case.line - 1].rstrip(","))
        wanted = [
            g for group in record["locality"].values() for item in group for g in [item["ground_truth"]]
        ]
        leaves = [
            [leaf for part in truth for leaf in (part if isinstance(part, list) else [part])]
            for truth in wanted
        ]
        got = [list(p.answers) for p in case.of("locality")]
        assert [sorted(set(filter(None, map(str.strip, answers)))) for answers in leaves if any(answers)] == [
            sorted(a) for a in got
        ]
