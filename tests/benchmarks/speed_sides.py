"""What ``editing_speed.py`` and ``editing_growth.py`` share: models, facts, statistics, and the clock."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from editors.alphaedit import AlphaEditConfig, AlphaEditor
from editors.keys import read_sites
from editors.rows import essence_row, request_rows
from editors.spread import Ready, SpreadMethod, prepare
from editors.values import StepLoss, ValueResult
from lab.arch import Role
from lab.atlas.weights import weights_path
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.eval.atlas import atlas_cases
from lab.eval.suite import distracted
from lab.handle import ModelHandle
from lab.patch import WeightPatch
from lab.records import EditRequest
from lab.stats import Corpus, StatsCache
from lab.trace import Site
from tests.benchmarks.speed_easyedit import EasyEdit, enter
from tests.reference.value_search import PlainRow, plain_value_search
from tests.reference.whole_edits import cosines, plain_rome, weight_of

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


def flops(work: Callable[[], Any]) -> float:
    """Floating-point operations of all matrix products in ``work``, in 1e9."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


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
        flops: Whether operations are counted as well, in runs of their own.
    """

    shape: str
    size: Size
    ours: ModelHandle
    plain: ModelHandle
    easy: EasyEdit | None
    folder: Path
    flops: bool = False

    rome_prefixes = templates([(4, 10), (9, 10)])
    prefixes = templates([(9, 5)])

    @classmethod
    def make(
        cls, shape: str, size: Size, easyedit: Path | None, folder: Path, *, flops: bool = False
    ) -> Sides:
        """Builds models and statistics."""
        place = weights_path("atlas")
        if place is None:
            raise SystemExit("the tokenizer of the built-in model is missing from this checkout")
        tokenizer = AutoTokenizer.from_pretrained(place)
        model = model_of(shape, size).eval()
        handles = [
            ModelHandle.wrap(copy.deepcopy(model), tokenizer, name=f"{shape}-random") for _ in range(3)
        ]
        found = cls(shape, size, handles[0], handles[1], None, folder, flops)
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

    def suffixes(self, count: int) -> list[int]:
        """How many tokens each of the first has from its subject on."""
        return [
            max(len(row.ids) - row.change for row in request_rows(self.ours, request, self.rome_prefixes))
            for request in self.requests(count)
        ]

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

    def edit_plainly(self, request: EditRequest, inverse: Tensor, clamp: float) -> tuple[Tensor, Tensor]:
        """The factors of one ROME edit by the reference, from an inverse moment."""
        down, tap = (self.plain.module(role, self.rome_layer) for role in (Role.MLP_OUT, Role.MLP))
        return plain_rome(
            self.plain.model,
            down,
            tap,
            self.rows(request, self.rome_prefixes),
            plain_row(essence_row(self.plain, request)),
            inverse,
            clamp=clamp,
            **self.search,
        )

    def easy_weights(self, layers: Sequence[int]) -> dict[str, Tensor]:
        """EasyEdit's weights now, ``[out, in]`` by parameter."""
        assert self.easy is not None
        return weights(self.easy.handle, layers)


def typical(lengths: Sequence[int], count: int) -> list[int]:
    """Indices of ``count`` entries that lie evenly over the sorted lengths: the middles of as many equal parts."""
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    count = min(count, len(order))
    return [order[(2 * part + 1) * len(order) // (2 * count)] for part in range(count)]


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
    site = Site(Role.BLOCK, layer)
    rows = [request_rows(sides.ours, request, ["{}"])[0] for request in requests]
    state = read_sites(sides.ours, rows, [site], site)[site].float()
    draw = torch.randn(state.shape, generator=torch.Generator().manual_seed(0))
    step = 0.75 * draw * (state.norm(dim=1) / draw.norm(dim=1))[:, None]
    nothing = (StepLoss(0.0, 0.0, 0.0, 0.0, 0.0),)
    return [ValueResult(step[index], state[index], nothing) for index in range(len(requests))]


def shared_ready(sides: Sides, editor: AlphaEditor, request: EditRequest) -> Ready[Any]:
    """Settings and statistics of an edit; its value is replaced by a given one."""
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
    answers = [probe.answers[0] for probe in others]
    behind = [probe.prompt for probe in distracted(case, "neighborhood", "distracting")]
    return {
        "prompt": request.text,
        "target_new": request.target_new,
        "ground_truth": request.target_old,
        "rephrase_prompt": [probe.prompt for probe in paraphrases],
        "locality": {
            "neighborhood": {"prompt": [probe.prompt for probe in others], "ground_truth": answers},
            "distracting": {"prompt": behind, "ground_truth": answers},
        },
        "portability": {},
    }
