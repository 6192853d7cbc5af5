"""The plain TRL script: one process in this one, two of them through accelerate."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lab.handle import ModelHandle
from rag.preference.bundle import load_bundle

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_knowpo.py"
TOWNS = {"Ada": "Paris", "Bo": "Rome", "Cy": "Cairo", "Di": "Lima"}
PAIRS = [
    {
        "prompt": f"Document 1: {who} lives in {town}.\nQ: Where?\nA:",
        "chosen": f" {town}.\n",
        "rejected": " Tokyo.\n",
    }
    for who, town in TOWNS.items()
]
SFT = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]


def script() -> Any:
    spec = importlib.util.spec_from_file_location("train_knowpo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up the names of their annotations in the module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def config(folder: Path, rows: list[dict[str, str]], form: str = "yaml", **more: Any) -> Path:
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {
        "model": "atlas", "data": str(data), "rank": 2, "max_steps": 2, "per_device_train_batch_size": 4, "warmup_steps": 0,
        "learning_rate": 0.01, "sft_learning_rate": 0.01, "loss_type": ["sigmoid"], "loss_weights": [1.0],
        "use_cpu": True, "disable_tqdm": True, "output_dir": str(folder / "out"),
    } | more  # fmt: skip
    file = folder / f"settings.{form}"
    file.write_text(yaml.safe_dump(settings) if form == "yaml" else json.dumps(settings), encoding="utf-8")
    return file


def test_two_steps_over_an_edited_model_make_a_bundle(tmp_path, standin, saved_patch):
    file = config(tmp_path, PAIRS, patch=[str(saved_patch)])
    curves = script().main(["--config", str(file), "--learning_rate", "0.02"])
    assert [len(curve) for curve in curves.values()] == [2]
    assert curves["pairs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert curves["pairs"][1]["rewards/margins"] > 0
    handle = ModelHandle.load("atlas")
    before = handle.logits(handle.encode([PAIRS[0]["prompt"]]))
    applied = load_bundle(tmp_path / "out" / "bundle", handle)
    # The edit and the adapter over it.
    assert len(applied) == 2
    assert applied[1].patch.parents == (applied[0].patch.id,)
    assert not torch.equal(before, handle.logits(handle.encode([PAIRS[0]["prompt"]])))


@pytest.mark.parametrize("objective", ["kto", "orpo", "simpo"])
@pytest.mark.parametrize("first", [False, True])
def test_other_objectives_prefer_what_was_chosen(tmp_path, standin, monkeypatch, objective: str, first: bool):
    module = script()
    if first:
        from rag.preference.knowpo import TrainingData
        from rag.preference.stage import to_dataset

        ready = TrainingData(to_dataset(SFT), to_dataset(PAIRS), {})
        monkeypatch.setattr(module, "ready_data", lambda *_args, **_more: ready)
    file = config(tmp_path, PAIRS, objective=objective, max_steps=4, beta=0.5, per_device_train_batch_size=8)
    curves = module.main(["--config", str(file)])
    assert list(curves) == (["sft", "pairs"] if first else ["pairs"])
    losses = [entry["loss"] for entry in curves["pairs"]]
    assert len(losses) == 4 and losses[-1] < losses[0]
    if objective == "kto":
        # Against a reference that is the model itself, every example has half of a weight of one.
        assert losses[0] == pytest.approx(0.5, abs=1e-4)
    saved = json.loads((tmp_path / "out" / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    handle = ModelHandle.load("atlas")
    before = margins(handle)
    load_bundle(tmp_path / "out" / "bundle", handle)
    assert margins(handle) > before, saved


def margins(handle: ModelHandle) -> float:
    """How much likelier chosen answers are than rejected ones, in nats, summed over the pairs."""
    from lab.scoring import score_targets

    sides = [
        score_targets(handle, [(row["prompt"], row[side]) for row in PAIRS])
        for side in ("chosen", "rejected")
    ]
    return sum(a.sum_logprob - b.sum_logprob for a, b in zip(*sides, strict=True))


def test_an_unknown_objective_is_refused(tmp_path, standin):
    from lab.errors import UnknownNameError

    with pytest.raises(UnknownNameError, match="simpo"):
        script().main(["--config", str(config(tmp_path, PAIRS, objective="simp"))])


def test_the_second_step_goes_on_from_the_first(tmp_path, standin, monkeypatch):
    module = script()
    from rag.preference.knowpo import TrainingData
    from rag.preference.stage import to_dataset

    monkeypatch.setattr(
        module, "ready_data", lambda *_args, **_more: TrainingData(to_dataset(SFT), to_dataset(PAIRS), {})
    )
    curves = module.main(["--config", str(config(tmp_path, PAIRS, form="json"))])
    assert list(curves) == ["sft", "pairs"]
    assert curves["sft"][1]["loss"] < curves["sft"][0]["loss"]
    # The reference is the model after the first step: a coin's loss again.
    assert curves["pairs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    made = json.loads((tmp_path / "out" / "bundle" / "bundle.json").read_text(encoding="utf-8"))
    assert made["edits"] == []


def test_pairs_may_follow_the_first_step(tmp_path, standin, monkeypatch, saved_patch):
    module = script()
    from rag.preference.knowpo import TrainingData
    from rag.preference.stage import to_dataset

    seen: list[float] = []

    def then(handle: ModelHandle) -> TrainingData:
        # The edit, and the first step over it.
        assert len(handle.applied) == 2
        seen.append(margins(handle))
        return TrainingData(to_dataset(SFT), to_dataset(PAIRS), {})

    begun = TrainingData(to_dataset(SFT), None, {}, then)
    monkeypatch.setattr(module, "ready_data", lambda *_args, **_more: begun)
    curves = module.main(["--config", str(config(tmp_path, PAIRS, patch=[str(saved_patch)]))])
    assert list(curves) == ["sft", "pairs"] and len(seen) == 1
    assert curves["pairs"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    handle = ModelHandle.load("atlas")
    before = margins(handle)
    load_bundle(tmp_path / "out" / "bundle", handle)
    assert before < seen[0] < margins(handle)


def test_an_unknown_setting_is_refused(tmp_path, standin):
    file = config(tmp_path, PAIRS, form="json", lerning_rate=0.1)
    with pytest.raises(ValueError, match="lerning_rate"):
        script().main(["--config", str(file)])


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_zero2", "deepspeed_zero3"])
def test_the_settings_of_accelerate_can_be_read(name):
    from accelerate.commands.config.config_args import load_config_from_file

    found = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert found.num_processes == 2
    assert (found.distributed_type.value == "DEEPSPEED") == name.startswith("deepspeed")


@pytest.mark.slow
def test_two_processes_train_one_adapter(tmp_path, standin):
    file = config(tmp_path, PAIRS, per_device_train_batch_size=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--master_port", str(port), str(SCRIPT), "--config", str(file),
    ]  # fmt: skip
    ran = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    # Only the first process writes; two rows in each of two processes are all four in one step.
    assert ran.stdout.count("adapter with its edits") == 1
    two = json.loads((tmp_path / "out" / "curves.json").read_text(encoding="utf-8"))["pairs"]
    assert len(two) == 2
    assert two[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    alone = script().main(["--config", str(config(tmp_path, PAIRS, output_dir=str(tmp_path / "alone")))])[
        "pairs"
    ]
    for name in ("loss", "num_tokens", "rewards/margins"):
        assert two[1][name] == pytest.approx(alone[1][name], rel=0.05), name
    assert two[1]["rewards/margins"] > 0
