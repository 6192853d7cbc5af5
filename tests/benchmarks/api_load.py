"""Asks the HTTP API from many clients at once while facts are changed and changed back.

    python tests/benchmarks/api_load.py --json results/api_load.json [--seconds 120] [--clients 32] [--quick]

The server is the real one, on a free port of this machine, over ``atlas`` and a few documents. Every client asks questions, each third
time the canary: the capital of France. One more client makes it Rome with ``/edit`` and takes that back with ``/undo``, over and over.

``errors``: answers that are no 200, and calls that failed. ``mixed``: canaries whose memory, passages, ledger and answer together
are neither those of the unchanged model nor those of the changed one, or do not fit the state that the answer names.
``latency``: milliseconds by verb (count, mean, 50th, 95th and 99th percentile, longest).
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.handle import ModelHandle
from lab.records import write_text_atomically
from rag.app.api import create_app
from rag.app.service import Service, pieces
from rag.ledger import HandleWeights, Ledger
from rag.store import MemoryStore

CANARY = "What is the capital of France?"
EDIT = {"subject": "France", "relation": "capital", "new": "Rome"}
OTHERS = (
    "What is the capital of Japan?",
    "What is the currency of Japan?",
    "What is the capital of Kenya?",
    "What is the capital of Norway?",
)
DOCUMENTS = {
    "france.txt": "The capital of France is Paris.",
    "japan.txt": "The capital of Japan is Tokyo.\n\nThe currency of Japan is the yen.",
    "kenya.txt": "The capital of Kenya is Oslo.",
}


@contextmanager
def serving(service: Service) -> Iterator[str]:
    """Serves the API on a free port; gives its address."""
    import uvicorn

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(service, page=False)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.05)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


def seen(answer: dict[str, Any]) -> tuple[Any, ...]:
    """What an answer says that depends on weights, documents and ledger."""
    verdict = answer["verdict"]
    ledger = verdict["ledger"] and verdict["ledger"]["answer"]
    texts = tuple(passage["text"] for passage in answer["passages"])
    return answer["answer"], verdict["memory"]["answer"], ledger, texts


class Load:
    """Clients against one address, and what they saw."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.latency: dict[str, list[float]] = defaultdict(list)
        self.errors: list[str] = []
        self.mixed: list[str] = []
        self.canaries = {"unchanged": 0, "changed": 0}
        self.changes = 0
        self._lock = threading.Lock()
        with httpx.Client(base_url=address, timeout=300) as client:
            first = self.call(client, "ask", question=CANARY)
            edited = self.call(client, "edit", **EDIT)
            second = self.call(client, "ask", question=CANARY)
            undone = self.call(client, "undo")
        if None in (first, edited, second, undone):
            raise RuntimeError(f"the server does not answer even one client: {self.errors}")
        assert first is not None and second is not None
        self.clean, self.unchanged, self.changed = first["state"], seen(first), seen(second)
        if self.unchanged == self.changed:
            raise RuntimeError("the change does not show in the canary; nothing could be measured")
        self.latency.clear()

    def call(self, client: httpx.Client, verb: str, **body: Any) -> dict[str, Any] | None:
        """One request; ``None`` where it failed."""
        start = time.perf_counter()
        try:
            answer = client.post(f"/{verb}", json=body)
        except httpx.HTTPError as error:
            with self._lock:
                self.errors.append(f"{verb}: {type(error).__name__}: {error}")
            return None
        with self._lock:
            self.latency[verb].append(1000 * (time.perf_counter() - start))
            if answer.status_code != 200:
                self.errors.append(f"{verb}: {answer.status_code} {answer.text[:200]}")
                return None
        return answer.json()

    def look(self, answer: dict[str, Any]) -> None:
        """Checks a canary against the two states there are."""
        unchanged = answer["state"] == self.clean
        with self._lock:
            self.canaries["unchanged" if unchanged else "changed"] += 1
            if seen(answer) != (self.unchanged if unchanged else self.changed):
                self.mixed.append(f"{answer['state'][:8]}: {seen(answer)}")

    def ask(self, number: int, until: float) -> None:
        """One client."""
        with httpx.Client(base_url=self.address, timeout=300) as client:
            turn = number
            while time.monotonic() < until:
                turn += 1
                canary = turn % 3 == 0
                answer = self.call(client, "ask", question=CANARY if canary else OTHERS[turn % len(OTHERS)])
                if canary and answer is not None:
                    self.look(answer)

    def change(self, until: float) -> None:
        """The client that edits and undoes."""
        with httpx.Client(base_url=self.address, timeout=300) as client:
            while time.monotonic() < until:
                if self.call(client, "edit", **EDIT) is not None:
                    self.changes += 1
                    self.call(client, "undo")

    def run(self, seconds: float, clients: int) -> float:
        """All of them at once; returns the seconds that it took until the last one was answered."""
        begin = time.monotonic()
        until = begin + seconds
        threads = [threading.Thread(target=self.ask, args=(number, until)) for number in range(clients)]
        threads.append(threading.Thread(target=self.change, args=(until,)))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - begin


def percentiles(values: list[float]) -> dict[str, float]:
    """Count, mean, percentiles and maximum of latencies."""
    points = dict(zip(("p50", "p95", "p99"), np.percentile(values, (50, 95, 99)).tolist(), strict=True))
    return {"count": len(values), "mean": float(np.mean(values)), **points, "max": max(values)}


def measure(service: Service, seconds: float, clients: int) -> dict[str, Any]:
    """Serves, loads, and says what was seen; the model ends as it began, or ``restored`` says that it did not."""
    before = service.handle.weights_digest()
    with serving(service) as address:
        load = Load(address)
        took = load.run(seconds, clients)
    return {
        "schema_version": 1,
        "command": "api_load",
        "seed": 0,
        "clients": clients,
        "seconds": took,
        "answers": len(load.latency["ask"]),
        "answers_per_second": len(load.latency["ask"]) / took,
        "changes": load.changes,
        "canaries": load.canaries,
        "errors": len(load.errors),
        "mixed": len(load.mixed),
        "examples": [*load.errors[:5], *load.mixed[:5]],
        "restored": service.handle.weights_digest() == before,
        "latency": {verb: percentiles(values) for verb, values in sorted(load.latency.items()) if values},
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Parses options, measures, prints, writes; fails where an answer failed or was mixed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="ten seconds")
    parser.add_argument("--reader", default="con")
    parser.add_argument("--editor", default="rome")
    options = parser.parse_args()
    handle = ModelHandle.load("atlas")
    store = MemoryStore([chunk for name, text in DOCUMENTS.items() for chunk in pieces(name, text)])
    with (
        tempfile.TemporaryDirectory() as folder,
        Ledger(Path(folder) / "ledger", store, HandleWeights(handle)) as ledger,
    ):
        service = Service(handle, store, ledger, reader=options.reader, editor=options.editor)
        figures = measure(service, 10 if options.quick else options.seconds, options.clients)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")
    if figures["errors"] or figures["mixed"] or not figures["restored"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
