"""A process that is killed (-9) after any step of a transaction, with real weights and a real index: nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rag.ledger import HandleWeights, Ledger
from rag.ledger.ledger import STEPS
from tests.rag.hashed import HashedWords
from tests.rag.ledgers import capital, chunk, contents
from tests.rag.test_ledger import small_patch
from tests.tiny import tiny_handle

FRANCE, JAPAN = capital("France", "Paris"), capital("Japan", "Tokyo")
TEXTS = (
    chunk("The capital of France is Paris."),
    chunk("The capital of Japan is Tokyo.", "b.txt"),
    chunk("Spain is sunny.", "c.txt"),
)
LATE = chunk("Paris, capital of France.", "d.txt")
VERBS: dict[str, Callable[[Ledger, HandleWeights], object]] = {
    "edit": lambda ledger, weights: ledger.edit(FRANCE, "Lyon", lambda: small_patch(weights.handle, 2)),
    "rewrite": lambda ledger, weights: ledger.edit(
        JAPAN, "Kyoto", lambda: small_patch(weights.handle, 3), on_conflict="rewrite"
    ),
    "forget": lambda ledger, weights: ledger.forget(JAPAN, lambda: small_patch(weights.handle, 4)),
    "restore": lambda ledger, weights: ledger.restore(ledger.entries()[0].fact.id),
    "rollback": lambda ledger, weights: ledger.rollback(1),
    "put": lambda ledger, weights: ledger.put([LATE]),
    "remove": lambda ledger, weights: ledger.remove([TEXTS[0].id]),
}
MAKERS = ("edit", "rewrite", "forget")


def _opened(folder: Path, deadly: str | None):
    from rag.index import open_index

    def after(step: str) -> None:
        if step == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    weights = HandleWeights(tiny_handle())
    store = open_index(folder / "index", embeddings=HashedWords(), write=True)
    return store, Ledger(folder / "ledger", store, weights, after_step=after), weights


def _begin(folder: Path) -> None:
    store, ledger, weights = _opened(folder, None)
    with store, ledger:
        ledger.put(TEXTS)
        ledger.edit(FRANCE, "Rome", lambda: small_patch(weights.handle, 1))


def _change(folder: Path, verb: str, deadly: str | None) -> None:
    store, ledger, weights = _opened(folder, deadly)
    with store, ledger:
        VERBS[verb](ledger, weights)


def _look(folder: Path) -> None:
    """Starts anew and writes down what is there."""
    store, ledger, weights = _opened(folder, None)
    with store, ledger:
        entries = ledger.entries()
        held = {path.name for path in (folder / "ledger" / "patches").iterdir()}
        state = {
            "problems": ledger.check(),
            "strays": sorted(held ^ {entry.patch for entry in entries if entry.patch}),
            "contents": contents(store),
            "given": [one.text for one in ledger.documents.chunks()],
            "entries": [(entry.op, entry.new, entry.status, bool(entry.patch)) for entry in entries],
            "weights": weights.handle.weights_digest(),
            "found": [hit.chunk.text for hit in store.search("capital of France Japan Paris Tokyo", 9)],
        }
    (folder / "state.json").write_text(json.dumps(state))


def _apart(work: Callable[..., None], *words: object) -> int:
    """Runs in a forked process, for Chroma must not be open on both sides of a fork; returns how it ended."""
    process = multiprocessing.get_context("fork").Process(target=work, args=words)
    process.start()
    process.join(120)
    if process.is_alive():
        process.kill()
    return process.exitcode or 0


def _state(folder: Path) -> dict[str, object]:
    assert _apart(_look, folder) == 0
    return json.loads((folder / "state.json").read_text())


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    assert _apart(_begin, folder) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_killed_after_every_step_weights_ledger_and_index_agree(begun, tmp_path, verb):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(begun, tmp_path / name))

    before, whole = _state(copy("before")), copy("whole")
    assert _apart(_change, whole, verb, None) == 0
    done = _state(whole)
    assert done != before and not done["problems"] and not done["strays"]
    for step in STEPS if verb in MAKERS else STEPS[1:]:
        folder = copy(step)
        assert _apart(_change, folder, verb, step) == -signal.SIGKILL, step
        # Before the intent nothing has been promised; after it everything is.
        assert _state(folder) == (before if step == "patch" else done), step
    if verb in ("edit", "put"):
        assert not any("Paris" in text for text in done["found"])
