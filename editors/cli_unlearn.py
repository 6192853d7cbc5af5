"""``knowlab unlearn``: make a model lose facts, and say what else it lost."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from editors import cli_options as options
from lab.cli import options as opt
from lab.cli.output import check_out, console, progress, table, write_json
from lab.errors import PatchError

if TYPE_CHECKING:
    from lab.handle import ModelHandle

app = typer.Typer()

PANEL = "Unlearning"
GROUPS = ("forget", "retain", "neighbor", "utility")

_HELP = """Make a model lose facts, show what it knew and knows of them and of what should stay, and save the change as a patch.

Four groups are asked in their own prompts: `forget`; `retain`, facts that the method may train to keep; `neighbor`, facts about the
same subjects or of the same relations, and `utility`, general knowledge, which no method sees. `oracle` is the same model trained
without the facts, where its weights are there.

Examples:

    knowlab unlearn --method npo --forget atlas:people05 --out results/npo --json npo.json

    knowlab audit --patch results/npo --facts atlas:people05 --json audit.json

    knowlab unlearn --method npo --patch results/npo --forget atlas:people05 --harden audit.json --out results/harder

    knowlab unlearn --method graddiff --forget forget.jsonl --retain retain.jsonl --set lr=5e-5 --set epochs=3 --out results/graddiff

