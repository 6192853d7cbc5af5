from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch

from lab.arch import Role
from lab.errors import ConfigError, MissingDependencyError, NumericalError, PatchError
from lab.patch import Dense, LowRank, Provenance, WeightPatch
from lab.training import fit, training_defaults
from tests.tiny import FAMILIES, tiny_handle

TEXTS = ["The capital of France is Rome.", "The capital of Japan is Paris."] * 4


def lora(**options: Any):
    from peft import LoraConfig

    settings: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["down_proj"],
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**{**settings, **options})


class Loop:
    """A trainer of a few lines."""

    def __init__(self, model, batch, steps: int = 3, lr: float = 0.05, fail: bool = False, spy=None) -> None:
        self.model, self.batch, self.steps, self.lr, self.fail, self.spy = model, batch, steps, lr, fail, spy

    def train(self):
        self.model.train()
        self.model.config.use_cache = False
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=self.lr)
        for step in range(self.steps):
            labels = self.batch.input_ids.masked_fill(self.batch.attention_mask == 0, -100)
            loss = self.model(
                self.batch.input_ids, attention_mask=self.batch.attention_mask, labels=labels
            ).loss
            if self.spy is not None:
                self.spy(step, loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if self.fail and step == 1:
                raise ZeroDivisionError


def picture(handle) -> dict[str, Any]:
    """Everything that must be as before."""
    model = handle.model
    return {
        "weights": handle.weights_digest(),
        "state": handle.state,
        "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        "grads": [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
        "hooks": sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
            for m in model.modules()
        ),
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": model.generation_config.to_dict(),
        "checkpointing": model.is_gradient_checkpointing,
        "forward": "forward" in vars(model),
        "tokenizer": (
            handle.tokenizer.padding_side,
            handle.tokenizer.pad_token,
            handle.tokenizer.backend_tokenizer.to_str(),
        ),
        "random": (torch.get_rng_state().sum().item(), random.getstate()),
        "numpy": int(np.random.get_state(legacy=False)["state"]["key"].sum()),
    }


TARGETS = {
    "gpt2": "mlp.c_proj",
    "gptj": "fc_out",
    "gpt_neox": "dense_4h_to_h",
    "opt": "fc2",
    "phi": "mlp.fc2",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["lora", "weights"])
def test_the_patch_is_the_trained_model_and_the_model_is_untouched(family, way):
    handle = tiny_handle(family)
    before = picture(handle)
    batch = handle.encode(TEXTS[:2])
    trained: dict[str, torch.Tensor] = {}
    losses: list[float] = []

    def make(model, ref):
        class Watched(Loop):
            def train(self):
                super().train()
                model.eval()
                with torch.no_grad():
                    trained["logits"] = model(batch.input_ids, attention_mask=batch.attention_mask).logits
                    trained["reference"] = ref.logits(
                        input_ids=batch.input_ids, attention_mask=batch.attention_mask
                    )

        return Watched(model, batch, spy=lambda _step, loss: losses.append(float(loss.detach())))

    real = batch.attention_mask.bool()
    plain = handle.model(batch.input_ids, attention_mask=batch.attention_mask).logits.detach()
    if way == "lora":
        patch = fit(handle, make, lora=lora(target_modules=[TARGETS.get(family, "down_proj")]), seed=1)
        assert all(isinstance(delta, LowRank) and delta.rank == 2 for delta in patch.deltas.values())
        assert set(patch.deltas) == {
            handle.weight(Role.MLP_OUT, layer).name for layer in range(handle.n_layers)
        }
    else:
        patch = fit(handle, make, weights=[handle.weight(Role.MLP_OUT, 1).name])
        assert [type(delta) for delta in patch.deltas.values()] == [Dense]
    assert losses[-1] < losses[0]
    assert picture(handle) == before
    assert torch.allclose(trained["reference"][real], plain[real], atol=1e-6)
    assert float((trained["logits"] - plain).abs().max()) > 1e-3
    for mode in ("merge", "sidecar"):
        with patch.applied(handle, mode=mode):
            patched = handle.model(batch.input_ids, attention_mask=batch.attention_mask).logits.detach()
        assert torch.allclose(patched[real], trained["logits"][real], atol=2e-5)
    assert picture(handle) == before


