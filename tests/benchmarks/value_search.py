"""Times the value search on replay against the plain full-forward search.

    python tests/benchmarks/value_search.py --json results/value_search.json [--quick]

GPT-2 of 124 M parameters with random weights, layer 5, 21 prefixes and one essence row, 20 steps, fp32, sdpa, the same rows
and threads for both. ``ratio``: seconds of the reference over seconds of ``optimise_value``; ``batched_ratio``: eight edits
one by one over the eight together. The reference must reach half of the machine's matmul rate, measured in the same run,
or ``ratio_counts`` is false. Equality is checked in a separate fp64 pass. Memory is the peak above the loaded model, in a
fresh process each (Linux only).

On a machine that other programs use, compare ``cpu_ratio`` (processor seconds) with ``ratio``.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

# Run as a file, so the repository's root is not on the path; processes that are spawned come through here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from editors.prefixes import Prefixes
from editors.rows import EditRow, essence_row, request_rows
from editors.values import ValueConfig, optimise_value
from lab.arch import Role
from lab.handle import ModelHandle
from lab.peak import STATUS, reset_peak, resident
from lab.records import EditRequest, write_text_atomically
from tests.reference.value_search import PlainResult, PlainRow, plain_value_search
from tests.tiny import tiny_tokenizer

LAYER = 5
CONFIG = ValueConfig(steps=20, lr=0.5, weight_decay=0.5, clamp=4.0, kl_factor=0.0625, stop_below=0.0)
SUBJECTS = ("France", "Japan", "Kenya", "Paris", "Tokyo", "Rome", "Nairobi", "Barack")
WORDS = (
    " guitar",
    " piano",
    " city",
    " book",
    " worked",
    " plays",
    " tongue",
    " mother",
    " wife",
    " capital",
)


def model_handle(dtype: torch.dtype) -> ModelHandle:
    """GPT-2 with random weights; the small tokenizer's ids are a part of its vocabulary."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
    return ModelHandle.wrap(model.to(dtype), tiny_tokenizer(), name="gpt2-124m-random")


def prefixes() -> Prefixes:
    """The plain prompt, ten prefixes of about five tokens and ten of about ten, as ROME's."""
    texts = [
        "The" + "".join(WORDS[(start * 3 + step) % len(WORDS)] for step in range(words)) + ". {}"
        for words in (2, 5)
        for start in range(10)
    ]
    return Prefixes.of(texts)


def requests() -> list[EditRequest]:
    """Eight facts in ROME's classic form, with one token of target."""
    return [EditRequest(subject, "The capital of {} is", subject, "Paris") for subject in SUBJECTS]


def plain_rows(handle: ModelHandle, request: EditRequest) -> tuple[list[PlainRow], PlainRow]:
    """The rows of both searches, in the reference's form."""

    def convert(row: EditRow) -> PlainRow:
        return PlainRow(row.ids, row.change, row.prompt_last, row.targets)

    return [convert(row) for row in request_rows(handle, request, prefixes().flat)], convert(
        essence_row(handle, request)
    )


def fast(handle: ModelHandle, wanted: list[EditRequest], config: ValueConfig) -> list[torch.Tensor]:
    """The search on replay."""
    results = optimise_value(handle, wanted, LAYER, Role.MLP, prefixes(), config)
    return [result.delta for result in results]


def plain(handle: ModelHandle, request: EditRequest, config: ValueConfig) -> PlainResult:
    """The reference."""
    rows, essence = plain_rows(handle, request)
    module = handle.module(Role.MLP, LAYER)
    settings = {name: getattr(config, name) for name in ValueConfig.__dataclass_fields__}
    return plain_value_search(handle.model, module, rows, essence, **settings)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor seconds."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def counted(work: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matmul_rate(seconds: float = 1.0) -> float:
    """GFLOP/s of a square fp32 product of the size that a batch of tokens makes."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    torch.mm(left, right)
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        torch.mm(left, right)
        count += 1
    return count * 2 * 1024**3 / (time.perf_counter() - begin) / 1e9


def peak_memory(which: str, steps: int) -> float:
    """Peak resident memory of one search in a process of its own, in MiB above the loaded model."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (which, steps, torch.get_num_threads()))


def _measure_memory(which: str, steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    handle = model_handle(torch.float32)
    config = replace(CONFIG, steps=steps)
    # Building the model took more than the model needs; the peak counts from here.
    gc.collect()
    before = resident("VmRSS") or 0
    if not reset_peak():
        raise RuntimeError("the kernel does not let the peak of memory start anew")
    if which == "fast":
        fast(handle, requests()[:1], config)
    else:
        plain(handle, requests()[0], config)
    return ((resident("VmHWM") or 0) - before) / 1024


def fp64_difference(request: EditRequest, config: ValueConfig) -> float:
    """Largest difference in δ between the two searches, in fp64."""
    exact = model_handle(torch.float64)
    (found,) = fast(exact, [request], config)
    return float((found - plain(exact, request, config).delta).abs().max())


def measure(quick: bool, steps: int) -> dict[str, Any]:
    """All figures."""
    repeats = 1 if quick else 3
    config = replace(CONFIG, steps=steps)
    handle, wanted = model_handle(torch.float32), requests()
    one = wanted[0]
    # The first passes pay for memory and kernel choice; they are counted, not timed.
    fast(handle, wanted[:1], replace(config, steps=2))
    first = counted(lambda: plain(handle, one, replace(config, steps=1)))
    second = counted(lambda: plain(handle, one, replace(config, steps=2)))
    # The last step has no backward pass.
    work = first + (steps - 1) * (second - first)

    rates = [matmul_rate()]
    searches: list[tuple[float, float]] = []
    references: list[tuple[float, float]] = []
    for _ in range(repeats):
        references.append(timed(lambda: plain(handle, one, config)))
        searches.append(timed(lambda: fast(handle, wanted[:1], config)))
        rates.append(matmul_rate())
    short = replace(config, steps=max(2, steps // 2)) if quick else config
    alone = timed(lambda: [fast(handle, [request], short) for request in wanted])
    together = timed(lambda: fast(handle, wanted, short))
    memory = {which: peak_memory(which, 2) for which in ("fast", "plain")} if STATUS.is_file() else None
    check = replace(config, steps=2 if quick else steps)
    difference = fp64_difference(one, check)

    reference = statistics.median(wall for wall, _ in references)
    search = statistics.median(wall for wall, _ in searches)
    gflops, matmul = work / reference / 1e9, statistics.median(rates)
    return {
        "schema_version": 1,
        "command": "value_search",
        "seed": 0,
        "ratio": reference / search,
        "ratio_counts": gflops >= matmul / 2,
        "batched_ratio": alone[0] / together[0],
        "max_abs_difference": difference,
        "gflops": gflops,
        "matmul_gflops": matmul,
        "cpu_ratio": statistics.median(cpu for _, cpu in references)
        / statistics.median(cpu for _, cpu in searches),
        "batched_cpu_ratio": alone[1] / together[1],
        "reference_seconds": reference,
        "search_seconds": search,
        "peak_memory_mib": memory,
        "steps": steps,
        "batched_steps": short.steps,
        "exact_steps": check.steps,
        "rows": len(prefixes().flat) + 1,
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
    parser.add_argument(
        "--quick", action="store_true", help="one repeat, fewer steps for the batch and the fp64 pass"
    )
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice without")
    parser.add_argument("--steps", type=int, default=CONFIG.steps, help="steps of the timed search")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = measure(options.quick, options.steps)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")


if __name__ == "__main__":
    main()
