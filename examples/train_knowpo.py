"""Train a model to take the document's word where the document answers, and its own where it does not (KnowPO, arXiv:2408.03297).

A plain TRL script, for one process or many; `knowlab train knowpo` does the same in one process and can be resumed.

python examples/train_knowpo.py --limit 200 --output_dir results/knowpo
python examples/train_knowpo.py --limit 200 --objective simpo --beta 2.0 --output_dir results/knowpo-simpo   # or kto, orpo
torchrun --nproc_per_node 2 examples/train_knowpo.py --config examples/train_knowpo.yaml   # two processes on a CPU, by gloo
accelerate launch --config_file examples/accelerate/fsdp.yaml examples/train_knowpo.py --config examples/train_knowpo.yaml
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import TrainingArguments, set_seed
from trl.scripts.utils import TrlParser
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from lab.cli.session import open_model
from lab.errors import UnknownNameError
from lab.handle import ModelHandle
from lab.patch import Provenance, library_versions
from lab.peft_export import import_peft
from rag.decoding.contrast import position_limit
from rag.preference.bundle import save_bundle
from rag.preference.check import read_training_rows
from rag.preference.knowpo import KnowPOConfig, TrainingData
from rag.preference.prepare import METHODS, ready_data
from rag.preference.stage import records, to_dataset, write_jsonl
from rag.preference.train import check_kept, reference_guard

OBJECTIVES = ("dpo", "kto", "orpo", "simpo")


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    model: str = field(
        default="atlas", metadata={"help": "A built-in model, a folder, or a Hugging Face id."}
    )
    patch: list[str] = field(default_factory=list, metadata={"help": "Edits below the training; folders."})
    method: str = field(default="knowpo", metadata={"help": f"One of {', '.join(METHODS)}."})
    objective: str = field(
        default="dpo",
        metadata={
            "help": f"What the pairs are trained with, one of {', '.join(OBJECTIVES)}; loss_type and loss_weights are dpo's."
        },
    )
    data: str = field(default="atlas", metadata={"help": "atlas, a file of questions, or one of ready rows."})
    limit: int | None = field(default=None, metadata={"help": "Questions at most."})
    samples: int = field(
        default=10, metadata={"help": "Sampled answers that must be right for a known fact."}
    )
    draws: int = field(default=1, metadata={"help": "Sets of contexts of each question."})
    reader: str = field(
        default="direct",
        metadata={"help": "Train the answers of this reader: direct, or con after its notes."},
    )
    total: int | None = field(default=None, metadata={"help": "Pairs in all, repeated where there are few."})
    rewrite: bool = field(default=True, metadata={"help": "Word both answers alike; off for the ablation."})
    balanced: bool = field(default=True, metadata={"help": "Keep the ratio of errors; off for the ablation."})
    rank: int = field(default=16, metadata={"help": "Rank of the adapter; its alpha is twice that."})
    sft_learning_rate: float = field(default=1e-4, metadata={"help": "Rate of the first step."})
    sft_epochs: float = field(default=2.0, metadata={"help": "Passes of the first step."})


@dataclass
class PreferenceArguments(DPOConfig):
    """TRL's settings of DPO with the defaults of this script: full precision, quiet, and an SFT term in the loss."""

    output_dir: str | None = "results/knowpo"
    learning_rate: float = 2e-5
    num_train_epochs: float = 1.0
    loss_type: list[str] = field(default_factory=lambda: ["sigmoid", "sft"])
    loss_weights: list[float] | None = field(default_factory=lambda: [1.0, 0.5])
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    bf16: bool | None = False
    gradient_checkpointing: bool = False
    logging_steps: float = 1
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the example."""
    kinds: Any = (ScriptArguments, PreferenceArguments)
    parser = TrlParser(kinds)
    script, args = parser.parse_args_and_config(arguments)
    args.use_cpu = args.use_cpu or not torch.cuda.is_available()
    if script.objective not in OBJECTIVES:
        raise UnknownNameError("objective", script.objective, OBJECTIVES)
    out = Path(str(args.output_dir))
    # Edits go into the weights before any trainer sees the model; a reference loaded from disk would lack them.
    handle = open_model(script.model, [Path(place) for place in script.patch])
    ready: TrainingData | None = None
    with args.main_process_first(local=False, desc="data"):
        if args.process_index == 0:
            ready = make_data(handle, script, out / "data", args.seed)
    limit = min(filter(None, (args.max_length, position_limit(handle))))
    steps = written(handle, out / "data", limit)
    set_seed(args.seed)
    lora = LoraConfig(
        r=script.rank, lora_alpha=2 * script.rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    curves = {}
    if "sft" in steps:
        curves["sft"] = supervised(handle, steps["sft"], lora, script, args, limit)
        # Sharded weights are not taken apart: what follows begins from a fresh copy and the saved adapter.
        handle = open_model(script.model, [Path(place) for place in script.patch])
        with args.main_process_first(local=False, desc="pairs"):
            if ready is not None and ready.then is not None:
                with import_peft(out / "sft", handle).applied(handle):
                    write_data(ready.then(handle), out / "data")
        steps = written(handle, out / "data", limit)
    if "pairs" in steps:
        curves["pairs"] = preferences(
            handle, steps["pairs"], lora, script, args, limit, trained="sft" in steps
        )
    if args.process_index == 0:
        finish(script, args, out, "adapter" if "pairs" in steps else "sft", curves)
    return curves


def make_data(handle: ModelHandle, script: ScriptArguments, place: Path, seed: int) -> TrainingData:
    """What the method trains on; pairs of a model's mistakes after the first step are still to come."""
    config = KnowPOConfig(
        samples=script.samples,
        draws=script.draws,
        reader=script.reader,
        total=script.total,
        rewrite=script.rewrite,
        balanced=script.balanced,
    )
    ready = ready_data(handle, script.method, script.data, config=config, limit=script.limit, seed=seed)
    write_data(ready, place)
    return ready


