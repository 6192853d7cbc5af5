"""Time and memory of 10, 100 and 1,000 edits: MEMIT, AlphaEdit, GRACE and WISE.

    python tests/benchmarks/editing_growth.py --json results/editing_growth.json [--edits 10,100] [--quick]

GPT-2 of 124 M parameters with random weights, fp32, facts of the built-in world in its tokenizer. MEMIT, GRACE and WISE take all facts in
one call; AlphaEdit takes batches of 10 in a row, each told of the earlier ones. A search takes ``--steps`` steps, far fewer than in
use: what a step costs does not depend on how many edits there are. Key statistics and all else that is made once per model is made
before the clock starts.

Each run is a process of its own and is kept beside the JSON file. Memory is the peak above the loaded model (Linux only).
``time_slope`` and ``memory_slope`` are the exponents between two numbers of edits: 1 is linear. Writes a table (``.md``) and a plot
(``.png``) beside the JSON file.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoTokenizer

# Run as a file, so the repository's root is not on the path; processes that are spawned come through here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from editors import get_editor
from lab.atlas.weights import weights_path
from lab.eval.atlas import atlas_cases
from lab.handle import ModelHandle
from lab.peak import reset_peak, resident
from lab.records import EditRequest, write_text_atomically
from lab.stats import Corpus, StatsCache
from tests.benchmarks.speed_sides import QUICK, Size, model_of, templates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EDITORS = ("memit", "alphaedit", "grace", "wise")
BATCH = 10


def facts(count: int) -> list[EditRequest]:
    """Different prompts of the built-in world; subjects repeat only where there are no more of them."""
    found: list[EditRequest] = []
    later: list[EditRequest] = []
    subjects: set[str] = set()
    for split in ("test", "dev"):
        for case in atlas_cases(split=split):
            (request,) = case.requests
            (later if request.subject in subjects else found).append(request)
            subjects.add(request.subject)
    return [*found, *later][:count]


def settings(editor: str, size: Size, steps: int, stats: StatsCache) -> dict[str, Any]:
    """Of one editor."""
    if editor == "grace":
        return {"steps": steps}
    if editor == "wise":
        return {"steps": steps, "prefixes": templates([(9, 5)])}
    shared = {
        "layers": size.edited,
        "steps": steps,
        "prefixes": templates([(9, 5)]),
        "stats": stats,
        "corpus": Corpus("atlas", size.tokens),
    }
    if editor == "alphaedit":
        shared |= {"nullspace_threshold": 0.5, "threshold_mode": "relative"}
    return shared


def run(editor: str, edits: int, size: Size, steps: int, folder: Path) -> dict[str, Any]:
    """One editor and number of edits, in this process."""
    torch.set_num_threads(1)
    place = weights_path("atlas")
    if place is None:
        raise SystemExit("the tokenizer of the built-in model is missing from this checkout")
    handle = ModelHandle.wrap(
        model_of("gpt2", size).eval(), AutoTokenizer.from_pretrained(place), name="gpt2-random"
    )
    method = get_editor(editor, **settings(editor, size, steps, StatsCache(folder / "stats")))
    requests = facts(edits)
    # Once per model: statistics, factors, null spaces.
    method.edit(handle, requests[:1])
    gc.collect()
    before = resident("VmRSS") or 0
    counted = reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    if editor == "alphaedit":
        history: list[Any] = []
        applied = []
        for begin in range(0, edits, BATCH):
            history.append(method.edit(handle, requests[begin : begin + BATCH], history=history))
            applied.append(history[-1].apply(handle))
    else:
        method.edit(handle, requests)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = ((resident("VmHWM") or 0) - before) / 1024 if counted else None
    return {"editor": editor, "edits": edits, "seconds": wall, "cpu_seconds": cpu, "peak_mib": peak}


def slopes(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their exponents against the row before of the same editor."""
    found: list[dict[str, Any]] = []
    for row in rows:
        before = next((r for r in reversed(found) if r["editor"] == row["editor"]), None)
        extra: dict[str, float | None] = {"time_slope": None, "memory_slope": None}
        if before is not None:
            span = math.log(row["edits"] / before["edits"])
            for name, key in (("time_slope", "cpu_seconds"), ("memory_slope", "peak_mib")):
                if row[key] and before[key]:
                    extra[name] = math.log(row[key] / before[key]) / span
        found.append({**row, **extra})
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table."""
    heads = ("editor", "edits", "cpu_seconds", "peak_mib", "time_slope", "memory_slope")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [
            "–"
            if row[head] is None
            else f"{row[head]:.3g}"
            if isinstance(row[head], float)
            else str(row[head])
            for head in heads
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds and memory over the number of edits, both on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("cpu_seconds", "peak_mib"),
        ("processor seconds", "peak above the model, MiB"),
        strict=True,
    ):
        for editor in dict.fromkeys(row["editor"] for row in rows):
            points = [(row["edits"], row[key]) for row in rows if row["editor"] == editor and row[key]]
            axes.plot(*zip(*points, strict=True), marker="o", label=editor)
        axes.set(xscale="log", yscale="log", xlabel="edits", ylabel=label)
    figure.axes[0].legend(frameon=False)
    return figure


def measure(
    editors: Sequence[str], counts: Sequence[int], size: Size, steps: int, folder: Path
) -> list[dict[str, Any]]:
    """All rows; finished ones are taken from ``folder``."""
    rows = []
    for editor in editors:
        for edits in sorted(counts):
            cell = folder / f"{editor}-{edits}-{steps}.json"
            if not cell.is_file():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(run, (editor, edits, size, steps, folder))
                write_text_atomically(cell, json.dumps(row, indent=2) + "\n")
                print(json.dumps(row), file=sys.stderr, flush=True)
            rows.append(json.loads(cell.read_text()))
    return slopes(rows)


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here; finished runs lie beside it")
    parser.add_argument("--quick", action="store_true", help="a small model, 10 and 20 edits")
    parser.add_argument("--editors", default=",".join(EDITORS), help="some of " + ", ".join(EDITORS))
    parser.add_argument("--edits", help="numbers of edits; 10,100,1000 without")
    parser.add_argument("--steps", type=int, default=2, help="steps of a search")
    options = parser.parse_args()
    counts = [
        int(word) for word in (options.edits or ("10,20" if options.quick else "10,100,1000")).split(",")
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.json is None else options.json.with_suffix("")
        size = QUICK if options.quick else Size()
        rows = measure(options.editors.split(","), counts, size, options.steps, folder)
    figures = {
        "schema_version": 1,
        "command": "editing_growth",
        "seed": 0,
        "steps": options.steps,
        "rows": rows,
        "quick": options.quick,
        "torch": torch.__version__,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")
        write_text_atomically(options.json.with_suffix(".md"), markdown(rows))
        plot(rows).savefig(options.json.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
