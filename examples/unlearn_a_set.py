"""Make a model forget a set of facts with several methods, and compare them where they forget as much as the reference.

python examples/unlearn_a_set.py
python examples/unlearn_a_set.py --forget atlas:people01 --methods npo,graddiff,simnpo --limit 40
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from editors.unlearning.bench import UnlearnBenchOptions, UnlearnWorkshop, plan_unlearning
from editors.unlearning.bench_report import UnlearnComparison, markdown, page
from lab.records import write_text_atomically


def main(arguments: Sequence[str] | None = None) -> UnlearnComparison:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--forget", default="atlas:people01", help="atlas:SPLIT or a file of facts")
    parser.add_argument("--retain", help="a file of facts, where --forget is one")
    parser.add_argument(
        "--untrained", help="a file of facts that the model never saw, where --forget is a file"
    )
    parser.add_argument("--methods", default="graddiff,npo")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--limit", type=int, default=30, help="facts asked per group")
    parser.add_argument("--out", type=Path, default=Path("results/unlearn_a_set"))
    options = parser.parse_args(arguments)

    workshop = UnlearnWorkshop(
        UnlearnBenchOptions(
            forget=options.forget,
            model=options.model,
            retain=options.retain,
            untrained=options.untrained,
            limit=options.limit,
            settings={"": {"epochs": options.epochs}},
        )
    )
    rows = []
    for cell in plan_unlearning(options.methods.split(","), [0]):
        row = workshop.run(cell)
        reached = (
            f"matched at dose {row['dose']:.2f}" if row["matched"] else f"not matched, gap {row['gap']:.2f}"
        )
        print(f"{cell.method}: {reached}, worst form {row['worst_form']}")
        rows.append(row)
    found = UnlearnComparison.of(rows, f"Unlearning {options.forget} from {options.model}")
    print(markdown(found))
    write_text_atomically(options.out / "unlearning.html", page(found))
    print(f"curves -> {options.out / 'unlearning.html'}")
    return found


if __name__ == "__main__":
    main()
