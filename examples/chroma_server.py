"""The same pipeline over a Chroma server, which several programs may share.

chroma run --path results/chroma --port 8000 &
python examples/chroma_server.py docs "What is the capital of France?" --server http://127.0.0.1:8000
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
    parser.add_argument("--server", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="atlas")
    options = parser.parse_args(arguments)

    with open_index(options.server, write=True) as index:
        done = ingest(index, options.folder)
        print(f"{done.added} chunks added, {done.unchanged} unchanged, on {options.server}")
    with open_index(options.server) as index:
        answer = RagPipeline(ModelHandle.load(options.model), index, k=2).invoke(options.question)
    print(f"read: {', '.join(passage.source for passage in answer.passages)}")
    print(f"answer: {answer.text}")


if __name__ == "__main__":
    main()