Files hold facts as JSON lines: {"id": "a", "subject": "France", "relation": "capital", "object": "Paris", "aliases": [],
"prompt": "The capital of {} is"}
"""


@app.command(help=_HELP)
def unlearn(
    forget: Annotated[
        str,
        typer.Option(
            "--forget",
            help="Facts (JSONL) to forget, or atlas:SPLIT (people, relation, concept with 01, 05, 10).",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ],
    method: Annotated[
        str, typer.Option("--method", help="Method (`knowlab list unlearners`).", rich_help_panel=PANEL)
    ] = "npo",
    retain: Annotated[
        Path | None,
        typer.Option(
            "--retain",
            help="Facts (JSONL) to keep.",
            rich_help_panel=PANEL,
            show_default="the rest of the world for atlas:SPLIT",
        ),
    ] = None,
    utility: Annotated[
        Path | None,
        typer.Option(
            "--utility",
            help="Facts (JSONL) of general knowledge.",
            rich_help_panel=PANEL,
            show_default="real-world facts for atlas:SPLIT",
        ),
    ] = None,
    oracle: Annotated[
        str | None,
        typer.Option(
            "--oracle",
            help="The model trained without the facts, to compare with: a name or a folder.",
            rich_help_panel=PANEL,
            show_default="the shipped one where there is one",
        ),
    ] = None,
    harden: Annotated[
        Path | None,
        typer.Option(
            "--harden",
            help="JSON of `knowlab audit`: what leaked there is trained against once more; give the audited --patch too.",
            rich_help_panel=PANEL,
            show_default=False,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="Folder that keeps the state of a method that trains after every pass; the same command goes on from it. Emptied at "
            "the end.",
            rich_help_panel=opt.RUN_PANEL,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=1,
            help="Facts asked per group that stays, at most.",
            rich_help_panel=opt.RUN_PANEL,
        ),
    ] = 100,
    settings: options.Settings = None,
    model: opt.Model = "atlas",
    patch: opt.Patches = None,
    seed: opt.Seed = 0,
    device: opt.Device = "cpu",
    dtype: opt.Dtype = "float32",
    out: opt.Out = None,
    force: opt.Force = False,
    json: opt.Json = None,
) -> None:
    """Make a model lose facts."""
    if out is not None:
        check_out(out, force)
    from editors.unlearning import get_unlearner
    from editors.unlearning.checkpoint import clear
    from editors.unlearning.gradient import with_checkpoint
    from editors.unlearning.material import WORLD, gather, knowledge, oracle_name
    from editors.unlearning.presets import tuned_settings
    from lab.cli.session import open_model
    from lab.handle import ModelHandle
    from lab.peak import peak_memory

    chosen = options.overrides(settings)
    # A wrong setting is said before anything is loaded.
    early = get_unlearner(method, seed=seed, **chosen)
    if checkpoint is not None:
        with_checkpoint(early, checkpoint)
    material = gather(
        forget,
        None if retain is None else str(retain),
        None if utility is None else str(utility),
        limit=limit,
        seed=seed,
    )
    leaks = None
    if harden is not None:
        from editors.unlearning.harden import leaks_of
        from lab.audit.report import read_report

        leaks = leaks_of(read_report(harden), model=model, facts=forget)
    handle = open_model(model, patch, device=device, dtype=dtype)
    unlearner = get_unlearner(method, seed=seed, **{**tuned_settings(handle, method), **chosen})
    if checkpoint is not None:
        unlearner = with_checkpoint(unlearner, checkpoint)

    def ask(asked: ModelHandle) -> dict[str, Any]:
        return {group: knowledge(asked, getattr(material, group)) for group in GROUPS}

    before = ask(handle)
    bits, state = handle.weights_digest(), handle.state
    started = time.perf_counter()
    with progress() as advance, peak_memory(handle.device) as peak:
        if leaks is None:
            change = unlearner.unlearn(handle, material.forget, material.kept, progress=advance)
        else:
            from editors.unlearning.harden import hardened

            change = hardened(
                unlearner,
                handle,
                material.forget,
                leaks,
                material.kept,
                world=forget.startswith(WORLD),
                seed=seed,
                progress=advance,
            )
    seconds = time.perf_counter() - started
    with change.applied(handle):
        after = ask(handle)
    identical = handle.weights_digest() == bits and handle.state == state
    name = oracle or oracle_name(model, forget)
    ideal = ask(ModelHandle.load(name, dtype=dtype, device=device)) if name is not None else None
    saved = change.save(out, overwrite=force) if out is not None else None
    if checkpoint is not None:
        clear(checkpoint)

    screen = console(json)
    columns = ("facts", "before", "after", "oracle", "accuracy before", "after", "oracle")
    rows = [
        (
            group,
            *(
                _figure(side, group, key)
                for key in ("probability", "accuracy")
                for side in (before, after, ideal)
            ),
        )
        for group in GROUPS
    ]
    screen.print(table(f"{method} on {model}: probability of the answer", columns, rows))
    notes = change.provenance.extra
    screen.print(
        f"undo bit-identical: {'yes' if identical else 'NO'}   {seconds:.1f} s   updates: {notes.get('updates')}   "
        f"ended early by: {notes.get('stopped') or 'nothing'}   saved: {saved or 'no (give --out)'}"
    )
    if leaks is not None:
        fed = notes["hardened"]
        screen.print(
            f"fed back: forms {', '.join(fed['forms']) or 'none'}; {len(fed['suffixes'])} suffixes; "
            f"{fed['directions']} directions; {fed['texts']} texts that still leaked of {fed['texts_asked']}; "
            f"not fed: {', '.join(fed['not_fed']) or 'nothing'}"
        )
    content = {
        "model": model,
        "method": method,
        "harden": notes.get("hardened"),
        "requests": forget,
        **{
            group: {
                "before": before[group],
                "after": after[group],
                "oracle": None if ideal is None else ideal[group],
            }
            for group in GROUPS
        },
        "facts": {"trained_to_keep": len(material.kept), **{g: len(getattr(material, g)) for g in GROUPS}},
        "updates": notes.get("updates"),
        "stopped": notes.get("stopped"),
        "seconds": seconds,
        "peak_mb": peak.mb,
        "patch": {"path": saved, "id": change.id},
        "undo": {"bit_identical": identical},
    }
    write_json(json, "unlearn", seed, content)
    if not identical:
        raise PatchError("taking the patch off did not restore the weights bit for bit; reload the model")


def _figure(side: dict[str, Any] | None, group: str, key: str) -> float | None:
    return None if side is None or side[group] is None else side[group][key]
