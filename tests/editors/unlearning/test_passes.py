"""One pass over several kinds of text says what a pass per kind says, and teaches what it teaches."""

from __future__ import annotations

import pytest
import torch

from editors.unlearning import get_unlearner, passes
from editors.unlearning.settings import GradientConfig
from editors.unlearning.trainer import UnlearningTrainer
from lab.records import Fact
from tests.editors.unlearning.test_gradient import FORGET
from tests.editors.unlearning.test_gradient import RETAIN as ONE_RETAINED
from tests.tiny import tiny_handle

RETAIN = [
    *ONE_RETAINED,
    Fact("Kenya", "capital", "Nairobi", "The capital of the city of {} is", id="capital/Kenya"),
    Fact("Korea", "capital", "Seoul", "The capital of {} is", id="capital/Korea"),
]


def trainer_of(handle, method="dpo", **settings):
    config = GradientConfig(**settings)
    trainer = UnlearningTrainer(handle, get_unlearner(method).objective, config, FORGET, RETAIN, seed=0)
    for kind in trainer.objective.reads:
        trainer.remember(trainer.sides[kind], range(len(FORGET)))
    trainer.remember(trainer.retained, range(len(RETAIN)))
    return trainer


def seen(parts, retained, handle):
    """Log-probabilities, what was remembered, and every weight's gradient of a loss that reads all of it."""
    found, loss = [], torch.zeros((), dtype=torch.float64)
    for number, answers in enumerate([*parts.values(), retained]):
        table = answers.lines.of(answers.logits)
        chosen = table.gather(1, answers.lines.label[:, None])[:, 0]
        loss = loss + (number + 1) * (chosen.exp() * (1 + torch.arange(len(chosen)))).sum()
        known = answers.reference[answers.lines.row, answers.lines.column]
        found.append((chosen.detach(), known, [int(length) for length in answers.lines.batch.lengths]))
        assert (answers.labels != -100).sum() == len(chosen)
    wanted = {name: each for name, each in handle.model.named_parameters() if each.requires_grad}
    slopes = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return found, dict(zip(wanted, slopes, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_one_pass_equals_a_pass_per_kind(family, monkeypatch):
    handle = tiny_handle(family, layers=2, scale=1.5, dtype=torch.float64)
    trainer = trainer_of(handle)
    runs = []
    plain = handle.logits
    monkeypatch.setattr(handle, "logits", lambda *a, **k: runs.append(1) or plain(*a, **k))
    monkeypatch.setattr(passes, "MOST_PADDING", 10.0)
    with torch.enable_grad():
        joined = seen(*trainer.together(("answer", "refusal"), [1, 0], [2, 1]), handle)
        assert len(runs) == 1
        monkeypatch.setattr(passes, "MOST_PADDING", 0.0)
        runs.clear()
        apart = seen(*trainer.together(("answer", "refusal"), [1, 0], [2, 1]), handle)
        assert len(runs) == 3
    for one, other in zip(joined[0], apart[0], strict=True):
        torch.testing.assert_close(one[0], other[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=0)
        torch.testing.assert_close(other[0], other[1].to(other[0]), rtol=1e-5, atol=1e-5)
        assert one[2] == other[2]
    for name, slope in apart[1].items():
        torch.testing.assert_close(joined[1][name], slope, rtol=1e-9, atol=1e-12)


def test_no_retained_facts_and_one_kind_are_a_plain_pass():
    trainer = trainer_of(tiny_handle("llama", layers=2), "npo")
    parts, retained = trainer.together(("answer",), [0], [])
    assert list(parts) == ["answer"] and retained is None
    assert parts["answer"].logits.shape[0] == 1


def test_where_only_subjects_teach_nothing_is_joined(monkeypatch):
    trainer = trainer_of(
        tiny_handle("llama", layers=2), "npo", tokens="subject", layers=(0,), weights="mlp_out"
    )
    monkeypatch.setattr(
        UnlearningTrainer, "_in_one_pass", lambda *_: pytest.fail("retained rows would be held too")
    )
    _, retained = trainer.together(("answer",), [0], [0])
    assert retained is not None and retained.logits.shape[0] == 1
