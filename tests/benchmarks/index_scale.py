"""Times an index against bare Chroma, with vectors that are there already.

    python tests/benchmarks/index_scale.py --json results/index_scale.json [--sizes 1000,10000,100000] [--quick]
    python tests/benchmarks/index_scale.py --json results/index_minilm.json --end-to-end 5000

Random vectors of MiniLM's width and short texts of random words go into both, in the same batches, one after the other by turns, so
that what else the machine does meets both alike. For each size: chunks a second of both and their ratio, the growth of resident memory
in a process of its own, and milliseconds a question (median and 95th percentile): bare Chroma, the index by vectors alone, and the
index by vectors and words (hybrid, its default).

``ratio`` of 1 says that the index writes as fast as bare Chroma; ``processor_ratio`` says the same of processor time, which a busy
machine changes less.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.records import write_text_atomically
from rag.index import open_index
from rag.store import Chunk, chunk_id

WIDTH = 384
BATCH = 1000
K = 5


class Prepared:
    """Vectors that were made before, so that writing alone is timed; a text begins with its number."""

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors

    def embed_documents(self, texts: list[str]) -> np.ndarray:
        return self._vectors[[_number(text) for text in texts]]

    def embed_query(self, text: str) -> list[float]:
        return self._vectors[_number(text)].tolist()


def _number(text: str) -> int:
    first = text.partition(" ")[0]
    return int(first) if first.isdigit() else 0


def prepare(size: int, seed: int = 0) -> tuple[np.ndarray, list[Chunk]]:
    """Vectors ``[chunk, width]`` of length 1, and as many chunks of twenty words."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((size, WIDTH), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    # Zipf's law, as words have it.
    words = rng.zipf(1.3, (size, 20)) % 20_000
    chunks = []
    for number, row in enumerate(words):
        source = f"docs/{number // 20}.txt"
        text = " ".join((str(number), *(f"w{word}" for word in row)))
        chunks.append(Chunk(chunk_id(source, text), text, source, number % 20))
    return vectors, chunks


def bare(folder: Path) -> Any:
    """A collection of Chroma as one makes it without us."""
    import chromadb
    from chromadb.config import Settings

    client = chromadb.PersistentClient(path=str(folder), settings=Settings(anonymized_telemetry=False))
    return client.create_collection(
        "bare", embedding_function=None, configuration={"hnsw": {"space": "cosine"}}
    )


def add(collection: Any, chunks: list[Chunk], vectors: np.ndarray) -> None:
    """One batch into bare Chroma, with the fields that a chunk has."""
    collection.add(
        ids=[chunk.id for chunk in chunks],
        documents=[chunk.text for chunk in chunks],
        metadatas=[{"source": chunk.source, "position": chunk.position} for chunk in chunks],
        embeddings=vectors,
    )


def milliseconds(ask: Callable[[int], object], questions: list[int]) -> dict[str, float]:
    """Median and 95th percentile; the first question, which loads, is apart."""
    times = []
    for number in questions:
        start = time.perf_counter()
        ask(number)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "first": times[0],
        "median": float(np.median(times[1:])),
        "p95": float(np.percentile(times[1:], 95)),
    }


def one_size(size: int, questions: int) -> dict[str, Any]:
    """Writes ``size`` chunks to both, then asks both."""
    vectors, chunks = prepare(size)
    spent = {"bare": 0.0, "index": 0.0}
    worked = {"bare": 0.0, "index": 0.0}
    with tempfile.TemporaryDirectory() as place:
        collection = bare(Path(place) / "bare")
        with open_index(Path(place) / "index", embeddings=Prepared(vectors), write=True) as index:
            for turn, begin in enumerate(range(0, size, BATCH)):
                rows = slice(begin, begin + BATCH)
                works = [
                    ("bare", lambda rows=rows: add(collection, chunks[rows], vectors[rows])),
                    ("index", lambda rows=rows: index.put(chunks[rows])),
                ]
                for name, work in works if turn % 2 else works[::-1]:
                    start, begun = time.perf_counter(), time.process_time()
                    work()
                    spent[name] += time.perf_counter() - start
                    worked[name] += time.process_time() - begun
            if index.counts()["live"] != size or collection.count() != size:
                raise RuntimeError("not every chunk arrived")
            numbers = np.random.default_rng(1).integers(size, size=questions + 1).tolist()
            texts = [chunk.text for chunk in chunks]
            latency = {
                "bare": milliseconds(
                    lambda number: collection.query(query_embeddings=vectors[number], n_results=K), numbers
                ),
                "dense": milliseconds(lambda number: index.search(texts[number], K, mode="dense"), numbers),
                "hybrid": milliseconds(lambda number: index.search(texts[number], K), numbers),
            }
    return {
        "chunks": size,
        "bare_per_second": size / spent["bare"],
        "index_per_second": size / spent["index"],
        "ratio": spent["bare"] / spent["index"],
        "processor_ratio": worked["bare"] / worked["index"],
        "latency_ms": latency,
    }


