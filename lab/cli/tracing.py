"""``knowlab trace``: where in the model an answer comes from, and what a patch does to the attention."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import PatchError

app = typer.Typer()

_HELP = """Trace where an answer comes from: hide the subject under noise, restore one activation at a time, see how much of the answer
returns (causal tracing). With `--drift PATCH`, measure instead how far a patch moves the attention of the last prompt token to the
subject, head by head.

Examples:

    knowlab trace --prompt "The capital of {} is" --subject France --kind mlp --png trace.png

    knowlab trace --prompt "The capital of {} is" --subject France --drift edits/rome --png drift.png --json drift.json
"""

TRACE_PANEL = "Trace"


class Kind(StrEnum):
    """What is restored."""

    BLOCK = "block"
    MLP = "mlp"
    ATTN = "attn"


@app.command(help=_HELP)
def trace(
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            help="Prompt; `{}` may stand for the subject.",
            rich_help_panel=TRACE_PANEL,
            show_default=False,
        ),
    ],
    subject: Annotated[
        str,
        typer.Option(
            "--subject", help="Who or what it is about.", rich_help_panel=TRACE_PANEL, show_default=False
        ),
    ],
    kind: Annotated[
        Kind, typer.Option("--kind", help="What is restored.", rich_help_panel=TRACE_PANEL)
    ] = Kind.BLOCK,
    window: Annotated[
        int | None,
        typer.Option(
            "--window",
            min=1,
            help="Layers restored together.",
            rich_help_panel=TRACE_PANEL,
            show_default="ROME's share of the depth",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Noise samples.", rich_help_panel=TRACE_PANEL)
    ] = 10,
    drift: Annotated[
        Path | None,
        typer.Option(
            "--drift",
            help="Patch whose attention drift is measured.",
            rich_help_panel=TRACE_PANEL,
            show_default=False,
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png", help="Write the map to this file.", rich_help_panel=opt.OUTPUT_PANEL, show_default=False
        ),
    ] = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    json: opt.Json = None,
) -> None:
    """Trace where an answer comes from, or what a patch does to the attention."""
    from lab.cli.session import open_model

    handle = open_model(model, patch, device=device, dtype=dtype, quantize=quantize)
    screen = console(json)
    content: dict[str, Any] = {"model": model, "prompt": prompt, "subject": subject, "png": png}
    if drift is not None:
        from lab.attention import attention_drift
        from lab.patch import WeightPatch
        from lab.patch_io import read_patch

        change = read_patch(drift, handle)
        if not isinstance(change, WeightPatch):
            raise PatchError(
                f"{drift} is a {type(change).__name__}; attention drift is measured for patches of weights"
            )
        report = attention_drift(handle, change, [prompt], [subject])
        rows = [(layer, float(value)) for layer, value in enumerate(report.max_head)]
        screen.print(table(f"Largest head drift to {subject!r}", ("layer", "drift"), rows))
        content |= report.to_json()
        if png is not None:
            report.plot(png)
    else:
        from lab.causal import causal_trace

        result = causal_trace(
            handle, prompt, subject, kind=kind.value, window=window, samples=samples, seed=seed
        )
        strongest = result.effects.max(dim=1)
        rows = [
            (
                text,
                "*" if index in result.subject else "",
                float(strongest.values[index]),
                int(strongest.indices[index]),
            )
            for index, text in enumerate(result.tokens)
        ]
        heading = f"{prompt.replace('{}', subject)} -> {result.answer.strip()}   p {result.clean:.3f}, under noise {result.corrupted:.3f}"
        screen.print(table(heading, ("token", "subject", "largest effect", "at layer"), rows))
        content |= result.to_json()
        content["subject"] = subject
        content["subject_tokens"] = [result.subject.start, result.subject.stop]
        if png is not None:
            result.plot(png)
    if png is not None:
        screen.print(f"map -> {png}")
    write_json(json, "trace", seed, content)
