"""Change one fact in the weights, ask around it, take the change off, and keep it as a patch.

python examples/edit_a_fact.py
python examples/edit_a_fact.py --model path/to/model --subject Japan --target Oslo --editor rome+sadr
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from editors import get_editor
from lab import EditRequest, ModelHandle, WeightPatch
from lab.patch_io import load_saved


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="atlas")
    parser.add_argument("--editor", default="rome")
    parser.add_argument("--prompt", default="The capital of {} is")
    parser.add_argument("--subject", default="France")
    parser.add_argument("--target", default="Rome")
    parser.add_argument("--neighbor", default="Japan", help="another subject, which should keep its answer")
    parser.add_argument("--out", type=Path, default=Path("results/edit_a_fact"))
    options = parser.parse_args(arguments)

    handle = ModelHandle.load(options.model)
    request = EditRequest("example", options.prompt, options.subject, options.target)
    prompts = [request.text, options.prompt.replace("{}", options.neighbor)]

    def show(moment: str) -> None:
        for prompt, text in zip(
            prompts, handle.generate(prompts, max_new_tokens=8, stop=(".\n", "\n")), strict=True
        ):
            print(f"{moment:>7}: {prompt} ->{text}")

    show("before")
    patch = get_editor(options.editor).edit(handle, [request])
    digest = handle.weights_digest()
    applied = patch.apply(handle)
    show("edited")
    applied.undo()
    show("undone")
    print(f"bit-identical again: {handle.weights_digest() == digest}")

    folder = patch.save(options.out, overwrite=True)
    with load_saved(folder).applied(handle):
        show("loaded")
    kind = f"patch of rank {patch.rank}" if isinstance(patch, WeightPatch) else "memory"
    print(f"{kind} -> {folder}")


if __name__ == "__main__":
    main()
