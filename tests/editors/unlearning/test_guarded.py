"""Training that spares what other facts read: the damping, Adam under it, and gradients at subjects' tokens alone."""

from __future__ import annotations

import pytest
import torch

from editors.unlearning import get_unlearner
from editors.unlearning.guarded import GuardedAdam, damping
from editors.unlearning.trainer import UnlearningTrainer
from lab.arch import Role
from lab.errors import ConfigError, NumericalError
from lab.patch import WeightPatch
from lab.records import Fact
from lab.scoring import score_targets
from lab.tokens import subject_span
from lab.trace import Site, trace
from tests.tiny import tiny_handle

FORGET = [Fact("Barack Obama", "spouse", "Michelle Obama", "{}'s wife is", id="spouse/Barack Obama")]
RETAIN = [
    Fact("Japan", "capital", "Tokyo", "The capital of {} is", id="capital/Japan"),
    Fact("Tim Cook", "spouse", "Ann", "{}'s wife is", id="spouse/Tim Cook"),
]
SETTINGS = {
    "weights": "mlp_out",
    "layers": (0,),
    "lr": 0.05,
    "epochs": 4,
    "stop_above": None,
    "stop_retain": None,
}


def changes_of(name, handle, **settings):
    """The patch's changes by weight."""
    patch = get_unlearner(name, **settings).unlearn(handle, FORGET, RETAIN)
    assert isinstance(patch, WeightPatch)
    return patch, {weight: delta.dense() for weight, delta in patch.deltas.items()}


def test_directions_in_use_are_damped_and_free_ones_are_not():
    factor = damping(torch.diag(torch.tensor([9.0, 1.0, 0.0, 0.0])), 0.4)
    assert factor.diagonal().tolist() == pytest.approx([(1 / 10) ** 0.5, (1 / 2) ** 0.5, 1.0, 1.0])
    with pytest.raises(NumericalError):
        damping(torch.full((2, 2), float("nan")), 0.1)


