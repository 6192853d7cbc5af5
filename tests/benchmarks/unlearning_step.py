"""Times one update of NPO, and the memory that it takes, against the plain way: a second model as reference, full logits.

    python tests/benchmarks/unlearning_step.py --json results/unlearning_step.json [--quick] [--open-unlearning CHECKOUT]

GPT-2 of 124 M parameters with random weights, full fine-tuning in fp32 with AdamW, the same batches for both: facts to forget and
retained ones, right-padded to the batch's longest. The plain way is written here after what open-unlearning's trainer does in an
update: the model's forward pass over prompt and answer with all logits, the same on a frozen copy, NPO on summed answer tokens,
a retained batch's loss, backward, clip, step. ``ratio``: its seconds per update over ours, without what either does once.
``saved_share``: by how much our peak is lower, in bytes of the frozen copy; each in a process of its own
(Linux only). An update's time is the median over updates, the first WARM of every run left out, in which memory is touched for the
first time. ``growth``: seconds of whole runs, everything counted, for 1, 5 and 10 % of 400 facts, two passes each.

``lora``: ours with an adapter of rank 8 in place of the full weights, reported apart. With ``--open-unlearning`` its own trainer is
timed too, as ``open_unlearning``; ``ratio`` and ``saved_share`` then compare with it, and the plain way stands beside them.

On a machine that other programs use, compare ``cpu_ratio`` (processor seconds) with ``ratio``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import itertools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

# Run as a file, so the repository's root is not on the path; processes that are spawned come through here too.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from editors.unlearning import get_unlearner
from lab.handle import ModelHandle
from lab.peak import STATUS, reset_peak, resident
from lab.records import Fact, write_text_atomically
from lab.tokens import join_target
from tests.benchmarks import unlearning_peer
from tests.tiny import tiny_tokenizer

BETA, RATE, DECAY = 0.1, 1e-5, 0.01
WARM = 3
Mark = Callable[[], None]
"""Called once in every update."""
ANSWER_WORDS = 20
PEOPLE = ("Barack Obama", "Tim Cook", "France", "Japan", "Kenya", "Paris", "Tokyo", "Rome")
OBJECTS = ("Paris", "Tokyo", "Rome", "Nairobi", "guitar", "piano", "city", "book")


def model_handle() -> ModelHandle:
    """GPT-2 with random weights; the small tokenizer's ids are a part of its vocabulary."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0))
    return ModelHandle.wrap(model, tiny_tokenizer(), name="gpt2-124m-random")


def facts(count: int, word: str) -> list[Fact]:
    """Facts of about the length of a question and an answer of one sentence, as in TOFU."""
    found = []
    for number in range(count):
        subject = PEOPLE[number % len(PEOPLE)]
        words = [OBJECTS[(number * 3 + place) % len(OBJECTS)] for place in range(ANSWER_WORDS)]
        target = " ".join(words[: ANSWER_WORDS - number % 5])
        prompt = f"The {word} that {{}} was known for in the city of number {number} is the"
        found.append(Fact(subject, word, target, prompt, id=f"{word}/{number}"))
    return found


def rows(handle: ModelHandle, chosen: Sequence[Fact]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and labels, right-padded."""
    split = [join_target(handle.tokenizer, fact.text, fact.object) for fact in chosen]
    width = max(len(head) + len(tail) for head, tail in split)
    ids = torch.full((len(split), width), handle.pad_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (head, tail) in enumerate(split):
        end = len(head) + len(tail)
        ids[row, :end] = torch.tensor([*head, *tail])
        labels[row, len(head) : end] = torch.tensor(tail)
        mask[row, :end] = 1
    return ids, mask, labels


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss of each row's answer."""
    lost = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none"
    )
    return lost.sum(1)


def plain(
    handle: ModelHandle, forget: Sequence[Fact], retain: Sequence[Fact], size: int, passes: int, mark: Mark
) -> None:
    """The plain way."""
    model: Any = handle.model
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    adam = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY, fused=True)
    for _ in range(passes):
        for start in range(0, len(forget), size):
            ids, mask, labels = rows(handle, forget[start : start + size])
            kept_ids, kept_mask, kept_labels = rows(handle, retain[start : start + len(ids)])
            now = summed(model(ids, attention_mask=mask).logits, labels)
            with torch.no_grad():
                before = summed(frozen(ids, attention_mask=mask).logits, labels)
            away = -2 / BETA * torch.nn.functional.logsigmoid(BETA * (now - before)).mean()
            loss = away + model(kept_ids, attention_mask=kept_mask, labels=kept_labels).loss
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            mark()


def ours(
    handle: ModelHandle,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    size: int,
    passes: int,
    mark: Mark,
    *,
    weights: str = "full",
) -> None:
    """``npo`` of the registry."""
    unlearner = get_unlearner(
        "npo",
        lr=RATE,
        beta=BETA,
        weight_decay=DECAY,
        epochs=passes,
        batch_size=size,
        weights=weights,
        stop_above=None,
        stop_retain=None,
        # An adapter has no old bits to keep.
        spill=weights == "full",
    )

    def told(phase: str, _done: int, _of: int) -> None:
        # Said in the middle of an update, so that two of them are one update apart.
        if phase == "steps":
            mark()

    unlearner.unlearn(handle, forget, retain, progress=told)


