"""The examples with documents, on the built-in model."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from lab.errors import ConfigError
from rag.index import open_index
from rag.store import Chunk
from tests.rag.hashed import HashedWords
from tests.test_examples import RAG_EXAMPLES, example

QUESTION = "What is the capital of France?"


# A stand-in cannot read documents.
pytestmark = pytest.mark.usefixtures("shipped_atlas")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "docs"
    root.mkdir()
    (root / "france.txt").write_text("The capital of France is Rome.")
    (root / "japan.md").write_text("The capital of Japan is Tokyo.")
    (root / "peru.html").write_text("<p>The capital of Peru is Lima.</p>")
    return root


def test_every_example_with_documents_is_run_here():
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'example("{name}")' in here for name in RAG_EXAMPLES)


def test_a_folder_is_asked(folder, tmp_path, capsys):
    example("ask_a_folder").main([str(folder), QUESTION, "--store", str(tmp_path / "store")])
    said = capsys.readouterr().out
    assert "(direct)" in said and "Rome" in said.split("note on")[1]
    assert "memory: Paris; winner: documents" in said


def test_an_edited_model_meets_the_old_document(capsys):
    example("edit_meets_document").main(["--editor", "rome_identity"])
    said = capsys.readouterr().out
    assert "cad: Paris" in said and "ck_plug:memory=1: Rome" in said
    assert "memory says Rome, the document Paris" in said
    assert "the policy `memory` answers Rome (conflict)" in said
    assert "bit-identical again: True" in said


def test_notes_against_noise(capsys):
    example("notes_against_noise").main(["--questions", "4"])
    said = capsys.readouterr().out
    assert "direct accuracy" in said and "con robustness" in said and "of 4" in said
    assert said.count("  note (") == said.count("  document: ") == 4
    # The model takes some document about somebody else for one about the subject.
    assert said.count("note (irrelevant)") >= 2


def test_a_chain_of_langchain():
    words = [QUESTION, "--document", "The capital of France is Rome."]
    said = example("langchain_chain").main(words)
    assert said["documents"] == "Rome" and "Paris" in said["memory"]


@pytest.fixture
def server(tmp_path):
    beside = Path(sys.executable).parent / "chroma"
    program = str(beside) if beside.is_file() else shutil.which("chroma")
    if program is None:
        pytest.skip("the program chroma is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [program, "run", "--path", str(tmp_path / "chroma"), "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(150):
            if process.poll() is not None:
                pytest.fail(f"chroma stopped: {(tmp_path / 'log').read_text(errors='replace')}")
            try:
                urllib.request.urlopen(f"{address}/api/v2/heartbeat", timeout=1).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        else:
            pytest.fail("chroma did not answer within 30 s")
        yield address
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def test_the_pipeline_over_a_chroma_server(server, folder, capsys):
    module = example("chroma_server")
    for added, unchanged in ((3, 0), (0, 3)):
        module.main([str(folder), QUESTION, "--server", server])
        said = capsys.readouterr().out
        assert f"{added} chunks added, {unchanged} unchanged" in said
        assert "docs/france.txt" in said and "answer: " in said


def test_an_index_on_a_server_is_a_store_like_any_other(server):
    first = Chunk("a", "Rome is old", "one.txt", trust="verified", note="n", extra={"year": 1})
    with open_index(server, embeddings=HashedWords(), write=True) as index:
        index.put([first, Chunk("b", "Paris is big", "two.txt")])
        plain = replace(first, trust=None, note="", extra={})
        index.put([plain])
        assert index.chunks(["a"]) == index.chunks(where={"trust": None, "source": "one.txt"}) == [plain]
        index.put([replace(plain, status="stale")])
        assert [hit.chunk.id for hit in index.search("Rome Paris old", 5)] == ["b"]
    with open_index(server, embeddings=HashedWords()) as index:
        assert index.counts() == {"live": 1, "aside": 1}
        with pytest.raises(ConfigError, match="reading"):
            index.remove(["b"])
    with pytest.raises(ConfigError, match="cannot open the index"):
        open_index(server.rpartition(":")[0] + ":1", embeddings=HashedWords(), write=True)