def end_to_end(count: int, questions: int) -> dict[str, Any]:
    """A folder of about ``count`` chunks, read, cut, embedded by the offline sentence model and asked; then brought in again."""
    from lab.atlas.forms import load_format
    from lab.atlas.world import load_world
    from rag.index.ingest import ingest

    rng, format = np.random.default_rng(2), load_format()
    sentences = [f"{format.statement(fact)}." for fact in load_world().facts]
    # Twelve sentences fill more than half of a chunk, so that no two paragraphs share one.
    drawn = rng.integers(len(sentences), size=(count, 12)).tolist()
    paragraphs = [" ".join(sentences[at] for at in row) for row in drawn]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "docs"
        folder.mkdir()
        for number in range(0, count, 20):
            text = "\n\n".join(paragraphs[number : number + 20])
            (folder / f"{number:06d}.txt").write_text(text, encoding="utf-8")
        with open_index(Path(place) / "index", write=True) as index:
            index.search(sentences[0], K)
            start = time.perf_counter()
            done = ingest(index, folder)
            took = time.perf_counter() - start
            start = time.perf_counter()
            again = ingest(index, folder)
            took_again = time.perf_counter() - start
            if again.added or again.unchanged != done.added:
                raise RuntimeError("the second time wrote something")
            latency = milliseconds(
                lambda number: index.search(sentences[number], K), list(range(questions + 1))
            )
    return {
        "chunks": done.added,
        "seconds": took,
        "per_second": done.added / took,
        "again_seconds": took_again,
        "resident_mib": _resident(),
        "hybrid_ms": latency,
    }


def peak(which: str, size: int) -> float:
    """MiB by which the resident memory of this process grew while one of the two was filled and asked."""
    vectors, chunks = prepare(size)
    with tempfile.TemporaryDirectory() as place:
        if which == "bare":
            collection = bare(Path(place) / "bare")
            before = _resident()
            for begin in range(0, size, BATCH):
                add(collection, chunks[begin : begin + BATCH], vectors[begin : begin + BATCH])
            collection.query(query_embeddings=vectors[0], n_results=K)
            return _resident() - before
        with open_index(Path(place) / "index", embeddings=Prepared(vectors), write=True) as index:
            before = _resident()
            for begin in range(0, size, BATCH):
                index.put(chunks[begin : begin + BATCH])
            index.search(chunks[0].text, K)
            return _resident() - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(sizes: list[int], questions: int, *, memory: bool = True) -> dict[str, Any]:
    """All sizes; memory in fresh processes, since a process does not give back what it took."""
    rows = []
    for size in sizes:
        row = one_size(size, questions)
        if memory:
            with multiprocessing.get_context("spawn").Pool(2, maxtasksperchild=1) as pool:
                grown = [pool.apply(peak, (which, size)) for which in ("bare", "index")]
            row["memory_mib"] = dict(zip(("bare", "index"), grown, strict=True))
        rows.append(row)
    return {"schema_version": 1, "command": "index_scale", "seed": 0, "width": WIDTH, "k": K, "rows": rows}


def show(figures: dict[str, Any]) -> str:
    """The figures as a table."""
    lines = [
        f"{'chunks':>8} {'bare/s':>8} {'index/s':>8} {'ratio':>6} {'cpu':>6} {'bare MiB':>9} {'index MiB':>9} "
        f"{'bare ms':>8} {'dense ms':>8} {'hybrid ms':>9}"
    ]
    for row in figures["rows"]:
        memory = row.get("memory_mib", {"bare": float("nan"), "index": float("nan")})
        median = {name: found["median"] for name, found in row["latency_ms"].items()}
        lines.append(
            f"{row['chunks']:>8} {row['bare_per_second']:>8.0f} {row['index_per_second']:>8.0f} "
            f"{row['ratio']:>6.2f} {row['processor_ratio']:>6.2f} "
            f"{memory['bare']:>9.0f} {memory['index']:>9.0f} {median['bare']:>8.1f} {median['dense']:>8.1f} "
            f"{median['hybrid']:>9.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sizes", default="1000,10000,100000", help="chunks, with commas between")
    parser.add_argument("--questions", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="1,000 chunks")
    parser.add_argument(
        "--end-to-end", type=int, metavar="CHUNKS", help="only: a folder through the offline sentence model"
    )
    options = parser.parse_args()
    if options.end_to_end:
        figures = {"schema_version": 1, "command": "index_scale", "seed": 2}
        figures |= end_to_end(options.end_to_end, options.questions)
        print(json.dumps(figures, indent=2))
        if options.json:
            write_text_atomically(options.json, json.dumps(figures, indent=2) + "\n")
        return
    sizes = [1000] if options.quick else [int(size) for size in options.sizes.split(",")]
    figures = measure(sizes, options.questions)
    print(show(figures))
    if options.json:
        write_text_atomically(options.json, json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
