"""A run that is killed in the middle goes on from its last whole pass and ends with the very patch that it would have given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
from safetensors import safe_open

from editors.unlearning import get_unlearner
from editors.unlearning.checkpoint import FILE, clear
from editors.unlearning.gradient import with_checkpoint
from lab.errors import ConfigError
from lab.records import Fact
from tests.tiny import tiny_handle

FORGET = [
    Fact("France", "capital", "Paris", "The capital of {} is", id="capital/France"),
    Fact("Italy", "capital", "Rome", "The capital of {} is", id="capital/Italy"),
    Fact("Barack Obama", "spouse", "Michelle Obama", "{}'s wife is", id="spouse/Barack Obama"),
]
RETAIN = [
    Fact("Japan", "capital", "Tokyo", "The capital of {} is", id="capital/Japan"),
    Fact("Spain", "capital", "Madrid", "The capital of {} is", id="capital/Spain"),
    Fact("Ann", "spouse", "Bob Dole", "{}'s wife is", id="spouse/Ann"),
]
NEVER = {"stop_above": None, "stop_retain": None}
SETTINGS = {"lr": 3e-3, "epochs": 4, "batch_size": 2, **NEVER}
# What each carries from pass to pass: nothing but Adam, a moving weight, a shrinking set, masks, drawn facts, a perturbation.
CASES = {
    "npo": {},
    "pdu": {"tolerance": 0.0},
    "icu": {"forgotten_below": 0.0},
    "klue": {"skip_forgotten": False},
    "roka": {"neighbors": 1},
    "lat": {"layer": 0},
}


class Interrupted(Exception):
    pass


def interrupt_at(update):
    def told(phase, done, total):
        if phase == "steps" and done == update:
            raise Interrupted

    return told


@pytest.mark.parametrize("name", CASES)
def test_an_interrupted_run_ends_with_the_same_patch(name, tmp_path):
    handle = tiny_handle("llama", layers=2, scale=1.5)
    bits = handle.weights_digest()
    plain = get_unlearner(name, **SETTINGS, **CASES[name])
    whole = plain.unlearn(handle, FORGET, RETAIN)
    updates = whole.provenance.extra["updates"]
    kept = with_checkpoint(plain, tmp_path / "kept")
    with pytest.raises(Interrupted):
        kept.unlearn(handle, FORGET, RETAIN, progress=interrupt_at(3 * updates // 4))
    assert handle.weights_digest() == bits
    seen = []
    again = kept.unlearn(handle, FORGET, RETAIN, progress=lambda *told: seen.append(told))
    steps = [told for told in seen if told[0] == "steps"]
    assert 0 < len(steps) < updates
    assert again.id == whole.id
    assert again.provenance.extra == whole.provenance.extra
    assert handle.weights_digest() == bits


def test_adapters_go_on_too(tmp_path):
    handle = tiny_handle("gpt2", layers=2, scale=1.5)
    plain = get_unlearner("npo", weights="lora", rank=2, **SETTINGS)
    whole = plain.unlearn(handle, FORGET, RETAIN)
    kept = with_checkpoint(plain, tmp_path)
    with pytest.raises(Interrupted):
        kept.unlearn(handle, FORGET, RETAIN, progress=interrupt_at(5))
    assert kept.unlearn(handle, FORGET, RETAIN).id == whole.id


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    handle = tiny_handle("llama", layers=2, scale=1.5)
    with_checkpoint(get_unlearner("npo", **SETTINGS), tmp_path).unlearn(handle, FORGET, RETAIN)
    bits = handle.weights_digest()
    for other in (get_unlearner("npo", **SETTINGS, beta=0.3), get_unlearner("npo", **SETTINGS, seed=1)):
        with pytest.raises(ConfigError, match="another"):
            with_checkpoint(other, tmp_path).unlearn(handle, FORGET, RETAIN)
    with pytest.raises(ConfigError, match="another"):
        with_checkpoint(get_unlearner("npo", **SETTINGS), tmp_path).unlearn(handle, FORGET[:2], RETAIN)
    (tmp_path / FILE).write_bytes(b"torn")
    with pytest.raises(ConfigError, match="cannot be read"):
        with_checkpoint(get_unlearner("npo", **SETTINGS), tmp_path).unlearn(handle, FORGET, RETAIN)
    assert handle.weights_digest() == bits
    clear(tmp_path)
    assert not tmp_path.exists()


def test_methods_without_passes_keep_none(tmp_path):
    with pytest.raises(ConfigError, match="pass"):
        with_checkpoint(get_unlearner("rocr"), tmp_path)


def test_a_killed_process_leaves_a_checkpoint_that_another_goes_on_from(tmp_path):
    program = textwrap.dedent(
        """
        import os, signal, sys
        from editors.unlearning import get_unlearner
        from editors.unlearning.gradient import with_checkpoint
        from tests.editors.unlearning.test_checkpoint import FORGET, RETAIN, SETTINGS
        from tests.tiny import tiny_handle

        def told(phase, done, total):
            if phase == "steps" and done == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        handle = tiny_handle("llama", layers=2, scale=1.5)
        with_checkpoint(get_unlearner("npo", **SETTINGS), sys.argv[1]).unlearn(handle, FORGET, RETAIN, progress=told)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    with safe_open(tmp_path / FILE, "pt") as file:
        assert ["done", 4] in json.loads(file.metadata()["state"])["items"]
    handle = tiny_handle("llama", layers=2, scale=1.5)
    plain = get_unlearner("npo", **SETTINGS)
    again = with_checkpoint(plain, tmp_path).unlearn(handle, FORGET, RETAIN)
    assert again.id == plain.unlearn(handle, FORGET, RETAIN).id