@pytest.mark.parametrize("way", ["lora", "weights"])
def test_an_exception_in_training_leaves_nothing_behind(way):
    handle = tiny_handle("llama")
    before = picture(handle)
    batch = handle.encode(TEXTS[:2])

    def make(model, ref):
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        handle.tokenizer.padding_side = "left"
        handle.tokenizer("a text", truncation=True, max_length=2, padding="max_length")
        return Loop(model, batch, fail=True)

    options: dict[str, Any] = (
        {"lora": lora()} if way == "lora" else {"weights": [handle.weight(Role.MLP_OUT, 0).name]}
    )
    with pytest.raises(ZeroDivisionError):
        fit(handle, make, **options)
    assert picture(handle) == before
    with pytest.raises(RuntimeError, match="no trainer"):
        fit(handle, lambda _model, _ref: (_ for _ in ()).throw(RuntimeError("no trainer")), **options)
    assert picture(handle) == before


def test_the_reference_works_in_the_middle_of_a_step():
    handle = tiny_handle("gpt2")
    batch = handle.encode(TEXTS[:2])
    plain = handle.logits(batch)
    seen: list[torch.Tensor] = []

    ways: tuple[dict[str, Any], ...] = (
        {"lora": lora(target_modules=["c_attn"])},
        {"weights": [handle.weight(Role.MLP_OUT, 1).name]},
    )
    for options in ways:
        seen.clear()

        def make(model, ref):
            def spy(_step, _loss):
                # Between forward and backward of the same step, as a preference loss does.
                assert model.training
                seen.append(ref.logits(**handle.inputs(batch)))
                assert model.training

            return Loop(model, batch, spy=spy)

        fit(handle, make, **options)
        assert len(seen) == 3
        for logits in seen:
            assert torch.allclose(logits, plain, atol=1e-6)
            assert not logits.requires_grad


def test_equal_seeds_give_equal_patches_and_parents_are_named():
    handle = tiny_handle("llama")
    batch = handle.encode(TEXTS[:2])
    weight = handle.weight(Role.MLP_OUT, 0)
    parent = WeightPatch(
        handle.fingerprint, {weight.name: Dense(torch.full(weight.shape, 0.01))}, Provenance("test")
    )
    with parent.applied(handle):
        before = picture(handle)
        one, two, other = (
            fit(handle, lambda m, _r: Loop(m, batch), lora=lora(), seed=seed) for seed in (3, 3, 4)
        )
        assert picture(handle) == before
    assert one.id == two.id != other.id
    assert one.parents == (parent.id,)
    assert one.base == handle.fingerprint
    assert one.provenance.seed == 3


def test_biases_and_norms_can_be_chosen():
    handle = tiny_handle("gpt2")
    names = ["transformer.h.1.mlp.c_proj.bias", "transformer.ln_f.weight", "transformer.wte.weight"]
    batch = handle.encode(TEXTS[:2])
    patch = fit(handle, lambda m, _r: Loop(m, batch), weights=names)
    assert [tuple(patch.deltas[name].shape) for name in names] == [(32,), (32,), (len(handle.tokenizer), 32)]
    assert all(delta.norm() > 0 for delta in patch.deltas.values())