def peer(
    handle: ModelHandle, forget: Sequence[Fact], retain: Sequence[Fact], size: int, passes: int, mark: Mark
) -> None:
    """open-unlearning's trainer."""
    unlearning_peer.npo(
        handle, forget, retain, rows, mark, size=size, passes=passes, beta=BETA, rate=RATE, decay=DECAY
    )


PEER = "open_unlearning"
WAYS: dict[str, Callable[..., None]] = {
    "plain": plain,
    "ours": ours,
    "lora": partial(ours, weights="lora"),
    PEER: peer,
}


def per_update(which: str, size: int, updates: int) -> list[tuple[float, float]]:
    """Wall and processor seconds of single updates of one run, those behind the first ``WARM``.

    What ours asks the untouched model is asked once, before the first update, whatever the number of passes; ``growth`` counts it.
    """
    gc.collect()
    marks: list[tuple[float, float]] = []
    WAYS[which](
        model_handle(),
        facts(size, "book"),
        facts(size, "city"),
        size,
        updates,
        lambda: marks.append((time.perf_counter(), time.process_time())),
    )
    return [
        (later[0] - earlier[0], later[1] - earlier[1])
        for earlier, later in itertools.pairwise(marks[WARM - 1 :])
    ]


def seconds(work: Callable[[], None]) -> float:
    """Wall seconds."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def nothing() -> None:
    """A mark that nobody reads."""


def peak(which: str, size: int, threads: int, checkout: Path | None) -> float:
    """Peak resident bytes of two updates in a process of its own, above the loaded model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (which, size, threads, checkout))


def _peak(which: str, size: int, threads: int, checkout: Path | None) -> float:
    torch.set_num_threads(threads)
    if checkout is not None:
        unlearning_peer.enter(checkout)
    handle = model_handle()
    forget, retain = facts(2 * size, "book"), facts(2 * size, "city")
    gc.collect()
    before = resident("VmRSS") or 0
    if not reset_peak():
        raise RuntimeError("the kernel does not let the peak of memory start anew")
    WAYS[which](handle, forget, retain, size, 1, nothing)
    return ((resident("VmHWM") or 0) - before) * 1024


def measure(quick: bool, size: int, checkout: Path | None) -> dict[str, Any]:
    """All figures."""
    repeats, updates = (1, WARM + 2) if quick else (3, WARM + 5)
    ways = [which for which in WAYS if which != PEER or checkout is not None]
    against = "plain" if checkout is None else PEER
    if checkout is not None:
        unlearning_peer.enter(checkout)
    found: dict[str, list[tuple[float, float]]] = {which: [] for which in ways}
    for _ in range(repeats):
        for which in ways:
            found[which] += per_update(which, size, updates)
    wall, cpu = (
        {which: statistics.median(pair[place] for pair in pairs) for which, pairs in found.items()}
        for place in (0, 1)
    )
    growth = {}
    for share in () if quick else (1, 5, 10):
        count = 4 * share
        growth[f"{share} %"] = {
            which: seconds(
                lambda which=which, count=count: WAYS[which](
                    model_handle(), facts(count, "book"), facts(count, "city"), size, 2, nothing
                )
            )
            for which in ("plain", "ours")
        }
    handle = model_handle()
    copied = sum(p.numel() * p.element_size() for p in handle.model.parameters())
    threads = torch.get_num_threads()
    peaks = {which: peak(which, size, threads, checkout) for which in ways} if STATUS.is_file() else None
    return {
        "schema_version": 1,
        "command": "unlearning_step",
        "seed": 0,
        "against": against,
        "ratio": wall[against] / wall["ours"],
        "cpu_ratio": cpu[against] / cpu["ours"],
        "seconds_per_update": wall,
        "updates_timed": {which: len(pairs) for which, pairs in found.items()},
        "cpu_seconds_per_update": cpu,
        "saved_share": None if peaks is None else (peaks[against] - peaks["ours"]) / copied,
        "peak_bytes": peaks,
        "reference_bytes": copied,
        "growth_seconds": growth,
        "batch_size": size,
        "row_tokens": int(rows(handle, facts(size, "book"))[0].shape[1]),
        "parameters": sum(p.numel() for p in handle.model.parameters()),
        "threads": threads,
        "quick": quick,
        "torch": torch.__version__,
    }


def main() -> None:
    """Parses options, measures, prints, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer updates, no growth")
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice without")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--open-unlearning", type=Path, help="a checkout of locuslab/open-unlearning")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    figures = measure(options.quick, options.batch_size, options.open_unlearning)
    text = json.dumps(figures, indent=2)
    print(text)
    if options.json:
        write_text_atomically(options.json, text + "\n")


if __name__ == "__main__":
    main()
