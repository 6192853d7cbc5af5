"""Time of an audit over the number of facts, attack by attack.

    python tests/benchmarks/audit_growth.py --json results/audit_growth.json [--facts 25,50,100,200] [--attacks a,b] [--quick]

``atlas``, which forgot nothing, against ``atlas-oracle``, facts of ``atlas:people10``, one thread. Processor seconds; ``slope`` is
the exponent between the smallest and the largest number of facts: 1 is linear. At the small budget some attacks (suffix, sampling,
relearning) draw so many facts at most, so that they cost the same from there on. Attacks that do not apply to a model without a
patch are left out. Writes a table (``.md``) and a plot (``.png``) beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.audit.base import AuditSubject, Controls
from lab.audit.material import gather
from lab.audit.run import attack_list, plain_scores, run_attack
from lab.handle import ModelHandle
from lab.records import write_text_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def measure(names: Sequence[str], counts: Sequence[int], budget: Any, split: str) -> list[dict[str, Any]]:
    """One row per attack that applies: processor seconds by the number of facts."""
    handle, oracle = ModelHandle.load("atlas"), ModelHandle.load("atlas-oracle")
    seconds: dict[str, dict[int, float]] = {}
    for count in sorted(counts):
        material = gather(split, limit=count)
        subject = AuditSubject(
            handle,
            material.facts,
            Controls(oracle=oracle, never=material.never[:count]),
            retained=material.retained,
            format=material.format,
            budget=budget,
        )
        subject = replace(subject, controls=replace(subject.controls, original=plain_scores(subject).facts))
        for name in names:
            begin = time.process_time()
            result = run_attack(name, subject, lambda _phase, _done, _total: None)
            spent = time.process_time() - begin
            print(f"{len(material.facts)} facts, {name}: {spent:.1f} s", file=sys.stderr, flush=True)
            if result.applicable:
                seconds.setdefault(name, {})[len(material.facts)] = spent
    return [{"attack": name, "cpu_seconds": by, "slope": slope(by)} for name, by in seconds.items()]


def slope(by: Mapping[int, float]) -> float | None:
    """Exponent between the smallest and the largest number."""
    low, high = min(by), max(by)
    return None if low == high else math.log(by[high] / by[low]) / math.log(high / low)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, a column per number of facts, the sum of all attacks in the last row."""
    counts = sorted({count for row in rows for count in row["cpu_seconds"]})
    lines = [
        "| attack | " + " | ".join(f"{count} facts" for count in counts) + " | slope |",
        "| --- |" + " --- |" * (len(counts) + 1),
    ]
    sums = {count: math.fsum(row["cpu_seconds"].get(count, 0.0) for row in rows) for count in counts}
    for name, by, exponent in [
        *((row["attack"], row["cpu_seconds"], row["slope"]) for row in rows),
        ("all", sums, slope(sums)),
    ]:
        cells = [f"{by[count]:.1f}" if count in by else "–" for count in counts]
        lines.append(
            f"| {name} | " + " | ".join(cells) + f" | {'–' if exponent is None else f'{exponent:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds over the number of facts, both on logarithmic scales."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        axes.plot(*zip(*sorted(row["cpu_seconds"].items()), strict=True), marker="o", label=row["attack"])
    axes.set(xscale="log", yscale="log", xlabel="facts", ylabel="processor seconds")
    figure.legend(loc="outside right", frameon=False, fontsize="small")
    return figure


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--facts", help="numbers of facts; 25,50,100,200 without")
    parser.add_argument("--attacks", default="all", help="names with commas between")
    parser.add_argument("--split", default="atlas:people10", help="where the facts come from")
    parser.add_argument("--budget", default="small", choices=("small", "full"))
    parser.add_argument("--quick", action="store_true", help="8 and 16 facts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    counts = [
        int(word) for word in (options.facts or ("8,16" if options.quick else "25,50,100,200")).split(",")
    ]
    rows = measure(attack_list(options.attacks), counts, options.budget, options.split)
    figures = {
        "schema_version": 1,
        "command": "audit_growth",
        "seed": 0,
        "budget": options.budget,
        "rows": rows,
        "quick": options.quick,
        "torch": torch.__version__,
    }
    print(markdown(rows))
    if options.json:
        write_text_atomically(options.json, json.dumps(figures, indent=2) + "\n")
        write_text_atomically(options.json.with_suffix(".md"), markdown(rows))
        plot(rows).savefig(options.json.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
