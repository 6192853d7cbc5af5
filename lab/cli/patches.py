"""``knowlab patch``: look at a saved change, prove it, combine or scale it, hand it to other tools."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lab.cli import options as opt
from lab.cli.output import console, table, write_json
from lab.errors import ConfigError, PatchError

if TYPE_CHECKING:
    from lab.handle import ModelHandle
    from lab.memory import MemoryPatch
    from lab.patch import WeightPatch

app = typer.Typer()
group = typer.Typer(
    help="Saved changes: show, verify, compose, scale, merge into a model, export.", no_args_is_help=True
)
app.add_typer(group, name="patch")

Folder = Annotated[Path, typer.Argument(help="Folder of a saved patch or PEFT adapter.", show_default=False)]
Folders = Annotated[list[Path], typer.Argument(help="Patch folders, in order.", show_default=False)]
OutFolder = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        help="Folder to write; must be empty.",
        rich_help_panel=opt.OUTPUT_PANEL,
        show_default=False,
    ),
]


class ExportFormat(StrEnum):
    """What other tools read."""

    PEFT = "peft"
    HF = "hf"


@group.command()
def show(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved patch.", show_default=False)],
    json: opt.Json = None,
) -> None:
    """Say what a patch changes, how it was made, and on which base.

    Example: `knowlab patch show edits/rome`
    """
    from lab.patch import WeightPatch
    from lab.patch_io import load_saved

    patch = load_saved(folder)
    out = console(json)
    note = patch.provenance
    facts = [
        ("id", patch.id),
        ("base", patch.base),
        ("method", note.method),
        ("seed", note.seed),
        ("requests", len(note.requests)),
    ]
    facts += [("parents", " ".join(patch.parents) or None)]
    out.print(
        table(
            str(folder),
            ("field", "value"),
            [(key, str(value) if value is not None else None) for key, value in facts],
        )
    )
    if isinstance(patch, WeightPatch):
        norms = patch.norms()
        parts = [
            {"name": name, "rank": delta.rank, "shape": delta.shape, "norm": norms[name]}
            for name, delta in patch.deltas.items()
        ]
        rows = [(part["name"], part["rank"], str(part["shape"]), part["norm"]) for part in parts]
        out.print(table("Deltas", ("parameter", "rank", "shape", "norm"), rows))
        held: dict[str, Any] = {"rank": patch.rank, "deltas": parts}
    else:
        memory = patch.memory
        shapes = {name: tuple(tensor.shape) for name, tensor in memory.tensors().items()}
        rows = [(name, str(shape)) for name, shape in shapes.items()]
        out.print(table(f"Memory: {memory.kind}", ("tensor", "shape"), rows))
        held = {"kind": memory.kind, "tensors": shapes, "settings": memory.settings()}
    content = {
        "id": patch.id,
        "base": patch.base,
        "parents": patch.parents,
        **held,
        "provenance": note.to_json(),
    }
    write_json(json, "patch show", note.seed, content)


@group.command()
def verify(
    folder: Folder,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    quantize: opt.Quantize = None,
    json: opt.Json = None,
) -> None:
    """Prove on a model that a patch is intact, belongs to it, changes it, and comes off without a trace.

    Give the patches it was computed on top of with `--patch`.

    Example: `knowlab patch verify edits/rome --model atlas`
    """
    from lab.patch import WeightPatch

    handle, change = _open(folder, model, patch, device, dtype, quantize)
    state, bits = handle.state, handle.weights_digest()
    with change.applied(handle) as entry:
        changed = handle.weights_digest() != bits
    checks = {"intact": True, "base": True}
    # What stands beside the weights must leave them alone; a weight patch that changes none is an empty one.
    if entry.mode == "merge":
        checks["changes_weights"] = changed
    else:
        checks["leaves_weights"] = not changed
    if isinstance(change, WeightPatch) and entry.mode == "sidecar":
        checks["changes_outputs"] = any(change.norms().values())
    checks["undo.bit_identical"] = handle.weights_digest() == bits and handle.state == state
    console(json).print(table(f"{folder} on {model}", ("check", "holds"), list(checks.items())))
    content = {
        "model": model,
        "id": change.id,
        "changes_weights": changed,
        "undo": {"bit_identical": checks["undo.bit_identical"]},
        "ok": all(checks.values()),
    }
    write_json(json, "patch verify", change.provenance.seed, content)
    if not content["ok"]:
        raise PatchError(f"{folder} fails: {', '.join(name for name, held in checks.items() if not held)}")


@group.command()
def compose(folders: Folders, out: OutFolder, force: opt.Force = False, json: opt.Json = None) -> None:
    """Add patches of one base into a single patch.

    Example: `knowlab patch compose edits/a edits/b --out edits/both`
    """
    from lab.patch import WeightPatch

    first, *rest = [WeightPatch.load(folder) for folder in folders]
    total = sum(rest, start=first)
    total.save(out, overwrite=force)
    console(json).print(f"{len(folders)} patches, rank {total.rank} -> {out}")
    content = {
        "id": total.id,
        "parts": [part.id for part in (first, *rest)],
        "patch": {"path": out, "rank": total.rank},
    }
    write_json(json, "patch compose", total.provenance.seed, content)


@group.command()
def scale(
    folder: Annotated[Path, typer.Argument(help="Folder of a saved patch.", show_default=False)],
    by: Annotated[
        float,
        typer.Option("--by", help="0 is nothing, 1 the patch itself, -1 its opposite.", show_default=False),
    ],
    out: OutFolder,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Write a patch times a number: a dose of it.

    Example: `knowlab patch scale results/npo --by 0.5 --out results/npo-half`
    """
    import math

    from lab.patch import WeightPatch

    if not math.isfinite(by):
        raise ConfigError(f"a patch cannot be taken {by} times; give a finite number")
    before = WeightPatch.load(folder)
    scaled = before.scaled(by)
    scaled.save(out, overwrite=force)
    console(json).print(f"{by:g} times {folder} -> {out}")
    content = {
        "id": scaled.id,
        "of": before.id,
        "factor": by,
        "patch": {"path": out, "norms": scaled.norms()},
    }
    write_json(json, "patch scale", scaled.provenance.seed, content)


