"""Question, documents, answer, verdict: the pipeline, and the retriever it begins with, as LangChain Runnables."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig
from langchain_core.runnables.config import run_in_executor
from pydantic import ConfigDict, Field

from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.records import Passage, Trust
from rag.decoding import get_rule
from rag.readers import READERS, Reading
from rag.store import TRUSTS, DocumentStore, Where, check_search
from rag.verdict import POLICIES, Policy, Verdict, judge

Question = str | Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """What the pipeline says to one question.

    Answers of a stream replace each other: the sum of two is the later one.

    Attributes:
        question: As asked.
        passages: What was retrieved, best first.
        reading: The reader's answer with all passages before it; ``None`` while it is still to come.
        verdict: Memory and every passage heard alone, and who wins; ``None`` where nobody asked for it.
    """

    question: str
    passages: tuple[Passage, ...]
    reading: Reading | None = None
    verdict: Verdict | None = None

    @property
    def text(self) -> str:
        """The reader's answer; empty while it is still to come."""
        return self.reading.answer if self.reading else ""

    def __add__(self, later: Answer) -> Answer:
        return later

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "question": self.question,
            "answer": self.text,
            "passages": [dataclasses.asdict(passage) for passage in self.passages],
            "reading": self.reading.to_json() if self.reading else None,
            "verdict": self.verdict.to_json() if self.verdict else None,
        }


class StoreRetriever(BaseRetriever):
    """A ``DocumentStore`` as LangChain's retriever; it finds live chunks only, unless the condition names a status.

    Attributes:
        store: Where to search.
        k: How many chunks.
        where: A condition on them.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    store: Any = Field(exclude=True)
    k: int = Field(default=5, ge=1)
    where: dict[str, Any] | None = None

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        found = cast(DocumentStore, self.store).search(query, self.k, cast("Where | None", self.where))
        documents = []
        for item in found:
            passage, chunk = item.chunk.passage, item.chunk
            metadata = {**chunk.extra, "source": chunk.source, "score": item.score}
            metadata |= {"trust": chunk.trust} if chunk.trust else {}
            documents.append(Document(passage.text, id=chunk.id, metadata=metadata))
        return documents


def passage_of(document: Document, number: int) -> Passage:
    """A LangChain document as a passage; ``number`` names it where it has no id."""
    trust = document.metadata.get("trust")
    return Passage(
        document.id or str(number),
        " ".join(document.page_content.split()),
        str(document.metadata.get("source", "")),
        cast("Trust", trust) if trust in TRUSTS else None,
    )


class RagPipeline(Runnable[Question, Answer]):
    """Retrieves, reads and judges; ``invoke``, ``batch``, ``stream`` and their asynchronous kin work as LangChain has them.

    A stream gives the passages first and the whole answer then. Reading and verdict of an answer see the same weights.

    Args:
        handle: The model, with its patches.
        retriever: A ``DocumentStore``, or any Runnable from a question to LangChain documents.
        reader: A reader's name; see ``rag.readers``.
        decoding: A decoding rule's name, with settings if wanted; see ``rag.decoding``.
        policy: Who wins; ``None`` leaves the verdict out, which costs more than the reading.
        k: How many chunks a store is asked for.
        where: A condition on them.
        max_new_tokens: Longest answer.

    Raises:
        UnknownNameError: There is no such reader or rule.
        ConfigError: There is no such policy, or another setting makes no sense.
    """

    def __init__(
        self,
        handle: ModelHandle,
        retriever: DocumentStore | Runnable[str, list[Document]],
        *,
        reader: str = "con",
        decoding: str = "greedy",
        policy: Policy | None = "context",
        k: int = 5,
        where: Where | None = None,
        max_new_tokens: int = 24,
    ) -> None:
        check_search(k)
        if policy is not None and policy not in POLICIES:
            raise ConfigError(f"unknown policy {policy!r}; use {', '.join(POLICIES)}")
        self.handle = handle
        self.retriever: Runnable[str, list[Document]] = (
            retriever
            if isinstance(retriever, Runnable)
            else StoreRetriever(store=retriever, k=k, where=None if where is None else dict(where))
        )
        self.reader = READERS.get(reader)(handle, get_rule(decoding), max_new_tokens=max_new_tokens)
        self.policy: Policy | None = policy

    def invoke(self, input: Question, config: RunnableConfig | None = None, **kwargs: Any) -> Answer:
        """Answers one question, a text or a mapping with a ``question``.

        Raises:
            RequestError: There is no question.
        """
        return self._call_with_config(cast("Any", self._answer), input, config, run_type="chain")

    def batch(
        self,
        inputs: list[Question],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        *,
        return_exceptions: bool = False,
        **kwargs: Any,
    ) -> list[Answer]:
        """Answers questions; all are read in the same forward passes, unless exceptions are to be returned one by one."""
        if return_exceptions:
            return super().batch(inputs, config, return_exceptions=True, **kwargs)
        return self._batch_with_config(cast("Any", self._answers), inputs, config)

    def stream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> Iterator[Answer]:
        """The passages, then the whole answer."""
        yield from self._transform_stream_with_config(iter([input]), self._stages, config, run_type="chain")

    async def astream(
        self, input: Question, config: RunnableConfig | None = None, **kwargs: Any
    ) -> AsyncIterator[Answer]:
        """See ``stream``; the work is done in another thread."""
        stages = self.stream(input, config)
        end = object()
        while True:
            stage = await run_in_executor(config, next, stages, end)
            if stage is end:
                return
            yield cast(Answer, stage)

    def _stages(
        self, inputs: Iterator[Question], run_manager: Any, config: RunnableConfig
    ) -> Iterator[Answer]:
        for given in inputs:
            question = _question(given)
            passages = self._passages(question, config)
            yield Answer(question, passages)
            yield self._read([(question, passages)])[0]

    def _answer(self, given: Question, config: RunnableConfig) -> Answer:
        question = _question(given)
        return self._read([(question, self._passages(question, config))])[0]

    def _answers(self, given: list[Question], config: list[RunnableConfig]) -> list[Answer]:
        questions = [_question(item) for item in given]
        return self._read(
            [
                (question, self._passages(question, own))
                for question, own in zip(questions, config, strict=True)
            ]
        )

    def _passages(self, question: str, config: RunnableConfig | None) -> tuple[Passage, ...]:
        documents = self.retriever.invoke(question, config)
        return tuple(passage_of(document, number) for number, document in enumerate(documents, start=1))

    def _read(self, items: Sequence[tuple[str, tuple[Passage, ...]]]) -> list[Answer]:
        with self.reader.holding():
            readings = self.reader.read_many(items)
            verdicts = [
                None if self.policy is None else judge(self.handle, question, passages, self.policy)
                for question, passages in items
            ]
        return [
            Answer(question, passages, reading, verdict)
            for (question, passages), reading, verdict in zip(items, readings, verdicts, strict=True)
        ]


def _question(given: Question) -> str:
    found = given if isinstance(given, str) else given.get("question")
    if not isinstance(found, str) or not found.strip():
        raise RequestError("give a question: a text, or a mapping with a text under 'question'")
    return found.strip()
