"""``fit``: run a Hugging Face or TRL trainer on a handle's model and get a patch; the model itself stays as it was.

What may train is a LoRA adapter or chosen weights. The reference that preference and unlearning losses compare with is the
same model with the adapter off (or the old bits in place), never a second copy.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from lab.errors import ConfigError, MissingDependencyError, NumericalError, PatchError
from lab.model_state import ModelState, checksum, random_state
from lab.patch import Delta, Dense, LowRank, Provenance, WeightPatch, library_versions
from lab.quantized import QuantizedLinear

if TYPE_CHECKING:
    from peft import LoraConfig

    from lab.handle import ModelHandle, Weight


class TrainerLike(Protocol):
    """Whatever trains: a ``transformers.Trainer``, a TRL trainer, or a loop of one's own."""

    def train(self) -> Any:
        """Trains the model it was made with, in place."""
        ...


@dataclass(frozen=True, eq=False)
class Reference:
    """The model as it was before training, without a second copy of it.

    Example:
        >>> with ref():
        ...     before = model(**inputs).logits
    """

    model: nn.Module
    _off: Callable[[], Any]

    @contextmanager
    def __call__(self) -> Iterator[nn.Module]:
        """The untrained model in evaluation mode without gradients, for the length of a ``with``."""
        training = [module for module in self.model.modules() if module.training]
        with self._off(), torch.no_grad():
            try:
                self.model.eval()
                yield self.model
            finally:
                for module in training:
                    module.training = True

    def logits(self, **inputs: Any) -> Tensor:
        """Logits ``[batch, pos, vocabulary]`` of the untrained model."""
        with self() as model:
            return model(**inputs).logits


MakeTrainer = Callable[[Any, Reference], TrainerLike]


