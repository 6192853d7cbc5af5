"""SFT, then DPO, of an adapter through TRL; the reference is the model as it stands, edits included.

The traps of TRL that are guarded here: a reference that is loaded again from disk without the edits (the first step's loss is
then not ln 2), rows that are left out or cut without a word, half precision and gradient checkpointing by default.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lab.errors import ConfigError, MissingDependencyError
from lab.patch import Provenance, WeightPatch, library_versions
from lab.records import write_text_atomically
from lab.training import Reference, fit, training_defaults
from rag.decoding.contrast import position_limit
from rag.preference.check import PAIR_FIELDS, SFT_FIELDS, check_rows
from rag.preference.knowpo import TrainingData
from rag.preference.objectives import OBJECTIVES, check_kept, preference_trainer, reference_guard
from rag.preference.stage import Dataset, Record, Report, digest, records, to_dataset

if TYPE_CHECKING:
    from lab.handle import ModelHandle

Curve = list[dict[str, float]]
__all__ = [
    "TrainConfig",
    "Trained",
    "check_kept",
    "last_checkpoint",
    "preference_trainer",
    "reference_guard",
    "train_preference",
]


@dataclass(frozen=True)
class TrainConfig:
    """How an adapter is trained. The rates are ours; KnowPO prints none.

    Attributes:
        rank, alpha, dropout: The LoRA adapter.
        targets: Modules that it adapts; all linear ones but the output layer.
        sft_lr, sft_epochs: First step.
        dpo_lr, dpo_epochs, beta: Second step.
        loss: Losses of the second step as TRL names them, summed with ``loss_weights``. Without the SFT term abstention and
            accuracy break down (Divide-Then-Align, arXiv:2505.20871).
        loss_weights: One weight a loss.
        objective: What the second step minimises: ``dpo`` (with ``loss``), ``kto``, ``orpo`` or ``simpo``.
        gamma: SimPO's margin; other objectives have none.
        batch_size, accumulation: Rows in a step: their product.
        max_steps: Ends each step early.
        max_length: Longest row in tokens; the model's own limit without it.
        gradient_checkpointing: Saves memory for time.
        bf16: Computes in bfloat16 while weights stay as they are; faster where the processor can, not to the bit the same.
        save_steps: Steps between checkpoints, where there is a work folder.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    sft_lr: float = 1e-4
    sft_epochs: float = 2.0
    dpo_lr: float = 2e-5
    dpo_epochs: float = 1.0
    beta: float = 0.1
    loss: tuple[str, ...] = ("sigmoid", "sft")
    loss_weights: tuple[float, ...] = (1.0, 0.5)
    objective: str = "dpo"
    gamma: float = 0.5
    batch_size: int = 8
    accumulation: int = 1
    max_steps: int | None = None
    max_length: int | None = None
    gradient_checkpointing: bool = False
    bf16: bool = False
    save_steps: int = 50

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"unknown objective {self.objective!r}; use {', '.join(OBJECTIVES)}")
        if len(self.loss) != len(self.loss_weights) or not self.loss:
            raise ConfigError(
                f"{len(self.loss)} losses need as many weights, there are {len(self.loss_weights)}"
            )


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        patch: The adapter: both steps as one patch on the model with its edits.
        curves: Step (``sft``, ``dpo``) to what was logged at every update.
        data: What it was trained on, with the pairs that were made after the first step.
    """

    patch: WeightPatch
    curves: Mapping[str, Curve]
    data: TrainingData


def train_preference(
    handle: ModelHandle,
    data: TrainingData,
    config: TrainConfig | None = None,
    *,
    method: str = "knowpo",
    work: str | Path | None = None,
    seed: int = 0,
    progress: Report | None = None,
    first: Trained | None = None,
) -> Trained:
    """Trains an adapter on SFT rows, then on pairs; either may be absent. The model stays as it was.

    Args:
        handle: The model, with its edits applied: they are the patch's parents.
        data: What to train on.
        config: Settings.
        method: For the provenance.
        work: Folder of checkpoints. A run that was interrupted goes on from there; a finished one leaves nothing to do again.
        seed: Of the adapter's start and the order of rows.
        progress: Told about every update.
        first: What the SFT step made before on the same rows with the same settings and seed: it is not trained again.

    Raises:
        DataError: A row cannot be trained on, see ``check_rows``.
        PatchError: The reference is not the model that is trained.
        ConfigError: ``work`` belongs to another run; there is nothing to train on.
    """
    config = config or TrainConfig()
    try:
        import peft
        import trl
    except ImportError as error:
        raise MissingDependencyError(error.name or "trl", "preference training", "train") from None
    del peft, trl
    if data.sft is None and data.pairs is None:
        raise ConfigError("there is nothing to train on: neither SFT rows nor pairs")
    with TemporaryDirectory() as temporary:
        run = _Run(handle, config, Path(work or temporary), seed, work is not None, method, progress)
        # Both are looked through before the first step, which may take hours.
        plain = {name: run.checked(name, rows) for name, rows in _steps(data)}
        curves: dict[str, Curve] = {}
        patch: WeightPatch | None = None
        if first is not None:
            patch, curves = first.patch, dict(first.curves)
        elif "sft" in plain:
            patch, curves["sft"] = run.train("sft", *plain["sft"])
        with nullcontext() if patch is None else patch.applied(handle):
            if data.then is not None:
                data = data.then(handle)
                plain |= {name: run.checked(name, rows) for name, rows in _steps(data) if name == "dpo"}
            if "dpo" in plain:
                second, curves["dpo"] = run.train("dpo", *plain["dpo"])
                patch = second if patch is None else patch + second
    assert patch is not None
    notes = {"rows": {name: len(rows) for name, (rows, _) in plain.items()}, "curves": curves}
    provenance = Provenance(method, _settings(config), (), seed, library_versions(), notes)
    return Trained(replace(patch, provenance=provenance), curves, data)


def _steps(data: TrainingData) -> list[tuple[str, Dataset]]:
    return [(name, rows) for name, rows in (("sft", data.sft), ("dpo", data.pairs)) if rows is not None]


def _plain(data: Dataset, name: str) -> list[Record]:
    fields = SFT_FIELDS if name == "sft" else PAIR_FIELDS
    return [{field: row.get(field) for field in fields} for row in records(data)]


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}


@dataclass(frozen=True)
class _Run:
    """Both steps of one training and their work folder."""

    handle: ModelHandle
    config: TrainConfig
    place: Path
    seed: int
    keep: bool
    method: str
    progress: Report | None

    def checked(self, name: str, data: Dataset) -> tuple[list[Record], int]:
        """The rows of a step and their longest length, and the work folder made this run's own."""
        rows = _plain(data, name)
        limit = min(filter(None, (self.config.max_length, position_limit(self.handle))))
        fields = SFT_FIELDS if name == "sft" else PAIR_FIELDS
        length = check_rows(rows, self.handle.tokenizer, fields, max_length=limit)
        self._claim(name, rows)
        return rows, length

    def _claim(self, name: str, rows: list[Record]) -> None:
        run = {
            "state": self.handle.state,
            "data": digest(rows),
            "config": _settings(self.config),
            "seed": self.seed,
        }
        file = self.place / f"{name}.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != run:
            raise ConfigError(
                f"the work folder {self.place} belongs to a run with another model, data or settings; choose another"
            )
        write_text_atomically(file, json.dumps(run, indent=2))

    def train(self, name: str, rows: list[Record], length: int) -> tuple[WeightPatch, Curve]:
        """One step, over what is applied now."""
        return _Step(self, name, rows, length).train()