@group.command()
def merge(
    folders: Folders,
    out: OutFolder,
    model: opt.Model = "atlas",
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Write the model with patches merged into its weights, as any Hugging Face tool loads it.

    Example: `knowlab patch merge edits/rome --model atlas --out merged`
    """
    _write_merged("patch merge", folders, out, model, device, dtype, force, json)


@group.command()
def export(
    folder: Folder,
    out: OutFolder,
    format: Annotated[
        ExportFormat, typer.Option("--format", help="peft: a LoRA adapter; hf: the whole model, merged.")
    ] = ExportFormat.PEFT,
    rank: Annotated[
        int | None,
        typer.Option(
            "--rank", min=1, help="Cut to this rank; dense changes need it for peft.", show_default=False
        ),
    ] = None,
    model: opt.Model = "atlas",
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Hand a patch to other tools: a LoRA adapter for peft and vLLM, or a merged model.

    Example: `knowlab patch export edits/rome --format peft --out adapter`
    """
    if format is ExportFormat.HF:
        if rank is not None:
            raise ConfigError("--rank belongs to --format peft")
        _write_merged("patch export", [folder], out, model, device, dtype, force, json)
        return
    from lab.files import write_folder
    from lab.patch import WeightPatch

    handle, change = _open(folder, model, None, device, dtype, None)
    if not isinstance(change, WeightPatch):
        raise PatchError(f"{folder} is a {type(change).__name__}; this command needs a patch of weights")
    errors: dict[str, float] = {}
    write_folder(
        out,
        lambda fresh: errors.update(change.to_peft(fresh, handle, rank=rank).relative_error),
        overwrite=force,
    )
    console(json).print(f"LoRA adapter -> {out}, largest relative error {max(errors.values()):.3g}")
    content = {"format": "peft", "path": out, "relative_error": errors, "model": model}
    write_json(json, "patch export", change.provenance.seed, content)


def _open(
    folder: Path, model: str, patches: list[Path] | None, device: str, dtype: str, quantize: str | None
) -> tuple[ModelHandle, WeightPatch | MemoryPatch]:
    from lab.cli.session import open_model
    from lab.memory import MemoryPatch
    from lab.patch import WeightPatch
    from lab.patch_io import read_patch

    handle = open_model(model, patches, device=device, dtype=dtype, quantize=quantize)
    change = read_patch(folder, handle)
    if not isinstance(change, (WeightPatch, MemoryPatch)):
        raise PatchError(f"{folder} is a {type(change).__name__}; this command needs a patch of our own")
    return handle, change


def _write_merged(
    command: str,
    folders: list[Path],
    out: Path,
    model: str,
    device: str,
    dtype: str,
    force: bool,
    json: Path | None,
) -> None:
    from lab.cli.session import open_model
    from lab.files import write_folder
    from lab.patch import WeightPatch
    from lab.patch_io import read_patch

    handle = open_model(model, device=device, dtype=dtype)
    ids = []
    for folder in folders:
        change: Any = read_patch(folder, handle)
        if not isinstance(change, WeightPatch):
            raise PatchError(f"{folder} is a {type(change).__name__}; only patches of weights can be merged")
        change.apply(handle, "merge")
        ids.append(change.id)

    def fill(fresh: Path) -> None:
        handle.model.save_pretrained(fresh)
        handle.tokenizer.save_pretrained(fresh)

    write_folder(out, fill, overwrite=force)
    console(json).print(f"{model} with {len(ids)} patches merged -> {out}")
    write_json(json, command, None, {"format": "hf", "path": out, "model": model, "patches": ids})
