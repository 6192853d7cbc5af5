"""Runs NPO's trainer of a checkout of open-unlearning (locuslab/open-unlearning) beside ours; nothing of it is part of this repository.

Its package imports every trainer's dependencies at once. Here it is entered without its ``__init__``.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from lab.handle import ModelHandle
from lab.records import Fact

Collate = Callable[[ModelHandle, Sequence[Fact]], tuple[Any, Any, Any]]


def enter(checkout: Path) -> None:
    """Makes ``trainer.*`` importable.

    Raises:
        SystemExit: There is no checkout.
    """
    root = checkout / "src" / "trainer"
    if not root.is_dir():
        raise SystemExit(
            f"{checkout} holds no folder src/trainer; give a checkout of locuslab/open-unlearning"
        )
    for name in ("trainer", "trainer.unlearn"):
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module


def npo(
    handle: ModelHandle,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    collate: Collate,
    mark: Callable[[], None],
    *,
    size: int,
    passes: int,
    beta: float,
    rate: float,
    decay: float,
) -> None:
    """Its NPO, full weights in fp32 with AdamW, on batches in our order and padding; calls ``mark`` after every update.

    Its defaults are kept where they mean something on a CPU: mean of the retained answers' loss, clipping at 1. Its paged AdamW
    needs a GPU; the fused one of torch, which transformers takes by default, is the fastest there is here.
    """
    from transformers import TrainerCallback, TrainingArguments

    theirs: Any = importlib.import_module("trainer.unlearn.npo").NPO

    class Trainer(theirs):
        # Newer transformers pass how many tokens there are; its trainers, written before, do not take that.
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            return super().compute_loss(model, inputs, return_outputs)

        def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
            return None  # in order

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            mark()

    def batch(places: Sequence[int]) -> dict[str, dict[str, Any]]:
        sides = {"forget": forget, "retain": retain}
        return {
            side: dict(
                zip(
                    ("input_ids", "attention_mask", "labels"),
                    collate(handle, [facts[place] for place in places]),
                    strict=True,
                )
            )
            for side, facts in sides.items()
        }

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            num_train_epochs=passes,
            learning_rate=rate,
            lr_scheduler_type="constant",
            weight_decay=decay,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=True,
            seed=0,
        )
        trainer = Trainer(
            model=handle.model,
            args=arguments,
            train_dataset=list(range(len(forget))),
            data_collator=batch,
            callbacks=[Marks()],
            beta=beta,
        )
        trainer.train()
