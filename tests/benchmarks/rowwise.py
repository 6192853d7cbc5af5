"""Times the evaluation of independent single edits, row by row in shared passes, against one edit at a time.

    python tests/benchmarks/rowwise.py --json results/rowwise.json [--quick]

GPT-2 of 124 M parameters with random weights (a smaller one with --quick), rank-one patches of one layer, cases of CounterFact's
size: 1 prompt, 2 paraphrases, 10 neighbors, the neighbors again after the edited statement, a text of 100 tokens.

``ratio``: seconds of the plain evaluation (``tests/reference/single_edits.py``: before and after every edit, one group of prompts
at a time, texts one by one with a key/value cache) over seconds of ``evaluate_editing``. ``scoring_ratio``: the same without
texts. ``shared_passes_ratio``: ``evaluate_editing`` with one patch at a time over the same with shared passes, without texts.
``max_abs_difference`` of any value of any case between the two evaluations, in a separate fp64 pass of the small model; texts
are sampled differently by the two and left out of it.

On a machine that other programs use, compare ``cpu_ratio`` (processor seconds) with ``ratio``.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.arch import Role
from lab.data.cases import CaseProbe, CaseSet, EditCase
from lab.eval import Report, Suite, SuiteOptions, evaluate_editing, get_suite
from lab.handle import ModelHandle
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import EditRequest, write_text_atomically
from tests.reference.single_edits import plain_single_edits
from tests.tiny import tiny_tokenizer

SUBJECTS = (
    "France",
    "Japan",
    "Kenya",
    "Paris",
    "Tokyo",
    "Rome",
    "Nairobi",
    "Barack Obama",
    "Marie Curie",
    "Toko Yasuda",
)
TARGETS = ("Paris", "Rome", "Nairobi", "Tokyo and Rome")
NEIGHBOURS = 10


class Prepared:
    """Hands out patches that were made before, so that evaluation alone is timed."""

    def __init__(self, patches: dict[str, WeightPatch]) -> None:
        self.patches = patches

    def edit(
        self, handle: ModelHandle, requests: Sequence[EditRequest], *, history: Any = None
    ) -> WeightPatch:
        (request,) = requests
        return self.patches[request.id]


def model_handle(small: bool, dtype: torch.dtype = torch.float32) -> ModelHandle:
    """GPT-2 with random weights; the small tokenizer's ids are a part of its vocabulary."""
    torch.manual_seed(0)
    shape = {"n_layer": 6, "n_embd": 256, "n_head": 8, "vocab_size": 8192} if small else {}
    # No end token, so that every text has its full length.
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=8191, **shape))
    return ModelHandle.wrap(model.to(dtype), tiny_tokenizer(), name="gpt2-random")


def make_cases(count: int) -> CaseSet:
    """Cases of CounterFact's size; neighbors are shared between cases, as a relation's are."""
    cases = []
    for number in range(count):
        subject, target = f"{SUBJECTS[number % len(SUBJECTS)]} {number}", TARGETS[number % len(TARGETS)]
        old = TARGETS[(number + 1) % len(TARGETS)]
        request = EditRequest(f"case/{number}", "The capital of {} is the city of", subject, target, old)
        probes = [CaseProbe("rewrite", request.text, (target,), old)]
        probes += [CaseProbe("paraphrase", f"{text} {subject} is", (target,), old) for text in ("In", "Who")]
        for other in range(NEIGHBOURS):
            name = SUBJECTS[(number + other + 1) % len(SUBJECTS)]
            probes.append(CaseProbe("neighborhood", f"The capital of {name} is the city of", (old,), target))
        probes.append(CaseProbe("generation", f"{subject} plays the guitar in the city of"))
        cases.append(
            EditCase(request.id, "counterfact", (request,), tuple(probes), ((old,),), "made", number + 1)
        )
    return CaseSet("counterfact", "counterfact", "made", tuple(cases))


def make_patches(handle: ModelHandle, cases: CaseSet) -> dict[str, WeightPatch]:
    """A random rank-one patch per case."""
    weight = handle.weight(Role.MLP_OUT, handle.n_layers // 2)
    made = {}
    for number, case in enumerate(cases):
        generator = torch.Generator().manual_seed(number)
        left, right = (
            torch.randn(size, generator=generator, dtype=torch.float64)
            for size in ((weight.shape[0], 1), (1, weight.shape[1]))
        )
        delta = LowRank(left.to(handle.dtype), right.to(handle.dtype) / 200)
        made[case.id] = WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("random"))
    return made


def suite_of(tokens: int) -> Suite:
    """CounterFact; texts of ``tokens``, none for 0."""
    return get_suite("counterfact", SuiteOptions(fluency=tokens > 0, text_tokens=tokens or 1))


def fast(
    handle: ModelHandle, suite: Suite, cases: CaseSet, patches: dict[str, WeightPatch], rowwise: bool = True
) -> Report:
    """The evaluation that is measured; nothing is kept from an earlier one."""
    return evaluate_editing(suite, handle, Prepared(patches), cases, rowwise=rowwise)


def plain(handle: ModelHandle, suite: Suite, cases: CaseSet, patches: dict[str, WeightPatch]) -> list[Any]:
    """The reference."""
    return plain_single_edits(handle, suite, cases.cases, [patches[case.id] for case in cases])


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def difference(edits: int) -> float:
    """Largest difference of any value of any case, in fp64."""
    handle, cases, suite = model_handle(True, torch.float64), make_cases(edits), suite_of(0)
    patches = make_patches(handle, cases)
    rows = {row.id: row.values for row in fast(handle, suite, cases, patches).cases}
    wanted = dict(zip([case.id for case in cases], plain(handle, suite, cases, patches), strict=True))
    return max(
        abs(one - other)
        for name, values in wanted.items()
        for metric, found in values.items()
        for one, other in zip(found, rows[name][metric], strict=True)
    )


def measure(quick: bool, edits: int) -> dict[str, Any]:
    """All figures."""
    handle, cases = model_handle(quick), make_cases(edits)
    patches = make_patches(handle, cases)
    tokens = 40 if quick else 100
    whole, scores = suite_of(tokens), suite_of(0)
    # The first pass pays for memory and kernel choice.
    fast(handle, scores, make_cases(1), patches)
    reference, scored_reference = (
        timed(lambda s=s: plain(handle, s, cases, patches)) for s in (whole, scores)
    )
    search, scored = (timed(lambda s=s: fast(handle, s, cases, patches)) for s in (whole, scores))
    alone = timed(lambda: fast(handle, scores, cases, patches, rowwise=False))
    return {
        "schema_version": 1,
        "command": "rowwise",
        "seed": 0,
        "ratio": reference[0] / search[0],
        "scoring_ratio": scored_reference[0] / scored[0],
        "shared_passes_ratio": alone[0] / scored[0],
        "max_abs_difference": difference(3),
        "cpu_ratio": reference[1] / search[1],
        "scoring_cpu_ratio": scored_reference[1] / scored[1],
        "shared_passes_cpu_ratio": alone[1] / scored[1],
        "reference_seconds": reference[0],
        "seconds": search[0],
        "edits": edits,
        "text_tokens": tokens,
        "threads": torch.get_num_threads(),
        "quick": quick,
        "torch": torch.__version__,
    }


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="a small model, fewer edits, shorter texts")
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice without")
    parser.add_argument("--edits", type=int, help="how many; 32, or 16 with --quick, without")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = measure(options.quick, options.edits or (16 if options.quick else 32))
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")


if __name__ == "__main__":
    main()
