"""The pipeline from a question to a verdict, and its retriever in chains of others."""

from __future__ import annotations

import asyncio
import json

import pytest
from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda

from lab.errors import ConfigError, RequestError, UnknownNameError
from lab.handle import ModelHandle
from rag.amend import annotate, set_status
from rag.pipeline import Answer, RagPipeline, StoreRetriever, passage_of
from rag.store import Chunk, MemoryStore
from tests.rag.facts import conflicts
from tests.tiny import tiny_handle

CASES = conflicts(3, seed=2)


@pytest.fixture(scope="module")
def model(shipped_atlas: None) -> ModelHandle:
    return ModelHandle.load("atlas")


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(
        [
            *(Chunk(f"c{number}", case.document.text, f"s{number}") for number, case in enumerate(CASES)),
            Chunk("far", "Nothing of this matters here.", "s"),
        ]
    )


def test_a_contradicting_document_is_found_read_and_judged(model, store):
    pipeline = RagPipeline(model, store, reader="con", policy="context", k=1)
    answers = pipeline.batch([case.question for case in CASES])
    for number, (case, answer) in enumerate(zip(CASES, answers, strict=True)):
        assert [passage.id for passage in answer.passages] == [f"c{number}"]
        assert answer.passages[0].text == case.document.text
        assert answer.verdict.memory.answer == case.known
        assert answer.verdict.policy == "context"
        json.dumps(answer.to_json(), allow_nan=False)
    assert sum(answer.verdict.answer == case.told for case, answer in zip(CASES, answers, strict=True)) >= 2


def test_every_way_of_asking_gives_the_same_answer(model, store):
    pipeline = RagPipeline(model, store, reader="direct", policy="memory", k=2)
    question = CASES[0].question
    answer = pipeline.invoke(question)
    stages = list(pipeline.stream({"question": question}))
    assert [stage.reading is None for stage in stages] == [True, False]
    assert stages[0].passages == answer.passages and stages[0].text == ""

    async def all_async():
        streamed = [stage async for stage in pipeline.astream(question)]
        return [await pipeline.ainvoke(question), (await pipeline.abatch([question]))[0], streamed[-1]]

    for other in [stages[-1], pipeline.batch([question])[0], *asyncio.run(all_async())]:
        assert other.text == answer.text
        assert other.passages == answer.passages
        assert other.verdict.answer == answer.verdict.answer


def test_it_is_a_link_in_a_chain(store):
    handle = tiny_handle(scale=2.0)
    pipeline = RagPipeline(handle, store, reader="direct", policy=None, k=1, max_new_tokens=4)
    chain = pipeline | RunnableLambda(lambda answer: answer.text)
    text = chain.invoke(CASES[0].question)
    assert text == pipeline.invoke(CASES[0].question).text
    assert list(chain.stream(CASES[0].question)) == [text]
    own = RunnableLambda(
        lambda question: [Document(f"about  {question}", metadata={"source": "x", "trust": "verified"})]
    )
    answer = RagPipeline(handle, own, reader="direct", policy=None, max_new_tokens=4).invoke("Who?")
    assert [(p.id, p.text, p.source, p.trust) for p in answer.passages] == [
        ("1", "about Who?", "x", "verified")
    ]
    found = pipeline.batch([CASES[0].question, " "], return_exceptions=True)
    assert isinstance(found[0], Answer) and isinstance(found[1], RequestError)


def test_callbacks_see_the_retrieval(store):
    from langchain_core.callbacks import BaseCallbackHandler

    class Seen(BaseCallbackHandler):
        def __init__(self):
            self.ids = []

        def on_retriever_end(self, documents, **_):
            self.ids.append([document.id for document in documents])

    seen = Seen()
    pipeline = RagPipeline(tiny_handle(), store, reader="direct", policy=None, k=1, max_new_tokens=2)
    for call in (pipeline.invoke, lambda *given, **named: list(pipeline.stream(*given, **named))):
        call(CASES[1].question, config={"callbacks": [seen]})
    assert seen.ids == [["c1"], ["c1"]]


def test_the_retriever(store):
    annotate(store, ["c0"], "superseded")
    set_status(store, ["c1"], "stale")
    retriever = StoreRetriever(store=store, k=4)
    found = retriever.invoke(CASES[0].question)
    assert found[0].id == "c0" and "superseded" in found[0].page_content
    assert "c1" not in {document.id for document in retriever.invoke(CASES[1].question)}
    narrow = StoreRetriever(store=store, where={"source": "s2"})
    assert [document.id for document in narrow.invoke(CASES[2].question)] == ["c2"]
    assert passage_of(Document("x", metadata={"trust": "sure"}), 7).trust is None


def test_misuse_is_refused(store):
    handle = tiny_handle()
    with pytest.raises(ConfigError, match="policy"):
        RagPipeline(handle, store, policy="loudest")
    with pytest.raises(UnknownNameError):
        RagPipeline(handle, store, reader="cno")
    with pytest.raises(ConfigError, match="at least one"):
        RagPipeline(handle, store, k=0)
    pipeline = RagPipeline(handle, store, policy=None)
    for wrong in ("", {"query": "x"}, {"question": 3}):
        with pytest.raises(RequestError, match="question"):
            pipeline.invoke(wrong)


def test_muting_works_in_the_pipeline(model, store):
    digest = model.weights_digest()
    pipeline = RagPipeline(model, store, reader="direct", decoding="parammute:layers=1", k=1)
    answer = pipeline.invoke(CASES[0].question)
    assert answer.verdict.memory.answer == CASES[0].known
    assert model.weights_digest() == digest