@dataclass(frozen=True)
class _Step:
    """One step of a run."""

    run: _Run
    name: str
    rows: list[Record]
    length: int

    def train(self) -> tuple[WeightPatch, Curve]:
        done = self.run.place / f"{self.name}-done"
        if (done / "patch.json").is_file():
            patch = WeightPatch.load(done)
            return patch, patch.provenance.extra["curve"]
        from peft import LoraConfig

        config, made = self.run.config, []
        targets = config.targets if isinstance(config.targets, str) else list(config.targets)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )

        def make(model: Any, reference: Reference) -> Any:
            del reference  # TRL switches the adapter off by itself
            made.append(self.trainer(model))
            return made[0]

        patch = fit(
            self.run.handle,
            make,
            lora=lora,
            method=f"{self.run.method}-{self.name}",
            config=_settings(config),
            seed=self.run.seed,
            resume=last_checkpoint(self.run.place / self.name),
        )
        curve = [
            {key: float(value) for key, value in entry.items() if isinstance(value, (int, float))}
            for entry in made[0].state.log_history
            if "loss" in entry
        ]
        note = replace(patch.provenance, extra={**patch.provenance.extra, "curve": curve})
        patch = replace(patch, provenance=note)
        if self.run.keep:
            patch.save(done, overwrite=True)
        return patch, curve

    def trainer(self, model: Any) -> Any:
        """The trainer of this step for a model with a fresh adapter."""
        arguments, handle, config = self.arguments(), self.run.handle, self.run.config
        if self.name == "sft":
            from trl.trainer.sft_config import SFTConfig
            from trl.trainer.sft_trainer import SFTTrainer

            settings: dict[str, Any] = {
                "learning_rate": config.sft_lr,
                "num_train_epochs": config.sft_epochs,
            }
            trainer: Any = SFTTrainer(
                model=model,
                args=SFTConfig(**arguments, **settings, completion_only_loss=True),
                train_dataset=to_dataset(self.rows),
                processing_class=handle.tokenizer,
            )
        else:
            trainer = preference_trainer(handle, model, self.rows, config, arguments)
        check_kept(trainer, len(self.rows) * (2 if self._unpaired() else 1))
        from transformers import PrinterCallback

        # Without its bar the trainer prints every logged step to standard output, which may be a JSON document.
        trainer.remove_callback(PrinterCallback)
        if self.run.progress is not None:
            trainer.add_callback(_telling(self.name, self.run.progress))
        return trainer

    def _unpaired(self) -> bool:
        return self.name == "dpo" and self.run.config.objective == "kto"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of TRL's config, but for the rates."""
        run, config = self.run, self.run.config
        arguments = training_defaults(run.handle, run.place / self.name, seed=run.seed) | {
            "per_device_train_batch_size": config.batch_size,
            "gradient_accumulation_steps": config.accumulation,
            "gradient_checkpointing": config.gradient_checkpointing,
            "bf16": config.bf16,
            "max_steps": config.max_steps or -1,
            "max_length": self.length,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.1,
        }
        if run.keep:
            saving = {"save_strategy": "steps", "save_steps": config.save_steps, "save_total_limit": 2}
            arguments |= saving
        return arguments


def _telling(name: str, progress: Report) -> Any:
    from transformers import TrainerCallback

    class Telling(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            progress(name, int(state.global_step), int(state.max_steps))

    return Telling()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run; a checkpoint that was being written when the run died is passed over."""
    found = [
        (int(place.name.rsplit("-", 1)[1]), place)
        for place in folder.glob("checkpoint-*")
        # The trainer writes its state last.
        if place.name.rsplit("-", 1)[1].isdigit() and (place / "trainer_state.json").is_file()
    ]
    return max(found)[1] if found else None
