"""Times edits against the plain way of making them, and against EasyEdit where a checkout of it is given.

    python tests/benchmarks/editing_speed.py --json results/editing_speed.json [--easyedit PATH] [--quick]

GPT-2 of 124 M parameters and a Llama of 110 M, random weights, fp32. All sides get the same model, prefixes, key statistics, settings
and requests (facts of the built-in world in its tokenizer), and take turns. Four parts:

- ``rome``: one ROME edit of 20 steps over 21 prefixes.
- ``memit``: a batch of 50. Of the others only ``--sample`` value searches run and are scaled, and all of the writing.
- ``single``: 50 ROME edits, each scored before and after (1 prompt, 2 paraphrases, up to 9 neighbors, a text of 100 tokens). Of the
  others ``--sample`` cases run and are scaled.
- ``alphaedit``: the writing of 500 edits in a row whose values are given. Of the others ``--writes`` run and are scaled: their cost does
  not grow.

``plain_ratio`` and ``easyedit_ratio`` are seconds of the other over ours, ``*_cpu_ratio`` the same in processor time: on a machine that
other programs use, those count. ``*_cosine`` is the smallest cosine of any layer between the updates. The plain way is
``tests/reference/whole_edits.py``. Finished parts are kept beside the JSON file, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from editors import get_editor
from editors.alphaedit import AlphaEditor
from editors.rows import essence_row, request_rows
from editors.spread import Ready, SpreadEditor, SpreadMethod, prepare
from editors.values import StepLoss, ValueResult
from lab.arch import Role
from lab.atlas.weights import weights_path
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.eval import SuiteOptions, evaluate_editing, get_suite
from lab.eval.atlas import atlas_cases
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import EditRequest, write_text_atomically
from lab.stats import Corpus, StatsCache
from tests.benchmarks.speed_easyedit import EasyEdit, enter
from tests.reference.single_edits import plain_single_edits
from tests.reference.value_search import PlainRow, plain_value_search
from tests.reference.whole_edits import (
    AlphaEditSolve,
    PlainBatches,
    cosines,
    memit_solve,
    plain_rome,
    weight_of,
)

PARTS = ("rome", "alphaedit", "memit", "single")
SHAPES = ("gpt2", "llama")
WORDS = (" house", " year", " people", " river", " name", " list", " first", " time", " old", " city")


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        layers, width, vocabulary: Of the models.
        steps: Of a value search.
        batch, edits, writes, sequence, sample: Of the parts; see the module.
        rounds: How often the sides take turns where one turn is one edit.
        text: Tokens of a text.
        tokens: Of the key statistics.
        edited: Blocks of the batch methods; ROME takes the second of them.
    """

    layers: int = 12
    width: int = 768
    vocabulary: int = 0
    steps: int = 20
    batch: int = 50
    edits: int = 50
    writes: int = 20
    sequence: int = 500
    sample: int = 10
    rounds: int = 1
    text: int = 100
    tokens: int = 12_288
    edited: tuple[int, ...] = (4, 5, 6, 7, 8)


QUICK = Size(4, 64, 3072, 3, 4, 4, 2, 6, 2, 1, 12, 2000, (1, 2))