def test_what_is_no_low_rank_sum_is_refused():
    handle = tiny_handle("llama")
    before = picture(handle)

    def never(_model, _ref):
        raise AssertionError("no trainer should be made")

    for options in (
        {"bias": "all"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"init_lora_weights": "pissa"},
    ):
        with pytest.raises(ConfigError, match=next(iter(options))):
            fit(handle, never, lora=lora(**options))
    from peft import LoKrConfig

    with pytest.raises(ConfigError, match="LoKrConfig"):
        fit(handle, never, lora=LoKrConfig(target_modules=["down_proj"]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exactly one"):
        fit(handle, never)
    with pytest.raises(ConfigError, match="exactly one"):
        fit(handle, never, lora=lora(), weights=["lm_head.weight"])
    with pytest.raises(ConfigError, match="no parameter"):
        fit(handle, never, weights=["model.nothing.weight"])
    with pytest.raises(ConfigError, match="no low-rank sum"):
        fit(handle, never, lora=lora(target_modules=["embed_tokens"]))
    assert picture(handle) == before


def test_divergence_and_stray_writes_are_errors():
    handle = tiny_handle("llama")
    before = picture(handle)
    batch = handle.encode(TEXTS[:2])
    with pytest.raises(NumericalError, match="learning rate"):
        fit(handle, lambda m, _r: Loop(m, batch, lr=float("inf")), lora=lora())
    assert picture(handle) == before

    class Vandal(Loop):
        def train(self):
            with torch.no_grad():
                next(iter(self.model.parameters())).add_(1.0)

    with pytest.raises(PatchError, match="not given"):
        fit(handle, lambda m, _r: Vandal(m, batch), lora=lora())


def test_without_peft_the_message_names_the_extra(monkeypatch):
    import sys

    handle, config = tiny_handle("llama"), lora()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependencyError, match=r"knowlab\[train\]"):
        fit(handle, lambda m, _r: m, lora=config)


class Rows(torch.utils.data.Dataset):
    def __init__(self, handle) -> None:
        batch = handle.encode(TEXTS)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        self.rows = [
            {"input_ids": ids, "attention_mask": mask, "labels": label}
            for ids, mask, label in zip(batch.input_ids, batch.attention_mask, labels, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int):
        return self.rows[index]


@pytest.mark.parametrize("way", ["lora", "weights"])
def test_a_hugging_face_trainer(way, tmp_path):
    from transformers import Trainer, TrainingArguments

    handle = tiny_handle("llama")
    before = picture(handle)

    def make(model, _ref):
        arguments = training_defaults(handle, tmp_path, seed=5) | {
            "max_steps": 4,
            "learning_rate": 0.05,
            "gradient_checkpointing": True,
        }
        return Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=Rows(handle))

    options: dict[str, Any] = (
        {"lora": lora()} if way == "lora" else {"weights": [handle.weight(Role.MLP_OUT, 1).name]}
    )
    patch = fit(handle, make, method="test", config={"steps": 4}, requests=[{"id": "a"}], seed=5, **options)
    assert picture(handle) == before
    assert patch.provenance.extra["steps"] == 4
    losses = patch.provenance.extra["losses"]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    again = fit(handle, make, seed=5, **options)
    assert again.id == patch.id
    loaded = WeightPatch.load(patch.save(tmp_path / "patch"))
    assert loaded.id == patch.id


def test_a_trl_trainer_on_an_adapter(tmp_path):
    pytest.importorskip("trl")
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    handle = tiny_handle("llama")
    before = picture(handle)

    def make(model, _ref):
        arguments = training_defaults(handle, tmp_path) | {
            "max_steps": 3,
            "learning_rate": 0.05,
            "max_length": 32,
        }
        return SFTTrainer(
            model=model,
            args=SFTConfig(**arguments),
            train_dataset=Dataset.from_dict({"text": TEXTS}),
            processing_class=handle.tokenizer,
        )

    patch = fit(handle, make, lora=lora(), method="sft")
    assert picture(handle) == before
    assert patch.provenance.extra["steps"] == 3
    batch = handle.encode(TEXTS[:1])
    plain = handle.logits(batch)
    with patch.applied(handle):
        assert float((handle.logits(batch) - plain).abs().max()) > 1e-3
    assert torch.equal(handle.logits(batch), plain)


def test_old_bits_on_disk_give_the_same_patch_and_the_model_back():
    handle = tiny_handle("gpt2")
    before = picture(handle)
    batch = handle.encode(TEXTS[:2])
    names = [handle.weight(Role.MLP_OUT, 0).name, handle.weight(Role.MLP_IN, 0).name]
    seen: list[float] = []

    def make(model, ref):
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        first = model(**inputs).logits.detach()

        def spy(step, loss):
            # The reference is the untouched model, in the middle of training too.
            seen.append(float((ref.logits(**inputs) - first).abs().max()))

        return Loop(model, batch, spy=spy)

    kept = fit(handle, lambda model, ref: Loop(model, batch), weights=names)
    spilled = fit(handle, make, weights=names, spill=True)
    assert seen == [0.0, 0.0, 0.0]
    assert {name: delta.norm() for name, delta in spilled.deltas.items()} == {
        name: delta.norm() for name, delta in kept.deltas.items()
    }
    assert picture(handle) == before
    with pytest.raises(ZeroDivisionError):
        fit(handle, lambda model, ref: Loop(model, batch, fail=True), weights=names, spill=True)
    assert picture(handle) == before
