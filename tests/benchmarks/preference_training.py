"""What our training on pairs costs beside bare TRL, and what a second copy of the model as reference would cost.

    python tests/benchmarks/preference_training.py --json results/preference_training.json [--quick]

Llamas with random weights, LoRA on all linear layers, DPO with the sigmoid loss.

``cpu_ratio``: tokens per processor second of ``train_preference`` over those of TRL's own trainer on the same model, pairs and
settings, medians over alternating runs; ``ratio``: the same by the clock. The first includes what the second does not: checks
of all rows, of the reference, of every untouched weight, and the patch. ``saved_of_model``: peak memory of a process that trains
against a second copy less that of one that trains with the adapter off as reference, over the bytes of the model (about 100 M
parameters; fewer with --quick).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Run as a file, so the repository's root is not on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab.handle import ModelHandle
from lab.peak import peak_memory
from lab.records import write_text_atomically
from lab.tokens import encode_ids
from lab.training import fit, training_defaults
from rag.preference.knowpo import TrainingData
from rag.preference.objectives import preference_trainer
from rag.preference.stage import to_dataset
from rag.preference.train import TrainConfig, train_preference
from tests.tiny import tiny_tokenizer

TOWNS = ("Paris", "Rome", "Nairobi", "Tokyo")
SIZES = {"large": (768, 12, 2048, 8192), "small": (256, 5, 688, 3072)}
LENGTH = 512


def model_handle(size: str) -> ModelHandle:
    """A Llama of about 100 M or 5 M parameters; the small tokenizer's ids are a part of its vocabulary."""
    width, layers, inner, words = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=words,
        num_attention_heads=8,
        max_position_embeddings=LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    return ModelHandle.wrap(LlamaForCausalLM(config), tiny_tokenizer(), name=f"llama-{size}")


def make_pairs(count: int, documents: int) -> list[dict[str, Any]]:
    """Pairs below documents."""
    rows = []
    for number in range(count):
        told = "".join(
            f"Document {place}: Person {number + place} lives in {TOWNS[(number + place) % 4]}.\n"
            for place in range(documents)
        )
        rows.append(
            {
                "prompt": f"{told}Q: Where does Person {number} live?\nA:",
                "chosen": f" {TOWNS[number % 4]}.\n",
                "rejected": f" {TOWNS[(number + 1) % 4]}.\n",
            }
        )
    return rows


def settings(batch: int) -> TrainConfig:
    """Those of both sides."""
    return TrainConfig(batch_size=batch, loss=("sigmoid",), loss_weights=(1.0,), max_length=LENGTH)


def ours(handle: ModelHandle, rows: list[dict[str, Any]], batch: int) -> None:
    """The wrapper."""
    train_preference(handle, TrainingData(None, to_dataset(rows), {}), settings(batch))


def bare(handle: ModelHandle, rows: list[dict[str, Any]], batch: int) -> None:
    """TRL as its documentation uses it."""
    from peft import LoraConfig
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    config = settings(batch)
    lora = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with TemporaryDirectory() as folder:
        arguments = training_defaults(handle, folder) | {
            "per_device_train_batch_size": batch,
            "learning_rate": config.dpo_lr,
            "num_train_epochs": config.dpo_epochs,
            "beta": config.beta,
            "max_length": LENGTH,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        }
        trainer = DPOTrainer(
            model=copy.deepcopy(handle.model),
            args=DPOConfig(**arguments),
            train_dataset=to_dataset(rows),
            processing_class=handle.tokenizer,
            peft_config=lora,
        )
        trainer.train()


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Seconds by the clock and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - cpu


def speed(size: str, rows: list[dict[str, Any]], batch: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of both sides, alternating."""
    handle = model_handle(size)
    tokens = sum(
        len(encode_ids(handle.tokenizer, row["prompt"] + row[side]))
        for row in rows
        for side in ("chosen", "rejected")
    )
    sides = {"ours": ours, "bare": bare}
    for work in sides.values():  # imports and first calls
        work(handle, rows[:batch], batch)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            spent[name].append(timed(lambda work=work: work(handle, rows, batch)))
    wall, cpu = (
        {name: statistics.median(each[place] for each in found) for name, found in spent.items()}
        for place in (0, 1)
    )
    return {
        "tokens": tokens,
        "ratio": wall["bare"] / wall["ours"],
        "cpu_ratio": cpu["bare"] / cpu["ours"],
        "tokens_per_second": {name: tokens / seconds for name, seconds in wall.items()},
        "tokens_per_cpu_second": {name: tokens / seconds for name, seconds in cpu.items()},
    }


def peak(size: str, reference: str) -> dict[str, Any]:
    """Peak of this process in one training of two steps, and the model's bytes."""
    from peft import LoraConfig

    handle = model_handle(size)
    rows, config = make_pairs(2, 4), settings(1)
    with TemporaryDirectory() as folder, peak_memory() as used:
        arguments = training_defaults(handle, folder) | {
            "per_device_train_batch_size": 1,
            "max_length": LENGTH,
        }

        def make(model: Any, _reference: Any) -> Any:
            second = model_handle(size).model if reference == "copy" else None
            return preference_trainer(handle, model, rows, config, arguments, reference=second)

        fit(handle, make, lora=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    weights = sum(each.numel() * each.element_size() for each in handle.model.parameters())
    return {"peak_mb": used.mb, "model_mb": weights / 1e6}


def memory(size: str) -> dict[str, Any]:
    """Both ways to have a reference, each in a process of its own."""
    found = {}
    for reference in ("adapter_off", "copy"):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", reference, "--size", size],
            check=True,
            capture_output=True,
            text=True,
        )
        found[reference] = json.loads(done.stdout.splitlines()[-1])
    saved = found["copy"]["peak_mb"] - found["adapter_off"]["peak_mb"]
    return {**found, "saved_mb": saved, "saved_of_model": saved / found["copy"]["model_mb"]}


def main() -> None:
    """Runs both measurements, prints them, and writes them to a file where one is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="small models, few pairs")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each side")
    parser.add_argument("--peak", choices=("adapter_off", "copy"), help=argparse.SUPPRESS)
    parser.add_argument("--size", choices=tuple(SIZES), default="large", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.peak:
        print(json.dumps(peak(chosen.size, chosen.peak)))
        return
    rows = make_pairs(32 if chosen.quick else 96, 8)
    found = {
        "memory": memory("small" if chosen.quick else "large"),
        "speed": speed("small", rows, 8, chosen.repeats),
    }
    text = json.dumps(found, indent=2)
    print(text)
    if chosen.json:
        write_text_atomically(chosen.json, text + "\n")


if __name__ == "__main__":
    main()
