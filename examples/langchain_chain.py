"""The pipeline inside a plain LangChain chain, and the model as a chat model behind a prompt template.

python examples/langchain_chain.py "What is the capital of France?" --document "The capital of France is Rome."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda, RunnableParallel

from lab import ModelHandle
from rag.chat import KnowLabChat
from rag.pipeline import Answer, RagPipeline


def _question(given: dict[str, str]) -> str:
    return given["question"]


def _text(answer: Answer) -> str:
    return answer.text


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question")
    parser.add_argument("--document", action="append", required=True)
    parser.add_argument("--model", default="atlas")
    options = parser.parse_args(arguments)

    handle = ModelHandle.load(options.model)
    documents = [Document(text, id=str(number)) for number, text in enumerate(options.document, start=1)]
    # Any retriever of LangChain's may stand here: a Runnable from a question to documents.
    retriever = RunnableLambda(lambda question: documents)
    with_documents = RagPipeline(handle, retriever, decoding="cad") | RunnableLambda(_text)
    from_memory = (
        ChatPromptTemplate.from_messages([("user", "{question}")])
        | KnowLabChat(handle=handle, max_tokens=24)
        | StrOutputParser()
    )
    chain = RunnableParallel(documents=RunnableLambda(_question) | with_documents, memory=from_memory)
    said = chain.invoke({"question": options.question})
    print(f"with documents: {said['documents']}")
    print(f"from memory: {said['memory'].strip()}")
    return said


if __name__ == "__main__":
    main()
