"""Compare editors on a KnowEdit file (ZsRE, wiki_counterfact, wiki_recent, WikiBio, ConvSent or Sanitation).

    python examples/knowedit_benchmark.py --data ZsRE-test-all.json --model path/to/model --editor rome --editor rome+sadr --limit 50

The file is read as it was published. Every editor sees the same cases; the unedited model is asked once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from editors import get_editor
from lab import ModelHandle
from lab.data import load_cases
from lab.eval import BaselineCache, Report, SuiteOptions, evaluate_editing, get_suite, save_reports


def main(arguments: Sequence[str] | None = None) -> list[Report]:
    """Runs the example and returns one report per editor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a KnowEdit file, or a hub id")
    parser.add_argument("--model", default="atlas")
    parser.add_argument(
        "--editor", action="append", default=None, help="repeatable; rome and rome+sadr without it"
    )
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--no-fluency", action="store_true", help="generate no texts, which takes most of the time"
    )
    parser.add_argument("--out", type=Path, default=Path("results/knowedit"))
    options = parser.parse_args(arguments)

    handle = ModelHandle.load(options.model)
    suite = get_suite("knowedit", SuiteOptions(fluency=not options.no_fluency))
    cases = load_cases(options.data, suite="knowedit")
    cache = BaselineCache()
    reports = []
    for spec in options.editor or ("rome", "rome+sadr"):
        editor = get_editor(spec, seed=options.seed)
        reports.append(
            evaluate_editing(
                suite, handle, editor, cases, limit=options.limit, seed=options.seed, name=spec, cache=cache
            )
        )
        print(reports[-1].to_markdown())
    for form in ("json", "md", "html"):
        save_reports(reports, options.out / f"report.{form}")
    print(f"reports -> {options.out}")
    return reports


if __name__ == "__main__":
    main()
