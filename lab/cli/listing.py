"""``knowlab list`` and ``knowlab data``: what there is by name, and whether a file is what it says."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import DataError
from lab.registry import Registry

app = typer.Typer()
data = typer.Typer(
    help="Data files: the forms that suites read, and whether a file is well formed.", no_args_is_help=True
)
app.add_typer(data, name="data")

# A floor above offers its registry under this entry-point group, so that listing it needs no import from here.
REGISTRY_GROUP = "knowlab.registries"


class Kind(StrEnum):
    """What can be listed."""

    EDITORS = "editors"
    UNLEARNERS = "unlearners"
    ATTACKS = "attacks"
    SUITES = "suites"
    READERS = "readers"
    DECODERS = "decoders"
    MODELS = "models"


def registry(kind: Kind) -> Registry[Any]:
    """The registry of a kind; empty but open to entry points where no floor offers one."""
    for point in entry_points(group=REGISTRY_GROUP, name=kind.value):
        return point.load()
    return Registry(kind.value.removesuffix("s"), {}, group=f"knowlab.{kind.value}")


def describe(kind: Kind, name: str, value: Any) -> dict[str, str]:
    """A registered thing in words: what it is, the paper behind it, what it costs; empty where it does not say.

    Unlearners also say how they work (``family``) and whether their formula was compared with released code (``source``).

    Suites are registered as functions of their options; all others as the thing itself.
    """
    if kind is Kind.SUITES:
        from lab.eval.suites import SuiteOptions

        value = value(SuiteOptions())
    words = {key: str(getattr(value, key, "")) for key in ("title", "about", "paper", "cost")}
    row = {
        "name": name,
        "title": words["title"] or words["about"],
        "paper": words["paper"],
        "cost": words["cost"],
    }
    if kind is Kind.UNLEARNERS:
        row |= {"family": str(value.family), "source": str(value.source)}
    return row


def _models() -> list[dict[str, str]]:
    from lab.atlas.weights import MODEL_NAMES, weights_path

    items = []
    for name in MODEL_NAMES:
        folder = weights_path(name)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6 if folder else 0.0
        title = "part of this installation" if folder else "not trained yet: `knowlab atlas train`"
        items.append({"name": name, "title": title, "paper": "", "cost": f"{size:.1f} MB" if folder else ""})
    return items


@app.command("list")
def list_kind(
    kind: Annotated[Kind, typer.Argument(help="What to list.", show_default=False)],
    json: opt.Json = None,
) -> None:
    """Name what there is of a kind, with the paper behind it and what it costs.

    Example: `knowlab list editors`
    """
    if kind is Kind.MODELS:
        items = _models()
    else:
        known = registry(kind)
        items = [describe(kind, name, known.get(name)) for name in known.names()]
    screen = console(json)
    columns = ("name", "title", "paper", "cost")
    if kind is Kind.UNLEARNERS:
        columns = ("name", "family", "source", *columns[1:])
    screen.print(table(kind.value, columns, [[item[key] for key in columns] for item in items]))
    if not items:
        screen.print(f"none; packages add {kind.value} through the entry-point group knowlab.{kind.value}")
    write_json(json, "list", None, {"kind": kind.value, "items": items})


@data.command("list")
def list_forms(json: opt.Json = None) -> None:
    """Name the published file forms that are read: of editing benchmarks, then of unlearning benchmarks.

    Example: `knowlab data list`
    """
    from lab.data import ASKED_FORMATS, FORMATS, HUB

    rows = [
        (form.name, form.suite, form.about, HUB[form.suite].name if form.suite in HUB else None)
        for form in FORMATS
    ]
    rows += [(form.name, form.suite, form.about, None) for form in ASKED_FORMATS]
    console(json).print(table("File forms", ("name", "suite", "about", "hub"), rows))
    items = [dict(zip(("name", "suite", "about", "hub"), row, strict=True)) for row in rows]
    write_json(json, "data list", None, {"items": items})


@data.command()
def check(
    file: Annotated[
        Path, typer.Argument(help="A benchmark file or a file of facts (JSONL).", show_default=False)
    ],
    json: opt.Json = None,
) -> None:
    """Say which form a file has and name every row that breaks it (file and line).

    Exits with an error when a row is broken.

    Example: `knowlab data check counterfact.json`
    """
    from lab.data import detect_asked, load_asked, load_cases, read_rows

    rows = read_rows(file, strings=True)
    sound = next((row for row in rows if not row.error), None)
    if sound is not None and {"subject", "object"} <= set(sound.value):
        form, suite, good, broken = "facts", None, *_check_facts(rows)
    elif detect_asked(rows) is not None:
        asked = load_asked(file, skip_malformed=True)
        broken = [skip.to_json() for skip in asked.malformed]
        form, suite, good = asked.format, asked.suite, asked.rows - len(broken)
    else:
        cases = load_cases(file, skip_malformed=True)
        form, suite, good, broken = (
            cases.format,
            cases.suite,
            len(cases),
            [skip.to_json() for skip in cases.malformed],
        )
    out = console(json)
    out.print(f"{file}: {form}, {good} good rows, {len(broken)} broken")
    if broken:
        out.print(
            table(
                "Broken rows",
                ("file", "line", "reason"),
                [(row["file"], row["line"], row["reason"]) for row in broken],
            )
        )
    content = {"file": file, "form": form, "suite": suite, "rows": good + len(broken), "malformed": broken}
    write_json(json, "data check", None, content)
    if broken:
        raise DataError(f"{len(broken)} of {good + len(broken)} rows break the form {form!r}", file)


def _check_facts(rows: list[Any]) -> tuple[int, list[dict[str, Any]]]:
    from lab.records import Fact

    broken = []
    for row in rows:
        try:
            if row.error:
                raise row.error
            Fact.from_json(row.value, row.file, row.line)
        except DataError as error:
            reason = str(error).removeprefix(f"{row.file}:{row.line}: ")
            broken.append({"file": row.file, "line": row.line, "reason": reason})
    return len(rows) - len(broken), broken
