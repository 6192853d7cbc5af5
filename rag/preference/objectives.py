"""TRL's trainers on pairs: DPO and its losses, KTO, ORPO, SimPO; with guards on what they do without a word."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lab.errors import DataError, PatchError
from rag.preference.stage import Record, to_dataset

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lab.handle import ModelHandle
    from rag.preference.train import TrainConfig

OBJECTIVES = ("dpo", "kto", "orpo", "simpo")
_FIRST_LOSS = math.log(2)
_TOLERANCE = 1e-3


def preference_trainer(
    handle: ModelHandle,
    model: Any,
    rows: list[Record],
    config: TrainConfig,
    arguments: Mapping[str, Any],
    *,
    reference: Any = None,
) -> Any:
    """TRL's trainer of ``config.objective`` on a model with a fresh adapter, with a guard on its reference where it has one.

    DPO (arXiv:2305.18290) and KTO (arXiv:2402.01306, every pair as a wanted and an unwanted row) compare with the model as it
    was; ORPO (arXiv:2403.07691) and SimPO (arXiv:2405.14734, without its SFT term) have no reference.

    Args:
        handle: Gives the tokenizer.
        model: The model with its adapter, as ``fit`` makes it.
        rows: Pairs.
        config: Objective, losses and rate.
        arguments: Further arguments of TRL's config.
        reference: Another model to compare with; the guard refuses one that is not the model itself.
    """
    shared = {
        **arguments,
        "learning_rate": config.dpo_lr,
        "num_train_epochs": config.dpo_epochs,
        "beta": config.beta,
    }
    given = {"model": model, "processing_class": handle.tokenizer}
    if config.objective in ("orpo", "simpo"):
        return _without_reference(config, shared, {**given, "train_dataset": to_dataset(rows)})
    if config.objective == "kto":
        from trl.trainer.kto_config import KTOConfig
        from trl.trainer.kto_trainer import KTOTrainer

        trainer: Any = KTOTrainer(
            **given, ref_model=reference, args=KTOConfig(**shared), train_dataset=to_dataset(unpaired(rows))
        )
    else:
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer

        losses = {"loss_type": list(config.loss), "loss_weights": list(config.loss_weights)}
        trainer = DPOTrainer(
            **given,
            ref_model=reference,
            args=DPOConfig(**{**shared, **losses}),
            train_dataset=to_dataset(rows),
        )
    # TRL copies the adapter as its reference. Without the copy it switches the adapter off, which is the same and smaller.
    if "ref" in getattr(model, "peft_config", {}):
        model.delete_adapter("ref")
    loss = config.loss if config.objective == "dpo" else (config.objective,)
    trainer.add_callback(reference_guard(loss, config.loss_weights))
    return trainer


def _without_reference(config: TrainConfig, shared: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    with _quiet_experiments():
        if config.objective == "orpo":
            from trl.experimental.orpo import ORPOConfig, ORPOTrainer

            return ORPOTrainer(**given, args=ORPOConfig(**shared))
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        margin = {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": config.gamma}
        return CPOTrainer(**given, args=CPOConfig(**shared, **margin))


@contextmanager
def _quiet_experiments() -> Iterator[None]:
    """TRL warns on every import of these trainers that they may move; the versions are pinned."""
    name = "TRL_EXPERIMENTAL_SILENCE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def unpaired(rows: Sequence[Mapping[str, Any]]) -> list[Record]:
    """Every pair as two rows ``prompt, completion, label``: the wanted answer and the unwanted one."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


def check_kept(trainer: Any, rows: int) -> None:
    """Refuses a trainer that left rows out.

    Raises:
        DataError: It holds fewer rows than it was given.
    """
    kept = len(trainer.train_dataset)
    if kept != rows:
        raise DataError(f"the trainer left out {rows - kept} of {rows} rows; their prompts fill max_length")


def reference_guard(loss: Sequence[str], weights: Sequence[float]) -> Any:
    """A callback that ends DPO after its first update where the model was not its own reference before it.

    Args:
        loss: Losses as TRL names them; of ``sigmoid`` alone the first value, ln 2, is held to as well.
        weights: One weight a loss.

    Raises:
        PatchError: While training: the rewards of the first step are not 0.
    """
    from transformers import TrainerCallback

    class Guard(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            # KTO's first batch may hold rows of one side only.
            found = [(logs or {}).get(f"rewards/{side}") for side in ("chosen", "rejected")]
            if state.global_step != 1 or found == [None, None]:
                return
            rewards = [0.0 if value is None else float(value) for value in found]
            off = max(map(abs, rewards))
            if tuple(loss) == ("sigmoid",) and tuple(weights) == (1.0,):
                off = max(off, abs(float(logs["loss"]) - _FIRST_LOSS))
            if not off <= _TOLERANCE:
                raise PatchError(
                    f"before its first update the model differs from its reference (rewards {rewards[0]:.4f} and "
                    f"{rewards[1]:.4f}, loss {float(logs['loss']):.4f} where ln 2 is due): the reference must be the same model "
                    "with its edits and the adapter off"
                )

    return Guard()
