from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest
import torch

from lab.arch import Role
from lab.errors import BaseMismatchError, ConfigError, DataError, MissingParentsError, PatchError
from lab.patch import Dense, Provenance, WeightPatch
from lab.patch_io import load_saved
from lab.scoring import score_targets
from lab.training import fit, training_defaults
from rag.preference.bundle import load_bundle, save_bundle
from rag.preference.check import PAIR_FIELDS, check_rows, read_training_rows
from rag.preference.control import equal_token_sft
from rag.preference.knowpo import TrainingData
from rag.preference.stage import to_dataset
from rag.preference.train import TrainConfig, last_checkpoint, preference_trainer, train_preference
from tests.tiny import tiny_handle, tiny_tokenizer

PAIRS = [
    {
        "prompt": f"Document 1: {who} lives in {town}.\nQ: Where?\nA:",
        "chosen": f" {town}.\n",
        "rejected": " Tokyo.\n",
    }
    for who, town in (("Ada", "Paris"), ("Bo", "Rome"), ("Cy", "Nairobi"), ("Di", "France"))
]
SFT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
FEW: dict[str, Any] = {"rank": 2, "batch_size": 2, "max_steps": 3, "sft_lr": 1e-2, "dpo_lr": 1e-2}


def data(sft: bool = True) -> TrainingData:
    return TrainingData(to_dataset(SFT) if sft else None, to_dataset(PAIRS), {})


def edit_of(handle: Any) -> WeightPatch:
    weight = handle.weight(Role.MLP_OUT, 1)
    generator = torch.Generator().manual_seed(5)
    delta = Dense(torch.randn(weight.shape, generator=generator) * 0.3)
    return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("test"))


