"""Indexing the documents of question files, and how well retrieval finds those that bear on a question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lab.eval.stats import Estimate, summarise
from lab.records import Passage
from rag.evaluation import Asked
from rag.metrics import hit_at_k, recall_at_k, reciprocal_rank
from rag.preference.match import says
from rag.questions import FileQuestion
from rag.store import DocumentStore, Retrieved, chunk_id

if TYPE_CHECKING:
    from rag.readers import Reader

DEPTH = 20
CUTS = (1, 3, 5, 10)


def document_of(text: str) -> str:
    """The name of a document of a question file: the same text of two questions is one document."""
    return chunk_id("question-file", text)


def pool_name(texts: Sequence[str]) -> str:
    """A name for some documents: others have another one."""
    return chunk_id("pool", "\n".join(map(document_of, texts)))[:12]


def bring_in(
    store: DocumentStore,
    texts: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Puts documents into a store, cut as any document is; returns how many chunks that are.

    Documents already there are neither written nor embedded again.
    """
    from rag.index.ingest import cut
    from rag.index.load import Document

    chunks = [chunk for text in texts for chunk in cut(Document(document_of(text), text, "text"))]
    held = {chunk.id for chunk in store.chunks()}
    new = [chunk for chunk in chunks if chunk.id not in held]
    for start in range(0, len(new), 64):
        store.put(new[start : start + 64])
        if progress:
            progress("documents", min(start + 64, len(new)), len(new))
    return len(chunks)


def ranked_documents(found: Sequence[Retrieved]) -> list[str]:
    """Documents in the order of their best chunk."""
    return list(dict.fromkeys(hit.chunk.source for hit in found))


def retrieval_figures(
    questions: Sequence[FileQuestion], found: Sequence[Sequence[Retrieved]]
) -> dict[str, Estimate]:
    """How well documents were found, among the first ``DEPTH`` chunks.

    ``recall@k``, ``hit@k`` and ``mrr`` are over the questions that have relevant documents. ``answer@k`` is over all: the share of
    questions an answer to which stands in one of the first ``k`` chunks, by which open question answering judges retrieval.
    """
    ranked = [ranked_documents(hits) for hits in found]
    wanted = [[document_of(text) for text in one.relevant] for one in questions]
    values: dict[str, list[float | None]] = {}
    for k in CUTS:
        pairs = list(zip(ranked, wanted, strict=True))
        values[f"recall@{k}"] = [recall_at_k(row, relevant, k) for row, relevant in pairs]
        values[f"hit@{k}"] = [hit_at_k(row, relevant, k) for row, relevant in pairs]
        values[f"answer@{k}"] = [
            float(any(says(hit.chunk.text, one.answers) for hit in hits[:k]))
            for one, hits in zip(questions, found, strict=True)
        ]
    values["mrr"] = [reciprocal_rank(row, relevant) for row, relevant in zip(ranked, wanted, strict=True)]
    return {name: summarise([value for value in row if value is not None]) for name, row in values.items()}


def as_asked(
    questions: Sequence[FileQuestion], found: Sequence[Sequence[Retrieved]], k: int, fits: Callable[..., bool]
) -> dict[str, list[Asked]]:
    """The questions without documents (``none``) and with the best chunks that fit (``retrieved``).

    Args:
        questions: The questions.
        found: What was retrieved for each, best first.
        k: Chunks that are read at most; the last ones go first where the model has no room.
        fits: Whether a question with passages leaves room for the answer.
    """
    made: dict[str, list[Asked]] = {"none": [], "retrieved": []}
    for one, hits in zip(questions, found, strict=True):
        passages = [hit.chunk.passage for hit in hits[:k]]
        while passages and not fits(one.question, passages):
            passages.pop()
        made["none"].append(Asked(one.id, one.question, one.answers))
        made["retrieved"].append(Asked(one.id, one.question, one.answers, tuple(passages)))
    return made


def room_for(readers: Sequence[Reader]) -> Callable[[str, Sequence[Passage]], bool]:
    """Whether every one of some readers has room for its prompt, its notes and the answer."""
    from rag.decoding.contrast import position_limit, prompt_ids
    from rag.readers.con import TOKENS_PER_NOTE

    def fits(question: str, passages: Sequence[Passage]) -> bool:
        for reader in readers:
            prompts = reader.prompts
            texts = [make(question, passages) for make in (prompts.direct, prompts.faithful, prompts.notes)]
            longest = max(len(ids) for ids in prompt_ids(reader.handle, texts))
            need = longest + reader.max_new_tokens + TOKENS_PER_NOTE * len(passages)
            if need > position_limit(reader.handle):
                return False
        return True

    return fits


def documents_read(asked: Sequence[Asked]) -> dict[str, Any]:
    """How many documents a question was read with, on average."""
    return summarise([float(len(one.passages)) for one in asked], None).to_json()
