"""Times edits against the plain way of making them, and against EasyEdit where a checkout of it is given.

    python tests/benchmarks/editing_speed.py --json results/editing_speed.json [--easyedit PATH] [--quick]

GPT-2 of 124 M parameters and a Llama of 110 M, random weights, fp32. All sides get the same model, prefixes, key statistics, settings
and requests (facts of the built-in world in its tokenizer), and take turns. Four parts:

- ``rome``: one ROME edit of 20 steps over 21 prefixes.
- ``memit``: a batch of 50. Of the others only ``--sample`` value searches run and are scaled, and all of the writing. The sample is even
  over the lengths of the rows, for a search costs as much as it has tokens.
- ``single``: 50 ROME edits, each scored before and after (1 prompt, 2 paraphrases, up to 9 neighbors, the same behind the edited
  statement, a text of 100 tokens). Of the others ``--sample`` cases run, chosen like that, and are scaled.
- ``alphaedit``: the writing of 500 edits in a row whose values are given. Of the others ``--writes`` run and are scaled: their cost does
  not grow.

``gflop``, ``plain_gflop`` and ``easyedit_gflop`` (with ``--flops``) are operations of matrix products per edit, in 1e9. No way of
computing the same can be faster by more than their ratio on a machine where every side is bound by these products.

``plain_ratio`` and ``easyedit_ratio`` are seconds of the other over ours, ``*_cpu_ratio`` the same in processor time: on a machine that
other programs use, those count. ``*_cosine`` is the smallest cosine of any layer between the updates. The plain way is
``tests/reference/whole_edits.py``. Finished parts are kept beside the JSON file, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from editors import get_editor
from editors.alphaedit import AlphaEditor
from editors.spread import SpreadEditor, prepare
from lab.arch import Role
from lab.data.cases import EditCase
from lab.eval import SuiteOptions, evaluate_editing, get_suite
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import write_text_atomically
from tests.benchmarks.speed_sides import (
    QUICK,
    Sides,
    Size,
    Turn,
    change,
    counterfact_cases,
    dense,
    easy_record,
    file,
    flops,
    given_values,
    restore,
    save_values,
    shared_ready,
    summary,
    timed,
    typical,
    weights,
)
from tests.reference.single_edits import plain_single_edits
from tests.reference.whole_edits import AlphaEditSolve, PlainBatches, memit_solve

PARTS = ("rome", "alphaedit", "memit", "single")
SHAPES = ("gpt2", "llama")


def rome(sides: Sides) -> dict[str, Any]:
    """One edit at a time."""
    clamp, layer = 4.0, sides.rome_layer
    editor = get_editor(
        "rome", layers=(layer,), clamp=clamp, prefixes=sides.rome_prefixes, **sides.search, **sides.statistics
    )
    inverse = torch.inverse(sides.moments[layer]).float()
    ours = plain = easy = Turn()
    worst: dict[str, float] = {}
    row: dict[str, Any] = {}
    # The first pass pays for memory and kernel choice.
    get_editor(
        "rome",
        layers=(layer,),
        prefixes=sides.rome_prefixes,
        **{**sides.search, "steps": 1},
        **sides.statistics,
    ).edit(sides.ours, sides.requests(1))
    for request in sides.requests(sides.size.rounds):
        patch, turn = timed(lambda request=request: editor.edit(sides.ours, [request]))
        ours += turn
        (name,) = patch.deltas
        factors, turn = timed(lambda request=request: sides.edit_plainly(request, inverse, clamp))
        plain += turn
        theirs = {"plain": {name: torch.outer(*factors)}}
        if sides.easy is not None:
            theirs["easyedit"], turn = timed(
                lambda request=request: sides.easy.edit_rome(request, layer, clamp)  # type: ignore[union-attr]
            )
            easy += turn
        row = summary(ours, plain, easy if sides.easy else None, dense(patch), theirs)
        for key, value in row.items():
            if key.endswith("_cosine"):
                worst[key] = min(value, worst.get(key, 1.0))
    return row | worst | {"edits": sides.size.rounds}


def spread_settings(sides: Sides) -> dict[str, Any]:
    """Of MEMIT and AlphaEdit."""
    return {
        "layers": sides.size.edited,
        "clamp": 0.75,
        "prefixes": sides.prefixes,
        **sides.search,
        **sides.statistics,
    }


def memit(sides: Sides) -> dict[str, Any]:
    """A batch."""
    size, weight = sides.size, 15000.0
    requests, last = sides.requests(size.batch), size.edited[-1]
    chosen = typical(sides.suffixes(size.batch), size.sample)
    sample = len(chosen)
    editor = get_editor("memit", mom2_weight=weight, **spread_settings(sides))
    assert isinstance(editor, SpreadEditor)
    before = weights(sides.plain, size.edited)

    with sides.ours.writing():
        # Factors are made once per model; so are EasyEdit's statistics.
        for stats in sides.cache.get(sides.ours, size.edited, sides.statistics["corpus"]).values():
            stats.factor()
        ready, searching = timed(lambda: prepare(sides.ours, editor.options, editor.method, requests, None))
        patch, writing = timed(lambda: editor._patch(sides.ours, requests, ready, None))
    ours = searching + writing
    targets = torch.stack([value.target for value in ready.values], dim=1)

    plain = Turn()
    for index in chosen:
        request = requests[index]
        found, turn = timed(lambda request=request: sides.search_plainly(request, Role.BLOCK, last, 0.75))
        targets[:, index] = found
        plain += turn
    downs = [sides.plain.module(Role.MLP_OUT, layer) for layer in size.edited]
    moments = [sides.moments[layer] for layer in size.edited]
    batches = PlainBatches(
        sides.plain.model, downs, sides.plain.module(Role.BLOCK, last), memit_solve(moments, weight)
    )
    rows = [sides.rows(request, sides.prefixes) for request in requests]
    _, turn = timed(lambda: batches.write(rows, targets))
    plain = plain * (size.batch / sample) + turn
    theirs = {"plain": change(before, weights(sides.plain, size.edited))}
    restore(sides.plain, before)

    easy = None
    if sides.easy is not None:
        folder = sides.folder / f"memit-{sides.shape}"
        save_values(folder, requests, targets)
        for index in chosen:
            file(folder, requests[index]).unlink()
        searched = Turn()
        method = sides.easy.memit
        search = method.compute_z

        def clocked(*args: Any) -> Any:
            nonlocal searched
            found, turn = timed(lambda: search(*args))
            searched += turn
            return found

        method.compute_z = clocked
        try:
            theirs["easyedit"], whole = timed(
                lambda: sides.easy.edit_memit(requests, size.edited, 0.75, weight, folder)  # type: ignore[union-attr]
            )
        finally:
            method.compute_z = search
        easy = whole + searched * (size.batch / sample - 1)
    row = summary(ours, plain, easy, dense(patch), theirs)
    return row | {"batch": size.batch, "sample": sample, "write_cpu_seconds": writing.cpu}


def alphaedit(sides: Sides) -> dict[str, Any]:
    """Writing one edit after another, values given."""
    size, l2 = sides.size, 10.0
    requests, last = sides.requests(size.sequence), size.edited[-1]
    editor = get_editor(
        "alphaedit", l2=l2, nullspace_threshold=0.5, threshold_mode="relative", **spread_settings(sides)
    )
    assert isinstance(editor, AlphaEditor)
    stats = sides.cache.get(sides.ours, size.edited, sides.statistics["corpus"])
    kept = {
        layer: each.null_space(0.5 * float(each.moment.diagonal().mean())) for layer, each in stats.items()
    }
    values = given_values(sides, requests, last)
    shared = shared_ready(sides, editor, requests[0])
    # A handle of its own, whose many patches need not be undone one by one afterwards.
    first = ModelHandle.wrap(sides.ours.model, sides.ours.tokenizer, name=sides.ours.name)
    patches: list[WeightPatch] = []

    def write(begin: int, end: int) -> None:
        for request, value in zip(requests[begin:end], values[begin:end], strict=True):
            ready = replace(shared, values=(value,))
            patch = editor._patch(first, [request], ready, tuple(patches), kept, None)
            patch.apply(first)
            patches.append(patch)

    projectors = [kept[layer].dense().float() for layer in size.edited]
    solver = AlphaEditSolve(projectors, l2)
    downs = [sides.plain.module(Role.MLP_OUT, layer) for layer in size.edited]
    batches = PlainBatches(
        sides.plain.model, downs, sides.plain.module(Role.BLOCK, last), solver.solve, solver.after
    )
    start = weights(sides.plain, size.edited)
    folder = sides.folder / f"alphaedit-{sides.shape}"
    if sides.easy is not None:
        save_values(folder, requests[: size.writes], torch.stack([v.target for v in values], dim=1))
        sides.easy.begin_alphaedit(projectors, folder)
    writes, turns = min(size.writes, size.sequence), min(4, size.writes)
    ours = plain = easy = Turn()
    found: dict[str, Tensor] = {}
    for turn_number in range(turns):
        # As many of ours as there are of theirs first, so that the same state can be compared; then the rest.
        begin, end = (writes * (turn_number + place) // turns for place in (0, 1))
        ours += timed(lambda begin=begin, end=end: write(begin, end))[1]
        for index in range(begin, end):
            rows = [sides.rows(requests[index], sides.prefixes)]
            target = values[index].target[:, None]
            plain += timed(lambda rows=rows, target=target: batches.write(rows, target))[1]
            if sides.easy is not None:
                easy += timed(
                    lambda index=index: sides.easy.write_alphaedit(  # type: ignore[union-attr]
                        requests[index], size.edited, 0.75, l2, folder
                    )
                )[1]
    for patch in patches:
        for name, delta in dense(patch).items():
            found[name] = found.get(name, torch.zeros_like(delta)) + delta
    theirs = {"plain": change(start, weights(sides.plain, size.edited))}
    if sides.easy is not None:
        theirs["easyedit"] = change(start, sides.easy_weights(size.edited))
        restore(sides.easy.handle, start)
    restore(sides.plain, start)
    early = ours.cpu / writes
    ours += timed(lambda: write(writes, size.sequence))[1]
    scale = size.sequence / writes
    restore(sides.ours, start)
    row = summary(ours, plain * scale, easy * scale if sides.easy else None, found, theirs)
    return row | {
        "sequence": size.sequence,
        "writes": writes,
        "cpu_seconds_per_early_edit": early,
        "cpu_seconds_per_edit": ours.cpu / size.sequence,
        "ranks": [kept[layer].rank for layer in size.edited],
    }


def single(sides: Sides) -> dict[str, Any]:
    """Independent edits, each with its whole evaluation."""
    size, clamp, layer = sides.size, 4.0, sides.rome_layer
    chosen = typical(sides.suffixes(size.edits), size.sample)
    sample = len(chosen)
    cases = counterfact_cases(sides.cases[: size.edits])
    suite = get_suite("counterfact", SuiteOptions(fluency=True, text_tokens=size.text))
    editor = get_editor(
        "rome", layers=(layer,), clamp=clamp, prefixes=sides.rome_prefixes, **sides.search, **sides.statistics
    )
    report, ours = timed(lambda: evaluate_editing(suite, sides.ours, editor, cases, in_order=True))
    inverse = torch.inverse(sides.moments[layer]).float()
    name = sides.plain.weight(Role.MLP_OUT, layer).name
    sampled = [cases.cases[index] for index in chosen]

    def work(case: EditCase) -> None:
        (request,) = case.requests
        left, right = sides.edit_plainly(request, inverse, clamp)
        delta = LowRank(left[:, None], right[None])
        patch = WeightPatch(sides.plain.fingerprint, {name: delta}, Provenance("plain"))
        plain_single_edits(sides.plain, suite, [case], [patch])

    def their_work(case: EditCase) -> None:
        assert sides.easy is not None
        sides.easy.single(case.requests[0], easy_record(case), layer, clamp, text=True)

    plain = easy = Turn()
    for case in sampled:
        plain += timed(partial(work, case))[1]
        if sides.easy is not None:
            easy += timed(partial(their_work, case))[1]
    counted: dict[str, Any] = {}
    if sides.flops:
        some = replace(cases, cases=tuple(sampled))
        counted = {
            "gflop": flops(lambda: evaluate_editing(suite, sides.ours, editor, some, in_order=True)) / sample,
            "plain_gflop": sum(flops(partial(work, case)) for case in sampled) / sample,
        }
        if sides.easy is not None:
            counted["easyedit_gflop"] = sum(flops(partial(their_work, case)) for case in sampled) / sample
    scale = size.edits / sample
    row = summary(ours, plain * scale, easy * scale if sides.easy else None, {}, {})
    return row | {"edits": report.n, "sample": sample} | counted


MEASURES: dict[str, Callable[[Sides], dict[str, Any]]] = {
    "rome": rome,
    "memit": memit,
    "single": single,
    "alphaedit": alphaedit,
}


def measure(
    size: Size,
    shapes: Sequence[str],
    parts: Sequence[str],
    easyedit: Path | None,
    folder: Path,
    *,
    flops: bool = False,
) -> dict[str, Any]:
    """All figures; finished parts are taken from ``folder``."""
    results: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        sides: Sides | None = None
        for part in parts:
            cell = folder / f"{shape}-{part}{'-easyedit' if easyedit else ''}.json"
            if cell.is_file():
                results.setdefault(shape, {})[part] = json.loads(cell.read_text())
                continue
            sides = sides or Sides.make(shape, size, easyedit, folder, flops=flops)
            row = MEASURES[part](sides)
            write_text_atomically(cell, json.dumps(row, indent=2) + "\n")
            print(shape, part, json.dumps(row), file=sys.stderr, flush=True)
            results.setdefault(shape, {})[part] = row
    return results


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here; finished parts lie beside it")
    parser.add_argument("--easyedit", type=Path, help="a checkout of zjunlp/EasyEdit, to be timed as well")
    parser.add_argument("--quick", action="store_true", help="small models, few steps and edits")
    parser.add_argument(
        "--flops", action="store_true", help="count operations of the part single too, in runs of their own"
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="gpt2, llama, or both")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    for name in ("steps", "batch", "edits", "writes", "sequence", "sample", "rounds"):
        parser.add_argument(f"--{name}", type=int, help=f"instead of {getattr(Size(), name)}")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = QUICK if options.quick else Size()
    chosen = {name: value for name in vars(size) if (value := getattr(options, name, None)) is not None}
    size = replace(size, **chosen)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if options.json is None else options.json.with_suffix("")
        results = measure(
            size,
            options.shapes.split(","),
            options.parts.split(","),
            options.easyedit,
            folder,
            flops=options.flops,
        )
    figures = {
        "schema_version": 1,
        "command": "editing_speed",
        "seed": 0,
        "shapes": results,
        "threads": torch.get_num_threads(),
        "quick": options.quick,
        "torch": torch.__version__,
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")


if __name__ == "__main__":
    main()