@pytest.mark.parametrize("transposed", [False, True])
def test_adam_under_a_damping_is_adam_on_the_free_part(transposed):
    torch.manual_seed(0)
    start, target = torch.randn(3, 5), torch.randn(3, 5)
    root = torch.randn(5, 8)
    factor = damping(root @ root.T, 0.1).float()
    own = torch.nn.Parameter((start.T if transposed else start).clone())
    free = torch.nn.Parameter(torch.zeros(3, 5))
    guarded, plain = (
        GuardedAdam([own], [factor], [transposed], 0.1),
        torch.optim.AdamW([free], 0.1, weight_decay=0.0),
    )
    for _ in range(5):
        guarded.zero_grad()
        ((own.T if transposed else own) - target).square().sum().backward()
        guarded.step()
        plain.zero_grad()
        (start + free @ factor - target).square().sum().backward()
        plain.step()
    found = own.detach().T if transposed else own.detach()
    assert torch.allclose(found, start + free.detach() @ factor, atol=1e-5)
    assert float((found - start).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_guard_spares_retained_facts_without_a_retain_term(family):
    handle = tiny_handle(family, layers=2, scale=1.5)
    pairs = [(fact.text, fact.object) for fact in (*FORGET, *RETAIN)]
    bits, before = handle.weights_digest(), [s.mean_logprob for s in score_targets(handle, pairs)]
    moved = {}
    for guard in (None, 1e-4):
        settings = {**SETTINGS, "retain_weight": 1e-9, "guard": guard}
        patch, deltas = changes_of("graddiff", handle, **settings)
        assert set(deltas) == {handle.weight(Role.MLP_OUT, 0).name}
        [delta] = deltas.values()
        with patch.scaled(1 / float(delta.norm())).applied(handle):
            after = [s.mean_logprob for s in score_targets(handle, pairs)]
        lost = [old - new for old, new in zip(before, after, strict=True)]
        moved[guard] = max(abs(lost[1]), abs(lost[2])) / abs(lost[0])
    assert moved[1e-4] < moved[None] / 2
    assert handle.weights_digest() == bits


def test_without_retained_facts_the_guard_reads_general_text(tmp_path, monkeypatch):
    handle = tiny_handle("llama", layers=2, scale=1.5)
    asked = []

    def moments(self, handle, retain, progress):
        asked.append(len(retain))
        name = handle.weight(Role.MLP_OUT, 0).name
        return {name: torch.eye(handle.weight(Role.MLP_OUT, 0).shape[1])}

    monkeypatch.setattr("editors.unlearning.gradient.GradientUnlearner._moments", moments)
    settings = {name: value for name, value in SETTINGS.items() if name != "stop_retain"}
    patch, deltas = changes_of("catnip", handle, **settings, guard=0.1)
    assert asked == [2]
    assert patch.provenance.extra["retained_facts"] == 0
    assert all(float(delta.norm()) > 0 for delta in deltas.values())


def test_only_the_subjects_tokens_teach():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    fact = FORGET[0]
    span = subject_span(handle.tokenizer, fact.text, fact.subject)
    settings = {**SETTINGS, "lr": 1e-3, "epochs": 1, "retain_weight": 0.0}
    changes = {}
    for tokens in ("all", "subject"):
        [changes[tokens]] = changes_of("graddiff", handle, **settings, tokens=tokens)[1].values()
    assert not torch.allclose(changes["all"], changes["subject"])
    # Adam's first step is the gradient's sign: neurons that are silent at the subject's tokens stay as they were.
    site = Site(Role.MLP_OUT, 0, "in")
    with trace(handle, [site]) as recording:
        recording.run(handle.encode([fact.text]))
    assert len(span) < recording[site].shape[1]
    slope = _slope_at(handle, fact, span)
    assert torch.equal(changes["subject"].sign()[slope.abs() > 1e-6], -slope.sign()[slope.abs() > 1e-6])


def _slope_at(handle, fact, span):
    """Gradient of ascent on the answer, from the subject's tokens alone."""
    from lab.tokens import join_target

    head, tail = join_target(handle.tokenizer, fact.text, fact.object)
    module = handle.module(Role.MLP_OUT, 0)

    def hold(_, __, out):
        free = torch.zeros(out.shape[1], dtype=torch.bool)
        free[span.start : span.stop] = True
        return torch.where(free[None, :, None], out, out.detach())

    hook = module.register_forward_hook(hold)
    try:
        logits = handle.model(torch.tensor([[*head, *tail]])).logits[0]
        table = torch.log_softmax(logits[len(head) - 1 : -1], -1)
        said = table[range(len(tail)), tail].mean()
        (slope,) = torch.autograd.grad(said, module.weight)
    finally:
        hook.remove()
    return slope


def test_a_falling_rate_moves_less():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    norms = {}
    for decay in (False, True):
        [delta] = changes_of("npo", handle, **SETTINGS, decay=decay)[1].values()
        norms[decay] = float(delta.norm())
    assert 0 < norms[True] < norms[False]


@pytest.mark.parametrize(
    "settings",
    [
        {"guard": 0.1},
        {"guard": 0.0, "weights": "mlp_out", "layers": (0,)},
        {"tokens": "subject"},
        {"tokens": "last", "weights": "mlp", "layers": (0,)},
        {"weights": "mlp_out"},
        {"retain_batch": 0},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ConfigError):
        get_unlearner("npo", **settings)


def test_facts_that_are_gone_are_left_out_of_updates(monkeypatch):
    handle = tiny_handle("llama", layers=2, scale=1.5)
    both = [*FORGET, Fact("France", "capital", "Paris", "The capital of {} is", id="capital/France")]
    known = [
        score.probability for score in score_targets(handle, [(fact.text, fact.object) for fact in both])
    ]
    seen = []
    plain = UnlearningTrainer.answers

    def watched(self, kind, picked, **options):
        seen.append(list(picked))
        return plain(self, kind, picked, **options)

    monkeypatch.setattr(UnlearningTrainer, "answers", watched)
    limit = sum(known) / 2  # one of the two lies below from the start
    settings = {"lr": 1e-5, "epochs": 2, "stop_above": None, "done_below": limit}
    patch = get_unlearner("ga", **settings).unlearn(handle, both)
    assert seen == [[known.index(max(known))]] * 2
    assert patch.provenance.extra["updates"] == 2
    patch = get_unlearner("ga", **{**settings, "done_below": 0.999}).unlearn(handle, both)
    assert patch.provenance.extra["updates"] == 0
