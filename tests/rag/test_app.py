"""The service: API, page, limits, and answers that see one state while edits come and go."""

from __future__ import annotations

import threading

import pytest
import torch
from fastapi.testclient import TestClient

from lab.arch import Role
from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from rag.app import api, service
from rag.app.api import Key, create_app, is_loopback
from rag.app.page import answers, build_page, changes, guarded
from rag.app.service import Service, check_name, pieces
from rag.facts import named_fact
from rag.ledger import HandleWeights, Ledger
from rag.store import MemoryStore

QUESTION = "What is the capital of France?"


@pytest.fixture
def served(atlas, tmp_path, monkeypatch):
    """The service over the built-in model; what an edit computes is a fixed patch, so that no editor has to run."""
    handle = ModelHandle.load("atlas")
    weight = handle.weight(Role.MLP_OUT, 1)
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.randn(size, generator=generator) for size in ((weight.shape[0], 1), (1, weight.shape[1]))
    )

    def maker(handle, method, fact, new, **_):
        return lambda: WeightPatch(
            handle.fingerprint,
            {weight.name: LowRank(left, right)},
            Provenance(method),
            tuple(entry.patch.id for entry in handle.applied),
        )

    monkeypatch.setattr(service, "edit_maker", maker)
    store = MemoryStore()
    with Ledger(tmp_path / "ledger", store, HandleWeights(handle)) as ledger:
        yield Service(handle, store, ledger, reader="direct")


@pytest.fixture
def client(served):
    return TestClient(create_app(served, page=False), base_url="http://127.0.0.1")


def test_the_whole_story(served, client):
    digest = served.handle.weights_digest()
    assert client.get("/health").json()["status"] == "ok"
    told = client.post(
        "/ingest", json={"name": "a/b.txt", "text": "The capital of France is Paris.\n\nHello there."}
    )
    assert told.json() == {"name": "a/b.txt", "chunks": 2, "hidden": [], "removed": 0}
    first = client.post("/ask", json={"question": QUESTION}).json()
    assert {"answer", "verdict", "notes", "passages"} <= set(first)
    assert {"memory", "context", "ledger", "winner", "policy"} <= set(first["verdict"])
    assert (
        first["passages"][0]["text"] == "The capital of France is Paris."
        and first["verdict"]["ledger"] is None
    )
    edit = client.post("/edit", json={"subject": "France", "relation": "capital", "new": "Rome"}).json()
    assert edit["done"] and len(edit["conflicts"]) == 1 and edit["question"] == QUESTION
    second = client.post("/ask", json={"question": QUESTION, "policy": "ledger"}).json()
    assert "Paris" not in " ".join(passage["text"] for passage in second["passages"])
    assert second["answer"] == "Rome" and second["verdict"]["winner"] == "ledger"
    assert served.handle.weights_digest() != digest
    again = client.post("/ingest", json={"name": "c.txt", "text": "Paris is the capital of France."}).json()
    assert len(again["hidden"]) == 1
    assert client.post("/undo", json={}).json()["entry"] == 1
    assert served.handle.weights_digest() == digest
    third = client.post("/ask", json={"question": QUESTION}).json()
    assert len([one for one in third["passages"] if "Paris" in one["text"]]) == 2
    assert client.post("/undo", json={}).status_code == 422
    replaced = client.post("/ingest", json={"name": "a/b.txt", "text": "Nothing."}).json()
    assert replaced["removed"] == 2
    assert {"/ask", "/edit", "/undo", "/ingest", "/health"} <= set(
        client.get("/openapi.json").json()["paths"]
    )


@pytest.mark.parametrize(
    ("verb", "body", "code", "words"),
    [
        ("ask", {"question": "a" * 1_000_000}, 422, "question: String should have at most 2000"),
        ("ask", {"question": ""}, 422, "question"),
        ("ask", {"question": "   "}, 422, "empty"),
        ("ask", {"question": "x", "policy": "loudest"}, 422, "policy"),
        ("ask", {"question": "x", "extra": 1}, 422, "extra"),
        ("ingest", {"name": "../etc/passwd", "text": "x"}, 422, "cannot name a document"),
        ("ingest", {"name": "/etc/passwd", "text": "x"}, 422, "cannot name a document"),
        ("ingest", {"name": "a.txt", "text": " \n "}, 422, "holds no text"),
        ("edit", {"subject": "Nobody", "relation": "capital", "new": "Rome"}, 422, "does not know"),
        ("undo", {"entry": 99}, 422, "no entry 99"),
    ],
)
def test_what_makes_no_sense_is_refused_in_words(client, verb, body, code, words):
    answer = client.post(f"/{verb}", json=body)
    assert answer.status_code == code and words in answer.json()["error"] and len(answer.text) < 1000


