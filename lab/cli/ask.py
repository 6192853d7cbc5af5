"""``knowlab ask``: one question to a model, with patches if wanted."""

from __future__ import annotations

from typing import Annotated

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError

app = typer.Typer()

_HELP = """Ask a model, with any patches applied.

A prompt is continued as it stands. With a built-in model, a text that ends in a question mark is put into the question
form that these models were trained on; `--form raw` leaves it alone.

Examples:

    knowlab ask "The capital of France is"

    knowlab ask "What is the capital of France?" --patch edits/rome --model atlas
"""


@app.command(help=_HELP)
def ask(
    question: Annotated[str, typer.Argument(help="A prompt to continue, or a question.", show_default=False)],
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    form: Annotated[
        str, typer.Option("--form", help="auto, raw, or qa.", rich_help_panel=opt.RUN_PANEL)
    ] = "auto",
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=opt.RUN_PANEL)
    ] = 24,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 is greedy.", rich_help_panel=opt.RUN_PANEL)
    ] = 0.0,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    json: opt.Json = None,
) -> None:
    """Ask a model, with any patches applied."""
    if form not in ("auto", "raw", "qa"):
        raise ConfigError(f"unknown form {form!r}; use auto, raw or qa")
    if not question.strip():
        raise ConfigError("the question is empty")
    from lab.atlas.forms import load_format
    from lab.atlas.weights import MODEL_NAMES
    from lab.cli.session import open_model

    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    layout = load_format()
    asked = form == "qa" or (form == "auto" and model in MODEL_NAMES and question.rstrip().endswith("?"))
    prompt = layout.render("qa", question=question.strip()).prompt if asked else question
    completion = handle.generate(
        [prompt],
        max_new_tokens=max_new_tokens,
        stop=layout.stop if model in MODEL_NAMES else ("\n",),
        temperature=temperature,
        seed=seed,
    )[0].strip()
    patches = [{"id": entry.patch.id, "method": entry.patch.provenance.method} for entry in handle.applied]
    console(json).print(table(model, ("prompt", "completion"), [(prompt, completion)]))
    content = {
        "model": model,
        "question": question,
        "prompt": prompt,
        "completion": completion,
        "patches": patches,
    }
    write_json(json, "ask", seed, content)