@dataclass(frozen=True)
class Turn:
    """Wall and processor seconds of one side, added up."""

    wall: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Turn) -> Turn:
        return Turn(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Turn:
        return Turn(self.wall * factor, self.cpu * factor)


def timed(work: Callable[[], Any]) -> tuple[Any, Turn]:
    """What ``work`` returns, and its seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, Turn(time.perf_counter() - wall, time.process_time() - cpu)


def model_of(shape: str, size: Size) -> Any:
    """A model with random weights."""
    torch.manual_seed(0)
    if shape == "gpt2":
        vocabulary = size.vocabulary or 50257
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_layer=size.layers,
                n_embd=size.width,
                n_head=size.width // 64 or 1,
                bos_token_id=0,
                eos_token_id=vocabulary - 1,
            )
        )
    vocabulary = size.vocabulary or 32000
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 64 or 1,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=vocabulary - 1,
        )
    )


def templates(groups: Sequence[tuple[int, int]]) -> list[str]:
    """The plain template and made-up prefixes of ``(words, number)``."""
    made = ["{}"]
    for words, number in groups:
        for start in range(number):
            chosen = [WORDS[(start * 3 + step) % len(WORDS)] for step in range(words)]
            made.append("The" + "".join(chosen) + ". {}")
    return made


@dataclass
class Sides:
    """The same model three times, and what all sides share.

    Attributes:
        shape, size: Of the model.
        ours, plain: Handles.
        easy: EasyEdit, or nothing.
        folder: For files of this run.
    """

    shape: str
    size: Size
    ours: ModelHandle
    plain: ModelHandle
    easy: EasyEdit | None
    folder: Path

    rome_prefixes = templates([(4, 10), (9, 10)])
    prefixes = templates([(9, 5)])

    @classmethod
    def make(cls, shape: str, size: Size, easyedit: Path | None, folder: Path) -> Sides:
        """Builds models and statistics."""
        place = weights_path("atlas")
        if place is None:
            raise SystemExit("the tokenizer of the built-in model is missing from this checkout")
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = model_of(shape, size).eval()
        handles = [
            ModelHandle.wrap(copy.deepcopy(model), tokenizer, name=f"{shape}-random") for _ in range(3)
        ]
        found = cls(shape, size, handles[0], handles[1], None, folder)
        if easyedit is not None:
            enter(easyedit)
            found.easy = EasyEdit(handles[2], found.moments, cls.rome_prefixes, cls.prefixes, found.search)
        return found

    @property
    def search(self) -> dict[str, Any]:
        """Of every value search, but for the clamp."""
        return {"steps": self.size.steps, "lr": 0.5, "weight_decay": 0.5, "kl_factor": 0.0625}

    @property
    def rome_layer(self) -> int:
        """Where ROME edits."""
        return self.size.edited[1]

    @property
    def statistics(self) -> dict[str, Any]:
        """Arguments of editors."""
        return {"stats": self.cache, "corpus": Corpus("atlas", self.size.tokens)}

    @cached_property
    def cache(self) -> StatsCache:
        """Key statistics in the run's folder."""
        return StatsCache(self.folder / "stats")

    @cached_property
    def moments(self) -> dict[int, Tensor]:
        """Layer to ``[in, in]``, with as much of a ridge as our own factor takes."""
        found = self.cache.get(self.ours, self.size.edited, self.statistics["corpus"])
        return {
            layer: stats.moment + stats.factor().ridge * torch.eye(len(stats.moment), dtype=torch.float64)
            for layer, stats in found.items()
        }

    @cached_property
    def cases(self) -> list[EditCase]:
        """Facts of the built-in world, one per subject, whose tokens are the same however a prompt and its target are joined."""
        size, tokenizer, found, subjects = self.size, self.ours.tokenizer, [], set()
        needed = max(size.sequence, size.batch, size.edits, size.rounds)
        for split in ("test", "dev"):
            for case in atlas_cases(split=split):
                (request,) = case.requests
                if request.subject in subjects or len(found) == needed:
                    continue
                rows = request_rows(self.ours, request, self.rome_prefixes)
                joined = [
                    tokenizer(template.format(request.text) + tokenizer.decode(row.targets[:-1]))["input_ids"]
                    for template, row in zip(self.rome_prefixes, rows, strict=True)
                ]
                places = [
                    len(tokenizer.encode(template.format(request.prompt).split("{}")[0] + request.subject))
                    for template in self.rome_prefixes
                ]
                if joined == [list(row.ids) for row in rows] and places == [row.change + 1 for row in rows]:
                    subjects.add(request.subject)
                    found.append(case)
        return found

    def requests(self, count: int) -> list[EditRequest]:
        """The first of them."""
        if len(self.cases) < count:
            raise SystemExit(f"only {len(self.cases)} facts can be told alike to all sides, not {count}")
        return [case.requests[0] for case in self.cases[:count]]

    def rows(self, request: EditRequest, prefixes: Sequence[str]) -> list[PlainRow]:
        """A request in every context, in the reference's form."""
        return [plain_row(row) for row in request_rows(self.ours, request, prefixes)]

    def search_plainly(self, request: EditRequest, role: Role, layer: int, clamp: float) -> Tensor:
        """A value by the reference."""
        found = plain_value_search(
            self.plain.model,
            self.plain.module(role, layer),
            self.rows(request, self.prefixes),
            plain_row(essence_row(self.plain, request)),
            clamp=clamp,
            **self.search,
        )
        return found.init + found.delta

    def easy_weights(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """EasyEdit's weights now, ``[out, in]`` by parameter."""
        assert self.easy is not None
        return weights(self.easy.handle, layers)


def plain_row(row: Any) -> PlainRow:
    """A row in the reference's form."""
    return PlainRow(row.ids, row.change, row.prompt_last, row.targets)


def weights(handle: ModelHandle, layers: Sequence[int]) -> dict[str, Tensor]:
    """Down projections now, ``[out, in]`` by parameter."""
    return {
        handle.weight(Role.MLP_OUT, layer).name: weight_of(handle.module(Role.MLP_OUT, layer)).clone()
        for layer in layers
    }


def change(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """What was added."""
    return {name: after[name] - before[name] for name in before}


def dense(patch: WeightPatch) -> dict[str, Tensor]:
    """A patch's deltas."""
    return {name: delta.dense() for name, delta in patch.deltas.items()}


def summary(
    ours: Turn, plain: Turn, easy: Turn | None, found: dict[str, Tensor], theirs: dict[str, dict[str, Tensor]]
) -> dict[str, Any]:
    """Ratios and cosines."""
    row: dict[str, Any] = {"seconds": ours.wall, "cpu_seconds": ours.cpu}
    for name, turn in (("plain", plain), ("easyedit", easy)):
        if turn is not None:
            row |= {
                f"{name}_ratio": turn.wall / ours.wall,
                f"{name}_cpu_ratio": turn.cpu / ours.cpu,
                f"{name}_seconds": turn.wall,
                f"{name}_cpu_seconds": turn.cpu,
            }
    return row | {f"{name}_cosine": cosines(found, update) for name, update in theirs.items()}


# ---- the parts ---------------------------------------------------------------------------------------------------------


def rome(sides: Sides) -> dict[str, Any]:
    """One edit at a time."""
    clamp, layer = 4.0, sides.rome_layer
    editor = get_editor(
        "rome", layers=(layer,), clamp=clamp, prefixes=sides.rome_prefixes, **sides.search, **sides.statistics
    )
    inverse = torch.inverse(sides.moments[layer]).float()
    down, tap = (sides.plain.module(role, layer) for role in (Role.MLP_OUT, Role.MLP))
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
        factors, turn = timed(
            lambda request=request: plain_rome(
                sides.plain.model,
                down,
                tap,
                sides.rows(request, sides.rome_prefixes),
                plain_row(essence_row(sides.plain, request)),
                inverse,
                clamp=clamp,
                **sides.search,
            )
        )
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
    sample = min(size.sample, size.batch)
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
    for index, request in enumerate(requests[:sample]):
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
        save_values(folder, requests[sample:], targets[:, sample:])
        for request in requests[:sample]:
            file(folder, request).unlink(missing_ok=True)
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
    first = sides.ours
    patches: list[WeightPatch] = []
    applied = []

    def write(begin: int, end: int) -> None:
        for request, value in zip(requests[begin:end], values[begin:end], strict=True):
            ready = replace(shared, values=(value,))
            patch = editor._patch(first, [request], ready, tuple(patches), kept, None)
            applied.append(patch.apply(first))
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
    for each in reversed(applied):
        each.undo()
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
    sample = min(size.sample, size.edits)
    cases = counterfact_cases(sides.cases[: size.edits])
    suite = get_suite("counterfact", SuiteOptions(fluency=True, text_tokens=size.text))
    editor = get_editor(
        "rome", layers=(layer,), clamp=clamp, prefixes=sides.rome_prefixes, **sides.search, **sides.statistics
    )
    report, ours = timed(lambda: evaluate_editing(suite, sides.ours, editor, cases, in_order=True))
    inverse = torch.inverse(sides.moments[layer]).float()
    down, tap = (sides.plain.module(role, layer) for role in (Role.MLP_OUT, Role.MLP))
    name = sides.plain.weight(Role.MLP_OUT, layer).name
    plain = easy = Turn()
    for case in cases.cases[:sample]:
        (request,) = case.requests

        def work(case: EditCase = case, request: EditRequest = request) -> None:
            left, right = plain_rome(
                sides.plain.model,
                down,
                tap,
                sides.rows(request, sides.rome_prefixes),
                plain_row(essence_row(sides.plain, request)),
                inverse,
                clamp=clamp,
                **sides.search,
            )
            delta = LowRank(left[:, None], right[None])
            patch = WeightPatch(sides.plain.fingerprint, {name: delta}, Provenance("plain"))
            plain_single_edits(sides.plain, suite, [case], [patch])

        plain += timed(work)[1]
        if sides.easy is not None:
            easy += timed(
                lambda case=case, request=request: sides.easy.single(  # type: ignore[union-attr]
                    request, easy_record(case), layer, clamp, text=True
                )
            )[1]
    scale = size.edits / sample
    row = summary(ours, plain * scale, easy * scale if sides.easy else None, {}, {})
    return row | {"edits": report.n, "sample": sample}


# ---- what the parts need -----------------------------------------------------------------------------------------------


def restore(handle: ModelHandle, before: dict[str, Tensor]) -> None:
    """Puts weights back."""
    for layer in range(handle.n_layers):
        name = handle.weight(Role.MLP_OUT, layer).name
        if name in before:
            weight_of(handle.module(Role.MLP_OUT, layer)).copy_(before[name])


def file(folder: Path, request: EditRequest) -> Path:
    """Where EasyEdit looks for a value."""
    return folder / f"{request.id.replace('/', '_')}.npz"


def save_values(folder: Path, requests: Sequence[EditRequest], targets: Tensor) -> None:
    """Values ``[d, B]`` in EasyEdit's form."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, request in enumerate(requests):
        np.savez(file(folder, request), v_star=targets[:, index].numpy())


def given_values(sides: Sides, requests: Sequence[EditRequest], layer: int) -> list[ValueResult]:
    """Values as a search would leave them, without one: the state and a random step as long as the clamp allows."""
    from editors.keys import read_sites
    from lab.trace import Site

    site = Site(Role.BLOCK, layer)
    rows = [request_rows(sides.ours, request, ["{}"])[0] for request in requests]
    state = read_sites(sides.ours, rows, [site], site)[site].float()
    draw = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    step = 0.75 * draw * (state.norm(dim=1) / draw.norm(dim=1))[:, None]
    nothing = (StepLoss(0.0, 0.0, 0.0, 0.0, 0.0),)
    return [ValueResult(step[index], state[index], nothing) for index in range(len(requests))]


def shared_ready(sides: Sides, editor: AlphaEditor, request: EditRequest) -> Ready[Any]:
    """Settings and statistics of an edit; its value is replaced by a given one."""
    from editors.alphaedit import AlphaEditConfig

    short = replace(editor.options, overrides={**editor.options.overrides, "steps": 1})
    return prepare(sides.ours, short, SpreadMethod("alphaedit", AlphaEditConfig), [request], None)


def counterfact_cases(cases: Sequence[EditCase]) -> CaseSet:
    """The same facts with prompts as CounterFact has them."""
    made = []
    for case in cases:
        probes = [*case.of("rewrite"), *case.of("paraphrase")[:2]]
        others = [*case.of("neighborhood"), *case.of("relation")][:10]
        probes += [replace(probe, group="neighborhood", kind="") for probe in others]
        probes.append(CaseProbe("generation", case.requests[0].text))
        made.append(replace(case, probes=tuple(probes), format="counterfact"))
    return CaseSet("counterfact", "counterfact", "made", tuple(made))


def easy_record(case: EditCase) -> dict[str, Any]:
    """A case in EasyEdit's form."""
    request, paraphrases, others = case.requests[0], case.of("paraphrase"), case.of("neighborhood")
    return {
        "prompt": request.text,
        "target_new": request.target_new,
        "ground_truth": request.target_old,
        "rephrase_prompt": [probe.prompt for probe in paraphrases],
        "locality": {
            "neighborhood": {
                "prompt": [probe.prompt for probe in others],
                "ground_truth": [probe.answers[0] for probe in others],
            }
        },
        "portability": {},
    }


MEASURES: dict[str, Callable[[Sides], dict[str, Any]]] = {
    "rome": rome,
    "memit": memit,
    "single": single,
    "alphaedit": alphaedit,
}


def measure(
    size: Size, shapes: Sequence[str], parts: Sequence[str], easyedit: Path | None, folder: Path
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
            sides = sides or Sides.make(shape, size, easyedit, folder)
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
        results = measure(size, options.shapes.split(","), options.parts.split(","), options.easyedit, folder)
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
