"""``knowlab rag eval``: readers and decoding rules between memory and documents, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import check_out, console, document, progress, table, write_json
from lab.errors import ConfigError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from rag.evaluation import Asked
    from rag.questions import FileQuestion

app = typer.Typer()

PANEL = "Evaluation"
COMMAND = "rag eval"
CELLS = "cells"
FILE_CONDITIONS = ("none", "retrieved")

_HELP = """Measure how readers and decoding rules choose between memory and documents, to one table with 95 % intervals.

Without --data, facts of the built-in world are asked with a document that agrees, contradicts, is irrelevant, with none, and with
several that contradict; noisy (three documents about others) and unanswerable (a name that nobody has) are asked where
--conditions names them. With --data, the questions of a published file (RGB, ConflictQA, RealTimeQA, PopQA, NQ, CoConflictQA,
NQ-Synth) are asked without documents and with what retrieval finds among all documents of the file and of --documents. Writes eval.json
and eval.html into --out; finished cells are kept in --out/cells, and the same command goes on where it was interrupted.

Examples:

    knowlab rag eval --limit 20 --readers direct,con --decodings greedy,cad --out results/rag

    knowlab rag eval --dial --conditions contradict --readers direct --decodings greedy --limit 20 --out results/dial

    knowlab rag eval --data rgb/en_fact.jsonl --limit 20 --readers direct --decodings greedy --out results/rgb

    knowlab rag eval --data popqa.jsonl --documents articles --limit 20 --readers direct,con --decodings greedy
"""


@app.command("eval", help=_HELP)
def evaluate(
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="A published file of questions.",
            rich_help_panel=PANEL,
            show_default="the built-in world",
        ),
    ] = None,
    readers: Annotated[
        str | None,
        typer.Option(
            "--readers", help="Readers with commas between them.", rich_help_panel=PANEL, show_default="all"
        ),
    ] = None,
    decodings: Annotated[
        str | None,
        typer.Option(
            "--decodings",
            help="Decoding rules with commas between them; a setting follows its rule: cad:alpha=0.5.",
            rich_help_panel=PANEL,
            show_default="all",
        ),
    ] = None,
    conditions: Annotated[
        str | None,
        typer.Option(
            "--conditions",
            help="agree, contradict, irrelevant, none, several, noisy, unanswerable; with --data none, retrieved.",
            rich_help_panel=PANEL,
            show_default="the first five",
        ),
    ] = None,
    dial: Annotated[
        bool,
        typer.Option("--dial", help="Also turn the dial of ck_plug from 0 to 1.", rich_help_panel=PANEL),
    ] = False,
    documents: Annotated[
        list[Path] | None,
        typer.Option(
            "--documents",
            help="With --data: a folder, a file of questions or of search results whose documents are looked through too; repeatable.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    k: Annotated[
        int, typer.Option("--k", min=1, help="With --data: chunks that are read.", rich_help_panel=PANEL)
    ] = 3,
    embeddings: Annotated[
        str,
        typer.Option(
            "--embeddings",
            help="With --data: minilm, a folder or a sentence-transformers id.",
            rich_help_panel=PANEL,
        ),
    ] = "minilm",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=opt.RUN_PANEL)
    ] = 24,
    limit: opt.Limit = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Folder for the reports and the finished cells.",
            rich_help_panel=opt.OUTPUT_PANEL,
        ),
    ] = Path("results/rag-eval"),
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Measure readers and decoding rules."""
    import json as jsonlib

    from lab.cli.session import open_model
    from lab.eval.scorers import exact_match
    from lab.records import write_text_atomically
    from rag import evaluation, evaluation_report
    from rag.decoding import DECODERS
    from rag.questions import documents_of, read_documents, read_questions, says
    from rag.readers import READERS
    from rag.retrieval import pool_name

    if not (out / CELLS).is_dir():
        check_out(out, force)
    if data is not None and dial:
        raise ConfigError("--dial needs documents that contradict, which only the built-in world has here")
    if data is None and documents:
        raise ConfigError("--documents needs --data: questions about the built-in world come with their own")
    known = evaluation.CONDITIONS if data is None else FILE_CONDITIONS
    asked_conditions = opt.comma_list(conditions) if conditions is not None else list(known)
    evaluation.check_conditions(asked_conditions, (*known, *evaluation.FURTHER) if data is None else known)
    chosen = opt.comma_list(readers) if readers is not None else list(READERS.names())
    rules = split_rules(decodings) if decodings is not None else list(DECODERS.names())
    cells = evaluation.plan(asked_conditions, chosen, rules)
    dialled = evaluation.dial_cells(chosen) if dial else []
    form, asked_of = ("atlas", None) if data is None else read_questions(data)
    texts = [
        *(documents_of(asked_of) if asked_of else ()),
        *(text for one in documents or () for text in read_documents(one)),
    ]
    pool = list(dict.fromkeys(texts))
    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    retrieval: dict[str, Any] = {}
    with progress() as advance:
        if asked_of is None:
            questions = _of_the_world(limit, seed)
        else:
            questions, retrieval = _of_a_file(
                handle, asked_of, pool, limit, seed, out / "index", embeddings, k, max_new_tokens, advance
            )
        settings = {
            "source": form
            if data is None
            else [form, str(data.resolve()), data.stat().st_size, embeddings, k, pool_name(pool)],
            "limit": limit,
            "seed": seed,
            "model": handle.fingerprint,
            "patches": [entry.patch.id for entry in handle.applied],
            "held": [dtype, quantize],
            "max_new_tokens": max_new_tokens,
        }
        keeper = evaluation.Keeper(out / CELLS, settings)
        kept = sum(keeper.read(cell) is not None for cell in {*cells, *dialled})
        every = evaluation.run(
            handle,
            list(dict.fromkeys([*cells, *dialled])),
            questions,
            keeper,
            max_new_tokens=max_new_tokens,
            match=exact_match if data is None else says,
            progress=advance,
        )
    found = {cell: every[cell] for cell in cells}
    turned = evaluation_report.curves({cell: every[cell] for cell in dialled}) if dial else {}
    screen = console(json)
    screen.print(table("Memory and documents", evaluation_report.HEADS, evaluation_report.lines(found)))
    extra: dict[str, list[list[str]]] = {}
    gained = evaluation_report.gains(found)
    if gained:
        heads = ["condition", "reader", "decoding", "gain in accuracy"]
        rows = [[one["condition"], one["reader"], one["decoding"], _points(one["gain"])] for one in gained]
        screen.print(table("Gain over the reader direct", heads, rows))
        extra["Gain over the reader direct"] = [heads, *rows]
    if retrieval:
        from lab.eval.render import cell as shown

        heads = ["metric", "figure", "n"]
        rows = [[name, shown(name, value), str(value.n)] for name, value in retrieval["figures"].items()]
        screen.print(table("Retrieval", heads, rows))
        extra["Retrieval"] = [heads, *rows]
        retrieval["figures"] = {name: value.to_json() for name, value in retrieval["figures"].items()}
    for reader, curve in turned.items():
        rows = [
            (point["dial"], point["memory"]["mean"], point["adherence"]["mean"], point["ratio"])
            for point in curve["points"]
        ]
        heads = ("dial", "memory", "document", "memory of both")
        screen.print(table(f"The dial of ck_plug, {reader}", heads, rows))
        steady = curve["memory_never_falls"] and curve["ratio_never_falls"]
        screen.print(
            "Memory never loses over the dial." if steady else "Memory loses over a part of the dial."
        )
    content = {
        "model": model,
        "data": data,
        "format": form,
        "limit": limit,
        "cells": evaluation_report.to_json(found),
        "gains": gained,
        "dial": turned,
        "retrieval": retrieval,
        "kept": kept,
        "out": out,
    }
    title = f"Memory and documents: {model} on {form if data is None else data.name}"
    write_text_atomically(out / "eval.html", evaluation_report.page(title, found, turned, extra))
    text = jsonlib.dumps(document(COMMAND, seed, content), ensure_ascii=False, indent=2, allow_nan=False)
    write_text_atomically(out / "eval.json", text + "\n")
    screen.print(f"{len(every)} cells, {kept} of them finished before; reports -> {out}", markup=False)
    write_json(json, COMMAND, seed, content)


