"""Index a folder of documents and ask it: the answer, the notes, and who says what.

python examples/ask_a_folder.py docs "What is the capital of France?"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lab import ModelHandle
from rag.index import ingest, open_index
from rag.pipeline import RagPipeline


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("question")
    parser.add_argument("--store", default="results/ask_a_folder")
    parser.add_argument("--model", default="atlas")
    options = parser.parse_args(arguments)

    with open_index(options.store, write=True) as index:
        ingest(index, options.folder)
        pipeline = RagPipeline(ModelHandle.load(options.model), index, reader="con", policy="context", k=2)
        answer = pipeline.invoke(options.question)
    print(f"answer: {answer.text}")
    for note in answer.reading.notes if answer.reading else ():
        print(f"note on document {note.document} ({note.kind}): {note.text}")
    if answer.verdict:
        memory = answer.verdict.memory.answer
        print(f"memory: {memory}; winner: {answer.verdict.winner} ({answer.verdict.agreement})")


if __name__ == "__main__":
    main()
