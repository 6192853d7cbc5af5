"""Chain-of-Note beside the direct reader, with documents that are all about somebody else.

python examples/notes_against_noise.py --questions 20
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lab import ModelHandle
from lab.atlas.world import load_world
from rag.evaluation import Cell, atlas_questions, closed_book, figures, run_cell
from rag.readers import READERS


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    handle = ModelHandle.load(options.model)
    asked = atlas_questions(load_world(), options.questions, options.seed)["irrelevant"]
    memory = closed_book(handle, asked, 24)
    for reader in ("direct", "con"):
        rows = run_cell(handle, Cell("irrelevant", reader, "greedy"), asked, memory)
        found = figures("irrelevant", rows)
        for name in ("accuracy", "robustness"):
            figure = found[name]
            if figure.mean is not None:
                print(
                    f"{reader} {name}: {figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}] of {figure.n}"
                )
    readings = READERS.get("con")(handle).read_many([(one.question, one.passages) for one in asked])
    for one, reading in zip(asked, readings, strict=True):
        print(f"{one.question}\n  document: {one.passages[0].text}")
        for note in reading.notes:
            print(f"  note ({note.kind}): {note.text}")
        print(f"  answer: {reading.answer} (right: {one.answers[0]})")


if __name__ == "__main__":
    main()