def split_rules(written: str) -> list[str]:
    """Rules with commas between them; ``ck_plug:memory=0,top_k=5,cad`` is two, as a setting follows its rule."""
    rules: list[str] = []
    for part in opt.comma_list(written):
        # Of what has an equals sign, only a rule has a colon before it.
        if "=" in part and ":" not in part.partition("=")[0] and rules:
            rules[-1] += f",{part}"
        else:
            rules.append(part)
    return rules


def _points(gain: Mapping[str, Any]) -> str:
    """A gain in points, with its interval."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * gain[key] for key in ("mean", "low", "high")))


def _of_the_world(limit: int | None, seed: int) -> Mapping[str, Sequence[Asked]]:
    from lab.atlas.world import load_world
    from rag.evaluation import atlas_questions

    return atlas_questions(load_world(), limit, seed)


def _of_a_file(
    handle: ModelHandle,
    all_of: Sequence[FileQuestion],
    pool: Sequence[str],
    limit: int | None,
    seed: int,
    place: Path,
    embeddings: str,
    k: int,
    max_new_tokens: int,
    advance: Callable[[str, int, int], None],
) -> tuple[Mapping[str, Sequence[Asked]], dict[str, Any]]:
    """Questions drawn from a file, with what retrieval finds among the documents; and how well it does."""
    import random

    from rag import retrieval
    from rag.index import open_index
    from rag.readers import READERS

    drawn = random.Random(seed).sample(list(all_of), min(limit or len(all_of), len(all_of)))
    if not pool:
        # A file of questions alone has nothing to index.
        return retrieval.as_asked(drawn, [[] for _ in drawn], k, lambda *_: True), {}
    with open_index(place / retrieval.pool_name(pool), embeddings=embeddings, write=True) as index:
        chunks = retrieval.bring_in(index, pool, advance)
        hits = [index.search(one.question, retrieval.DEPTH) for one in drawn]
    fits = retrieval.room_for([READERS.get("direct")(handle, max_new_tokens=max_new_tokens)])
    questions = retrieval.as_asked(drawn, hits, k, fits)
    return questions, {
        "embeddings": embeddings,
        "chunks": chunks,
        "documents_read": retrieval.documents_read(questions["retrieved"]),
        "figures": retrieval.retrieval_figures(drawn, hits),
    }