def test_both_steps_make_one_patch_over_the_edited_model(tmp_path):
    handle = tiny_handle()
    edit = edit_of(handle)
    with edit.applied(handle):
        before = handle.weights_digest()
        config = TrainConfig(**FEW, loss=("sigmoid",), loss_weights=(1.0,))
        trained = train_preference(handle, data(), config, seed=1)
        assert handle.weights_digest() == before
        # The reference is the model with its edit and its SFT step: the first loss is that of a coin.
        assert trained.curves["dpo"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert trained.curves["dpo"][0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)
        assert trained.curves["dpo"][-1]["rewards/margins"] > 0
        assert trained.curves["sft"][-1]["loss"] < trained.curves["sft"][0]["loss"]
        assert trained.patch.parents == (edit.id,)
        batch = handle.encode([PAIRS[0]["prompt"]])
        with trained.patch.applied(handle):
            logits = handle.logits(batch)
        saved = save_bundle(tmp_path / "out", handle, trained.patch)
    card = json.loads((saved / "bundle.json").read_text(encoding="utf-8"))
    assert card["base"] == handle.fingerprint

    fresh = tiny_handle()
    for entry in load_bundle(saved, fresh):
        assert entry.patch.id in (edit.id, trained.patch.id)
    assert torch.equal(fresh.logits(batch), logits)

    other = tiny_handle(seed=1)
    with pytest.raises(BaseMismatchError, match="load its base"):
        load_bundle(saved, other)
    assert not other.applied
    # The folder is the adapter's patch as well, and refuses the base without the edit.
    with pytest.raises(MissingParentsError):
        load_saved(saved).apply(tiny_handle())
    with pytest.raises(ConfigError, match="same edits"):
        save_bundle(tmp_path / "other", handle, trained.patch)


def test_a_first_step_trained_before_gives_the_same_adapter():
    handle, config = tiny_handle(), TrainConfig(**FEW)
    whole = train_preference(handle, data(), config, seed=1)
    first = train_preference(handle, TrainingData(data().sft, None, {}), config, seed=1)
    again = train_preference(handle, data(), config, seed=1, first=first)
    assert again.curves["sft"] == first.curves["sft"]
    assert "dpo" in again.curves and "dpo" not in first.curves
    batch = handle.encode([PAIRS[0]["prompt"]])
    logits = []
    for trained in (whole, again, first):
        with trained.patch.applied(handle):
            logits.append(handle.logits(batch))
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_the_mixed_loss_keeps_the_guard_quiet_and_checkpointing_leaves_no_trace():
    handle = tiny_handle()
    before = handle.weights_digest()
    trained = train_preference(handle, data(sft=False), TrainConfig(**FEW, gradient_checkpointing=True))
    first = trained.curves["dpo"][0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert first["loss"] > math.log(2) + 0.1
    assert not handle.model.is_gradient_checkpointing
    assert not any(
        parameter.requires_grad and parameter.grad is not None for parameter in handle.model.parameters()
    )
    assert handle.weights_digest() == before


@pytest.mark.parametrize("objective", ["kto", "orpo", "simpo"])
def test_other_objectives_prefer_the_chosen_answer_too(objective):
    handle = tiny_handle()
    before, digest = margins(handle), handle.weights_digest()
    config = TrainConfig(**FEW | {"max_steps": 6, "dpo_lr": 3e-2}, objective=objective)
    trained = train_preference(handle, data(sft=False), config)
    assert handle.weights_digest() == digest
    assert all(math.isfinite(row["loss"]) for row in trained.curves["dpo"])
    with trained.patch.applied(handle):
        assert sum(margins(handle)) > sum(before) + 0.5


def margins(handle: Any) -> list[float]:
    """How much likelier the chosen answer is, pair by pair."""
    likely = []
    for side in ("chosen", "rejected"):
        items = [(row["prompt"], row[side]) for row in PAIRS]
        likely.append([score.sum_logprob for score in score_targets(handle, items)])
    return [one - two for one, two in zip(*likely, strict=True)]


def test_an_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match="ppo"):
        TrainConfig(objective="ppo")


@pytest.mark.parametrize("chosen", [True, False])
def test_the_controls_see_as_many_tokens_with_the_chosen_answers_and_without(chosen: bool):
    handle = tiny_handle()
    config = TrainConfig(sft_epochs=2.0, dpo_epochs=3.0)
    made, changed = equal_token_sft(handle, data(), config, chosen=chosen)
    assert made.pairs is None and len(made.sft) == len(SFT) + chosen * len(PAIRS)

    def tokens(*sides: str) -> int:
        rows = [row | {"completion": row["chosen"]} for row in PAIRS]
        return sum(
            len(handle.tokenizer(row["prompt"] + row[side])["input_ids"]) for row in rows for side in sides
        )

    wanted = 2 * tokens("completion") + 3 * tokens("chosen", "rejected")
    assert changed.sft_epochs * (1 + chosen) * tokens("completion") == pytest.approx(wanted)
    assert changed.dpo_epochs == config.dpo_epochs


def test_another_reference_is_refused(tmp_path):
    from peft import LoraConfig

    handle = tiny_handle()
    config = TrainConfig(**FEW, loss=("sigmoid",), loss_weights=(1.0,))
    arguments = training_defaults(handle, tmp_path) | {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": 64,
    }

    def make(model: Any, _reference: Any) -> Any:
        # What a trainer that loads its reference from disk would compare with: the model without its edit.
        return preference_trainer(handle, model, PAIRS, config, arguments, reference=tiny_handle().model)

    lora = LoraConfig(r=2, target_modules=["down_proj"], task_type="CAUSAL_LM")
    with edit_of(handle).applied(handle):
        before = handle.weights_digest()
        with pytest.raises(PatchError, match="ln 2"):
            fit(handle, make, lora=lora)
        assert handle.weights_digest() == before


class Killed(Exception):
    pass


def in_two_parts(seen: list[float] | None = None) -> TrainingData:
    """Data whose pairs reject what the model as the first step leaves it likes less of two towns."""

    def then(handle: Any) -> TrainingData:
        towns = (" Tokyo.\n", " Lima.\n")
        rows = []
        for row in PAIRS:
            scores = [
                score.sum_logprob for score in score_targets(handle, [(row["prompt"], t) for t in towns])
            ]
            rows.append(row | {"rejected": towns[scores[0] > scores[1]]})
            if seen is not None:
                seen.extend(scores)
        return TrainingData(to_dataset(SFT), to_dataset(rows), {})

    return TrainingData(to_dataset(SFT), None, {}, then)


def test_pairs_that_follow_the_first_step_are_made_with_the_model_that_it_leaves():
    handle, config = tiny_handle(), TrainConfig(**FEW, loss=("sigmoid",), loss_weights=(1.0,))
    with edit_of(handle).applied(handle):
        before, seen, told = handle.weights_digest(), [], []
        trained = train_preference(handle, in_two_parts(seen), config, seed=1)
        assert handle.weights_digest() == before
        assert list(trained.curves) == ["sft", "dpo"]
        assert trained.curves["dpo"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert trained.data.pairs is not None and trained.data.then is None
        first = train_preference(handle, TrainingData(data().sft, None, {}), config, seed=1)
        with first.patch.applied(handle):
            in_two_parts(told).then(handle)  # type: ignore[misc]
        assert seen == told
        plain: list[float] = []
        in_two_parts(plain).then(handle)  # type: ignore[misc]
        assert seen != plain


# One place by hand in each step, and one that is drawn anew in every run of the tests.
@pytest.mark.parametrize("made", [data, in_two_parts])
@pytest.mark.parametrize("place", [("sft", 2), ("dpo", 3), None], ids=["sft", "dpo", "drawn"])
def test_a_killed_run_goes_on_to_the_same_end(place, made, tmp_path):
    place = place or random.SystemRandom().choice([("sft", 3), ("sft", 4), ("dpo", 2), ("dpo", 4)])
    config = TrainConfig(**FEW | {"max_steps": 4}, save_steps=1)
    whole = train_preference(tiny_handle(), made(), config, work=tmp_path / "whole", seed=2)

    def kill(step: str, done: int, _total: int) -> None:
        if (step, done) == place:
            raise Killed

    work = tmp_path / "work"
    with pytest.raises(Killed):
        train_preference(tiny_handle(), made(), config, work=work, seed=2, progress=kill)
    checkpoint = last_checkpoint(work / place[0])
    assert checkpoint is not None and checkpoint.name == f"checkpoint-{place[1] - 1}"
    steps: list[tuple[str, int]] = []
    handle = tiny_handle()
    resumed = train_preference(
        handle,
        made(),
        config,
        work=work,
        seed=2,
        progress=lambda name, done, _total: steps.append((name, done)),
    )
    every = [(step, number) for step in ("sft", "dpo") for number in range(1, 5)]
    assert steps == every[every.index(place) :], place
    for step in ("sft", "dpo"):
        losses = ([row["loss"] for row in run.curves[step]] for run in (resumed, whole))
        assert next(losses) == next(losses), place
    assert resumed.patch.id == whole.patch.id
    with pytest.raises(ConfigError, match="another model, data or settings"):
        train_preference(handle, made(), config, work=work, seed=3)


BAD = {
    "chosen equal": ({**PAIRS[0], "rejected": " paris"}, "row 3: chosen and rejected"),
    "missing": ({"prompt": "Q", "chosen": " a"}, "row 3: field 'rejected'"),
    "long prompt": ({**PAIRS[0], "prompt": "a b c d " * 40}, "row 3: the prompt alone"),
    "long row": ({**PAIRS[0], "chosen": " a b c d" * 40}, "row 3: prompt and 'chosen'"),
    "boundary": ({**PAIRS[0], "prompt": "Q: Where?\nA: ", "chosen": "Paris"}, "row 3: the prompt's last token"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_trained_on_is_named(name, tmp_path):
    row, message = BAD[name]
    tokenizer = tiny_tokenizer()
    if name == "boundary":
        ids = tokenizer("A: Paris")["input_ids"]
        assert tokenizer("A: ")["input_ids"] != ids[: len(tokenizer("A: ")["input_ids"])], (
            "tokens must merge here"
        )
    with pytest.raises(DataError, match=message):
        check_rows([*PAIRS[:2], row], tokenizer, PAIR_FIELDS, max_length=64)
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(each) for each in [*PAIRS[:2], row]), encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs.jsonl.*3"):
        read_training_rows(file, tokenizer, max_length=64)


def test_good_files_are_read(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"instruction": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in PAIRS
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_training_rows(file, tiny_tokenizer(), max_length=64) == ("pairs", PAIRS)
    with pytest.raises(ConfigError, match="as many weights"):
        TrainConfig(loss=("sigmoid",))
