"""From a path or hub id to the cases of a suite: which file is it, and who reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.data.building import ReadOptions
from lab.data.cases import CaseSet, EditCase, Skip
from lab.data.counterfact import read_flat, read_questions, read_rome, read_sadr
from lab.data.knowedit import check_sanitation, read_biography, read_fact, read_opinion, read_sanitation
from lab.data.mquake import read_mquake
from lab.data.source import HubSource, Row, read_rows
from lab.data.zsre import read_mend, read_qaedit
from lab.errors import DataError

RowReader = Callable[[Row, Sequence[Row], ReadOptions], EditCase]


@dataclass(frozen=True)
class DataFormat:
    """One published file form.

    Attributes:
        name: Its name in messages and case ids.
        suite: The suite that evaluates it.
        matches: Whether a record looks like one of its own.
        reader: Parses one record; ``None`` for Sanitation, which is read as a whole.
        about: One line for listings.
    """

    name: str
    suite: str
    matches: Callable[[Row], bool]
    reader: RowReader | None
    about: str


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row.value for key in keys)


def _rewrite(row: Row) -> Any:
    return row.value.get("requested_rewrite")


def _rewrite_has(row: Row, *keys: str) -> bool:
    found = _rewrite(row)
    return isinstance(found, dict) and any(key in found for key in keys)


# Order matters: the first form that fits names the file, so the more particular ones stand first.
FORMATS: tuple[DataFormat, ...] = (
    DataFormat(
        "mquake",
        "mquake",
        lambda row: isinstance(_rewrite(row), list),
        read_mquake,
        "MQuAKE-CF, -T and subsets",
    ),
    DataFormat(
        "sadr",
        "sadr",
        lambda row: isinstance(_rewrite(row), dict) and "rewrite" in row.value,
        read_sadr,
        "SADR's merged CounterFact",
    ),
    DataFormat(
        "knowedit_requests",
        "knowedit",
        lambda row: _rewrite_has(row, "portability", "locality"),
        read_fact,
        "wiki_counterfact as EasyEdit's results hold it",
    ),
    DataFormat(
        "counterfact",
        "counterfact",
        lambda row: (
            isinstance(_rewrite(row), dict)
            and ("paraphrase_prompts" in row.value or "neighborhood_prompts" in row.value)
        ),
        read_rome,
        "CounterFact, the original schema",
    ),
    DataFormat(
        "counterfact_flat",
        "counterfact",
        _has("prompt", "target_new", "locality_prompt"),
        read_flat,
        "CounterFact, EasyEdit's flat schema",
    ),
    DataFormat(
        "counterfact_questions",
        "counterfact",
        _has("qna_question", "answer"),
        read_questions,
        "CounterFact as questions",
    ),
    DataFormat(
        "zsre", "zsre", _has("src", "alt"), read_mend, "zsRE, MEND's schema (train, eval, with portability)"
    ),
    DataFormat("qaedit", "zsre", _has("prompt", "target", "rephrase", "locality"), read_qaedit, "QAEdit"),
    DataFormat(
        "knowedit_wikibio", "knowedit", _has("text", "labels", "concept"), read_biography, "KnowEdit: WikiBio"
    ),
    DataFormat(
        "knowedit_convsent", "knowedit", _has("ent", "pos", "neg"), read_opinion, "KnowEdit: ConvSent"
    ),
    DataFormat(
        "knowedit_sanitation",
        "knowedit",
        lambda row: row.section in ("K_F", "K_R", "success", "locality"),
        None,
        "KnowEdit: Sanitation (train and test halves)",
    ),
    DataFormat(
        "knowedit_fact",
        "knowedit",
        lambda row: (
            _has("subject", "prompt", "target_new")(row)
            and ("locality" in row.value or "portability" in row.value)
        ),
        read_fact,
        "KnowEdit: ZsRE, wiki_counterfact, wiki_recent",
    ),
)

# Where the suites live for those with a connection; the data sets of zsRE and MQuAKE have no official place there.
HUB: dict[str, HubSource] = {
    "counterfact": HubSource("azhx/counterfact"),
    "knowedit": HubSource("zjunlp/KnowEdit", "benchmark/ZsRE/ZsRE-test-all.json"),
}


def detect_format(rows: Sequence[Row]) -> DataFormat:
    """Says which published form the rows have, by the fields of the first row that fits any.

    Raises:
        DataError: None fits.
    """
    if all(row.error for row in rows) and rows[0].error:
        raise rows[0].error
    for row in rows:
        for form in FORMATS:
            if not row.error and form.matches(row):
                return form
    shown = next(row for row in rows if not row.error)
    if "attribute" in shown.value and "template" in shown.value:
        raise DataError("is a list of known facts for causal tracing; it asks for no edits", shown.file)
    raise DataError(
        f"is no form that a suite knows; its records have the fields {', '.join(list(shown.value)[:8]) or 'none'}",
        shown.file,
        shown.line,
    )


def load_cases(
    source: str | Path | HubSource,
    *,
    suite: str | None = None,
    skip_malformed: bool = False,
    options: ReadOptions | None = None,
) -> CaseSet:
    """Reads and parses a benchmark file once.

    Args:
        source: A path, a hub id, or a ``HubSource``.
        suite: The suite that it must belong to; any without it.
        skip_malformed: Collects rows that break the schema instead of raising.
        options: Choices that the file leaves open.

    Raises:
        DataError: The source cannot be read, belongs to another suite, or a row breaks the schema (file and line).
    """
    rows = read_rows(source)
    form = detect_format(rows)
    if suite is not None and form.suite != suite:
        raise DataError(
            f"holds {form.about} ({form.name}), which belongs to the suite {form.suite!r}, not {suite!r}",
            rows[0].file,
        )
    options = options or ReadOptions()
    broken: list[Skip] = []

    def take(error: DataError, row: Row) -> None:
        if not skip_malformed:
            raise error
        broken.append(Skip(row.file, row.line, str(error).removeprefix(f"{row.file}:{row.line}: ")))

    if form.reader is None:
        rows = _both_halves(rows)
    good = []
    for row in rows:
        try:
            if row.error:
                raise row.error
            if form.reader is None:
                check_sanitation(row)
            good.append(row)
        except DataError as error:
            take(error, row)
    if form.reader is None:
        cases = read_sanitation(good, options)
    else:
        cases = []
        for row in good:
            try:
                cases.append(form.reader(row, good, options))
            except DataError as error:
                take(error, row)
    if not cases:
        raise DataError(
            f"not one of its {len(rows)} records can be read; the first error: {broken[0].reason}",
            rows[0].file,
        )
    return CaseSet(form.suite, form.name, str(source), tuple(_unique(cases)), tuple(broken))


def _both_halves(rows: list[Row]) -> list[Row]:
    """Adds the other half of Sanitation, where it lies beside this one."""
    path = Path(rows[0].file)
    here, there = ("train", "test") if any(row.section == "K_F" for row in rows) else ("test", "train")
    other = path.with_name(path.name.replace(here, there))
    return rows + read_rows(other) if other != path and other.is_file() else rows


def _unique(cases: list[EditCase]) -> list[EditCase]:
    """Gives repeated ids the line number: results are kept by id, and some files repeat a case number."""
    repeated = {name for name, count in Counter(case.id for case in cases).items() if count > 1}
    return [replace(case, id=f"{case.id}@{case.line}") if case.id in repeated else case for case in cases]