def write_data(ready: TrainingData, place: Path) -> None:
    """Writes ``sft.jsonl`` and ``pairs.jsonl``, as far as there are any, and the manifest of every stage."""
    ready.save(place / "stages")
    for name, rows in (("sft", ready.sft), ("pairs", ready.pairs)):
        (place / f"{name}.jsonl").unlink(missing_ok=True)
        if rows is not None:
            write_jsonl(place / f"{name}.jsonl", records(rows))


def written(handle: ModelHandle, place: Path, length: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each step, as far as they are written."""
    files = {name: place / f"{name}.jsonl" for name in ("sft", "pairs")}
    return {
        name: read_training_rows(file, handle.tokenizer, max_length=length)[1]
        for name, file in files.items()
        if file.is_file()
    }


def supervised(
    handle: ModelHandle,
    rows: Sequence[dict[str, Any]],
    lora: LoraConfig,
    script: ScriptArguments,
    args: PreferenceArguments,
    length: int,
) -> list[dict[str, float]]:
    """The first step; its adapter goes to ``sft``."""
    settings = shared_settings(args, SFTConfig) | {
        "output_dir": str(Path(str(args.output_dir)) / "sft"),
        "learning_rate": script.sft_learning_rate,
        "num_train_epochs": script.sft_epochs,
        "max_length": length,
        "completion_only_loss": True,
    }
    trainer = SFTTrainer(
        model=handle.model,
        args=SFTConfig(**settings),
        train_dataset=to_dataset(rows),
        processing_class=handle.tokenizer,
        peft_config=lora,
    )
    check_kept(trainer, len(rows))
    trainer.train()
    trainer.save_model(settings["output_dir"])
    return curve(trainer)


def shared_settings(args: PreferenceArguments, kind: type[TrainingArguments]) -> dict[str, Any]:
    """What the command line says that any trainer understands."""
    known = {each.name for each in fields(TrainingArguments) if each.init} & {
        each.name for each in fields(kind)
    }
    return {name: getattr(args, name) for name in known}


def preferences(
    handle: ModelHandle,
    rows: Sequence[dict[str, Any]],
    lora: LoraConfig,
    script: ScriptArguments,
    args: PreferenceArguments,
    length: int,
    *,
    trained: bool,
) -> list[dict[str, float]]:
    """The second step; a reference is the adapter of the first one as it was, or no adapter where there was no first."""
    out = Path(str(args.output_dir))
    model: Any = handle.model
    if trained:
        model = PeftModel.from_pretrained(model, str(out / "sft"), is_trainable=True)
    given: dict[str, Any] = {
        "model": model,
        "train_dataset": to_dataset(rows),
        "processing_class": handle.tokenizer,
        "peft_config": None if trained else lora,
    }
    if script.objective == "dpo":
        trainer: Any = DPOTrainer(**given, args=replace(args, max_length=length))
        trainer.add_callback(reference_guard(tuple(args.loss_type), tuple(args.loss_weights or (1.0,))))
        expected = len(rows)
    else:
        trainer, expected = other_trainer(script.objective, given, rows, args, length)
    check_kept(trainer, expected)
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return curve(trainer)


def other_trainer(
    objective: str,
    given: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    args: PreferenceArguments,
    length: int,
) -> tuple[Any, int]:
    """The trainer of an objective other than DPO, and how many examples it must hold.

    KTO (arXiv:2402.01306) judges answers one by one against the reference, so every pair becomes two examples. ORPO
    (arXiv:2403.07691) and SimPO (arXiv:2405.14734, TRL's CPO trainer without its likelihood term) need no reference.
    """
    if objective == "kto":
        judged = [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
        # TRL pairs each example with its neighbour's answer before it draws batches, so they are shuffled here and not there.
        random.Random(args.seed).shuffle(judged)
        settings: dict[str, Any] = shared_settings(args, KTOConfig) | {
            "train_sampling_strategy": "sequential"
        }
        config: Any = KTOConfig(**settings, beta=args.beta, max_length=length)
        return KTOTrainer(**given | {"train_dataset": to_dataset(judged)}, args=config), len(judged)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        config = ORPOConfig(**shared_settings(args, ORPOConfig), beta=args.beta, max_length=length)
        return ORPOTrainer(**given, args=config), len(rows)
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = CPOConfig(
        **shared_settings(args, CPOConfig),
        beta=args.beta,
        max_length=length,
        loss_type="simpo",
        cpo_alpha=0.0,
    )
    return CPOTrainer(**given, args=config), len(rows)


def curve(trainer: Any) -> list[dict[str, float]]:
    """What was logged at every update."""
    return [
        {key: float(value) for key, value in entry.items() if isinstance(value, (int, float))}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def finish(
    script: ScriptArguments, args: PreferenceArguments, out: Path, last: str, curves: dict[str, Any]
) -> None:
    """The adapter with its edits as one folder that ``--patch`` takes."""
    handle = open_model(script.model, [Path(place) for place in script.patch])
    patch = import_peft(out / last, handle)
    loss = list(args.loss_type) if script.objective == "dpo" else [script.objective]
    settings = {"rank": script.rank, "beta": args.beta, "loss": loss}
    made = Provenance(script.method, settings, (), args.seed, library_versions(), {"curves": curves})
    parents = tuple(entry.patch.id for entry in handle.applied)
    saved = save_bundle(
        out / "bundle", handle, replace(patch, provenance=made, parents=parents), overwrite=True
    )
    (out / "curves.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
    print(f"adapter with its edits -> {saved}")


if __name__ == "__main__":
    main()