def test_a_body_past_the_limit_is_not_read(client, monkeypatch):
    assert client.post("/ask", content=b" " * (api.MAX_BODY + 1)).status_code == 413

    def stream():
        for _ in range(api.MAX_BODY // 100_000 + 2):
            yield b" " * 100_000

    answer = client.post("/ask", content=stream())
    assert answer.status_code == 413 and "send less" in answer.json()["error"]


def test_writing_needs_the_token(served):
    with pytest.raises(ConfigError, match="give a token"):
        create_app(served, host="0.0.0.0", page=False)
    with pytest.raises(ConfigError, match="16"):
        create_app(served, token="short", page=False)
    client = TestClient(create_app(served, host="0.0.0.0", token="k" * 20, page=False))
    body = {"name": "a.txt", "text": "Hello."}
    assert client.post("/ingest", json=body).status_code == 401
    assert client.post("/ingest", json=body, headers={"Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/undo", json={}).status_code == 401
    assert (
        client.post("/ingest", json=body, headers={"Authorization": "Bearer " + "k" * 20}).status_code == 200
    )
    assert client.post("/ask", json={"question": QUESTION}).status_code == 200


def test_only_names_of_this_machine_are_served_on_loopback(served):
    app = create_app(served, page=False)
    assert TestClient(app, base_url="http://evil.example").get("/health").status_code == 400
    assert [is_loopback(host) for host in ("localhost", "127.0.0.5", "::1", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["..", "a/../b", "/a", "c:\\a", "a\\b", "a\nb", " ", "x" * 201])
def test_names_that_are_paths_are_refused(name):
    with pytest.raises(RequestError):
        check_name(name)


def test_texts_become_whole_sentences():
    text = "One. " * 200 + "\n\n" + "x" * 1500
    found = pieces("a.txt", text)
    assert max(len(one.text) for one in found) <= 600 and len({one.id for one in found}) == len(found)
    assert "".join(one.text for one in found).replace(" ", "") == text.replace(" ", "").replace("\n", "")


def test_every_answer_while_edits_come_and_go_is_one_of_two_states(served):
    served.ingest("a.txt", "The capital of France is Paris.")

    def look():
        found = served.ask(QUESTION)
        return found["state"], found["answer"], tuple(one["text"] for one in found["passages"])

    clean = look()
    served.edit("France", "capital", "Rome")
    edited = look()
    served.undo()
    assert clean != edited and look() == clean
    seen, problems, stop = [], [], threading.Event()

    def ask():
        try:
            while not stop.is_set():
                seen.append(look())
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(4):
        served.edit("France", "capital", "Rome")
        served.undo()
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems and set(seen) <= {clean, edited} and seen


def test_what_is_forgotten_reads_like_what_is_not_known(served):
    served.ingest("a.txt", "The capital of France is Paris.")
    fact = named_fact("France", "capital")
    served.ledger.forget(fact, question=QUESTION)
    # Split over two documents that neither match alone.
    served.ingest("b.txt", "France: see note two.")
    for policy in ("context", "ledger"):
        found = served.ask(QUESTION, policy=policy)
        assert found["answer"] == "unknown" and not found["known"] and found["passages"] == []
        assert "Paris" not in str({key: value for key, value in found.items() if key != "question"})
    other = served.ask("What is the capital of Japan?")
    assert other["verdict"]["memory"]["source"] == "memory" and "Paris" not in str(other["passages"])
    served.undo()
    assert served.ask(QUESTION)["passages"]


def test_the_page_says_it_in_plain_words(served):
    served.ingest("a.txt", "The capital of France is <b>Paris</b>.")
    problem, memory, documents, details = answers(served, QUESTION, "context")
    assert not problem and 'class="answer"' in memory and "Believed" in documents
    assert "&lt;b&gt;Paris" in details and "<b>Paris" not in details and "Attention: " in details
    assert "Type a question" in answers(served, " ", "context")[0]
    assert "That did not work" in answers(served, "a" * 3000, "context")[0]
    assert "No fact is changed" in changes(served)
    served.edit("France", "capital", "Rome")
    assert "France, capital: Paris → Rome" in changes(served)
    key = Key("k" * 20)
    assert "does not fit" in guarded(key, "wrong", lambda: pytest.fail("ran without the key"))
    assert guarded(key, "k" * 20, lambda: "done") == "done"


def test_the_page_is_served(served):
    build_page(served, Key(None))
    with TestClient(create_app(served), base_url="http://127.0.0.1") as client:
        assert client.get("/").status_code == 200 and "KnowLab" in client.get("/page/").text
        assert client.get("/health").json()["status"] == "ok"