def training_defaults(handle: ModelHandle, output_dir: str | Path, *, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments for ``TrainingArguments`` (and TRL's configs): the handle's device, quiet, seeded, nothing saved."""
    return {
        "output_dir": str(output_dir),
        "use_cpu": handle.device.type == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": seed,
        "data_seed": seed,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": handle.device.type != "cpu",
    }


def fit(
    handle: ModelHandle,
    make_trainer: MakeTrainer,
    *,
    lora: LoraConfig | None = None,
    weights: Sequence[str] | None = None,
    method: str = "fit",
    config: Mapping[str, Any] | None = None,
    requests: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    resume: str | Path | None = None,
    spill: bool = False,
) -> WeightPatch:
    """Trains and returns what changed.

    Holds the write lock throughout. Afterwards, also after an exception, every bit, flag, hook and setting of the model is
    as before: adapters are gone, as are gradients, gradient checkpointing and whatever the trainer set in the config.
    Random generators are put back too.

    Args:
        handle: The model, with whatever is applied to it (recorded as the patch's parents).
        make_trainer: Gets the model to train and the reference, returns the trainer; ``train()`` is called on it.
        lora: Adapter to train; its deltas become ``LowRank``.
        weights: Names of parameters to train instead; their deltas become ``Dense``.
        method: For the patch's provenance.
        config: Settings, likewise.
        requests: What was asked for, likewise.
        seed: Seeds the adapter's start and everything that the trainer does not seed itself.
        resume: Checkpoint folder of a Hugging Face or TRL trainer to go on from.
        spill: Keeps the old bits of ``weights`` in temporary files instead of in memory. A reference that is used during training
            reads them anew each time.

    Returns:
        The patch, based on this model, not applied.

    Raises:
        ConfigError: Not exactly one of ``lora`` and ``weights``; an adapter that is no low-rank sum; an unknown weight.
        MissingDependencyError: ``lora`` without peft.
        NumericalError: Training ended in NaN or infinity.
        PatchError: The trainer wrote to weights that it was not given.
    """
    if (lora is None) == (weights is None):
        raise ConfigError(
            "fit trains either a LoRA adapter or chosen weights; give exactly one of lora= and weights="
        )
    if lora is not None:
        _check_lora(lora)
        if any(isinstance(module, QuantizedLinear) for module in handle.model.modules()):
            raise ConfigError(
                f"{handle.name!r} was quantised on loading, and peft knows no adapter for that; load it without quantize="
            )
    chosen = _chosen(handle, weights or ())
    base, parents = handle.fingerprint, tuple(entry.patch.id for entry in handle.applied)
    with handle.writing(), random_state(seed), ModelState(handle).kept():
        if lora is not None:
            deltas, notes = _train_adapter(handle, make_trainer, lora, resume)
        else:
            deltas, notes = _train_weights(handle, make_trainer, chosen, resume, spill)
    for name, delta in deltas.items():
        if not all(bool(torch.isfinite(part).all()) for part in delta.tensors().values()):
            raise NumericalError(f"training ended in NaN or infinity in {name!r}; lower the learning rate")
    provenance = Provenance(
        method,
        dict(config or {}),
        tuple(dict(request) for request in requests),
        seed,
        library_versions(),
        notes,
    )
    return WeightPatch(base, deltas, provenance, parents)


def _train_weights(
    handle: ModelHandle,
    make_trainer: MakeTrainer,
    chosen: Mapping[str, Weight],
    resume: str | Path | None,
    spill: bool,
) -> tuple[dict[str, Delta], dict[str, Any]]:
    model = handle.model
    parameters = {name: weight.parameter for name, weight in chosen.items()}

    with _kept_bits(parameters, spill) as pristine:

        @contextmanager
        def old_bits() -> Iterator[None]:
            # Storage is exchanged, not written: a write would invalidate the graph of a forward pass under way.
            trained = {name: parameter.data for name, parameter in parameters.items()}
            try:
                for name, parameter in parameters.items():
                    parameter.data = pristine(name)
                yield
            finally:
                for name, parameter in parameters.items():
                    parameter.data = trained[name]

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        others = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        before = [checksum(parameter) for parameter in others]
        try:
            notes = _run(make_trainer(model, Reference(model, old_bits)), resume)
            # Nobody reads them any more; on large models gradients are as large as the change that is made next.
            for parameter in parameters.values():
                parameter.grad = None
            deltas: dict[str, Delta] = {}
            for name, weight in chosen.items():
                wide = torch.promote_types(weight.parameter.dtype, torch.float32)
                change = weight.parameter.detach().to(wide) - pristine(name).to(wide)
                deltas[name] = Dense(change.T if weight.transposed else change)
            _check_untouched(handle, others, before)
        finally:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(pristine(name))
                    # The state that comes back holds the old storage, which is the one that was trained in.
    return deltas, notes


@contextmanager
def _kept_bits(parameters: Mapping[str, Tensor], spill: bool) -> Iterator[Callable[[str], Tensor]]:
    """Gives each parameter's old bits by name, on the device where the parameter is now."""
    if not spill:
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}

        def remembered(name: str) -> Tensor:
            kept[name] = kept[name].to(parameters[name].device)
            return kept[name]

        yield remembered
        return
    with tempfile.TemporaryDirectory(prefix="knowlab-fit-") as folder:
        from safetensors.torch import load_file, save_file

        files = {name: Path(folder) / f"{number}.safetensors" for number, name in enumerate(parameters)}
        for name, parameter in parameters.items():
            save_file({"bits": parameter.detach().contiguous()}, files[name])

        def read(name: str) -> Tensor:
            return load_file(files[name], device=str(parameters[name].device))["bits"]

        yield read


def _train_adapter(
    handle: ModelHandle, make_trainer: MakeTrainer, lora: LoraConfig, resume: str | Path | None
) -> tuple[dict[str, Delta], dict[str, Any]]:
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    others = list(handle.model.parameters())
    before = [checksum(parameter) for parameter in others]
    adapted = get_peft_model(handle.model, lora)
    layers: dict[str, Any] = {
        name: module for name, module in handle.model.named_modules() if isinstance(module, LoraLayer)
    }
    for name, module in layers.items():
        parts = [*module.lora_A.values(), *module.lora_B.values()]
        if not parts or any(not isinstance(part, nn.Linear) for part in parts):
            raise ConfigError(
                f"LoRA on {name!r} ({type(module).__name__}) is no low-rank sum; adapt projections only"
            )
    notes = _run(make_trainer(adapted, Reference(adapted, adapted.disable_adapter)), resume)
    deltas: dict[str, Delta] = {}
    for name, module in layers.items():
        [adapter] = module.lora_A.keys()
        left = module.lora_B[adapter].weight.detach().float() * float(module.scaling[adapter])
        deltas[f"{name}.weight"] = LowRank(left, module.lora_A[adapter].weight.detach().float())
    _check_untouched(handle, others, before)
    return deltas, notes


def _run(trainer: TrainerLike, resume: str | Path | None) -> dict[str, Any]:
    """Trains; returns what belongs into the provenance (nothing that differs between equal runs, such as times)."""
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        if resume is not None:
            raise ConfigError(
                "resume= needs a transformers or TRL trainer; others keep their own checkpoints"
            )
        trainer.train()
        return {}
    engine: Any = trainer
    engine.train(resume_from_checkpoint=None if resume is None else str(resume))
    state = engine.state
    losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
    return {"steps": int(state.global_step), "losses": losses}


def _chosen(handle: ModelHandle, names: Sequence[str]) -> dict[str, Weight]:
    chosen = {name: handle.named_weight(name) for name in names}
    for name, weight in chosen.items():
        if not weight.parameter.is_floating_point():
            raise ConfigError(
                f"{name!r} is {weight.parameter.dtype}; only floating-point weights can be trained"
            )
    if len({id(weight.parameter) for weight in chosen.values()}) < len(chosen):
        raise ConfigError("two of the chosen weights are one tied parameter; name it once")
    return chosen


def _check_lora(lora: LoraConfig) -> None:
    try:
        import peft
    except ImportError:
        raise MissingDependencyError("peft", "training a LoRA adapter", "train") from None
    if type(lora) is not peft.LoraConfig:
        raise ConfigError(
            f"fit needs a peft.LoraConfig, not {type(lora).__name__}: only plain LoRA is a low-rank sum"
        )
    wrong = {
        "bias": lora.bias != "none",
        "use_dora": bool(lora.use_dora),
        "modules_to_save": bool(lora.modules_to_save),
        "trainable_token_indices": bool(lora.trainable_token_indices),
        "target_parameters": bool(lora.target_parameters),
        "layer_replication": bool(lora.layer_replication),
        "lora_bias": bool(lora.lora_bias),
        # Other starts rewrite the base weight, and the trained factors are then no difference to it.
        "init_lora_weights": lora.init_lora_weights not in (True, False, "gaussian"),
    }
    if names := [name for name, bad in wrong.items() if bad]:
        raise ConfigError(
            f"the LoRA option {names[0]!r} changes more than a low-rank sum can hold; leave it at its default"
        )


def _check_untouched(handle: ModelHandle, parameters: Sequence[Tensor], before: Sequence[int]) -> None:
    if [checksum(parameter) for parameter in parameters] != list(before):
        raise PatchError(
            f"the trainer changed weights of {handle.name!r} that it was not given; reload the model"
        )
