"""Edit a fact in the weights, then ask with a document that still says the old: decoding decides who is heard.

python examples/edit_meets_document.py
python examples/edit_meets_document.py --editor rome+sadr --decodings greedy,cad,ck_plug:memory=1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from editors import get_editor
from lab import EditRequest, ModelHandle
from lab.records import Passage
from rag.decoding import get_rule
from rag.readers import READERS
from rag.verdict import judge


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--question", default="What is the capital of France?")
    parser.add_argument("--document", default="The capital of France is Paris.")
    parser.add_argument("--target", default="Rome")
    parser.add_argument("--decodings", default="greedy,cad,ck_plug:memory=1", help="one setting each at most")
    options = parser.parse_args(arguments)

    handle = ModelHandle.load(options.model)
    request = EditRequest("example", "The capital of {} is", "France", options.target)
    passages = [Passage("old", options.document)]
    digest = handle.weights_digest()
    patch = get_editor(options.editor).edit(handle, [request])
    with patch.applied(handle):
        for decoding in options.decodings.split(","):
            reading = READERS.get("direct")(handle, get_rule(decoding)).read(options.question, passages)
            print(f"{decoding}: {reading.answer}")
        verdict = judge(handle, options.question, passages, "memory")
        print(f"memory says {verdict.memory.answer}, the document {verdict.documents[0].answer}")
        print(f"the policy `memory` answers {verdict.answer} ({verdict.agreement})")
    print(f"bit-identical again: {handle.weights_digest() == digest}")


if __name__ == "__main__":
    main()
