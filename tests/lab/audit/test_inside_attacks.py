"""The attacks inside the model: planted changes are found, benign ones are not, and the model is as it was."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch

from lab import ModelHandle
from lab.arch import Role
from lab.audit.base import AttackResult, AuditSubject, Controls
from lab.audit.concept_vectors import concept_tokens
from lab.audit.depth import DepthCurve
from lab.audit.detection import noise_like
from lab.audit.fingerprints import Spectral, Trace
from lab.audit.inside import ConceptTrace, HiddenKnowledgeAttack, PatchingDepth, returned
from lab.audit.originals import Original, change_of, original_of
from lab.audit.spectra import subject_keys
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import Fact
from tests.tiny import tiny_handle

ALL = (Spectral, Trace, HiddenKnowledgeAttack, ConceptTrace, PatchingDepth)
OBJECTS = ("Paris", "Tokyo", "Rome")


def facts(stem: str, count: int) -> tuple[Fact, ...]:
    return tuple(
        Fact(f"{stem}{number}", "capital", OBJECTS[number % 3], "The capital of {} is", id=f"{stem}{number}")
        for number in range(count)
    )


FORGET, NEVER, KEPT = facts("Kenya", 4), facts("Obama", 4), facts("Japan", 12)


def edit_of(handle: ModelHandle, fact: Fact, layer: int = 1, strength: float = 4.0) -> WeightPatch:
    """A rank-one edit as ROME makes it without statistics: the subject's key gets a value of its own."""
    key = subject_keys(handle, [fact], layer)[0].float()
    value = torch.randn(handle.hidden_size, generator=torch.Generator().manual_seed(3)) * strength
    delta = LowRank(value[:, None], (key / key.norm() ** 2)[None])
    return WeightPatch(
        handle.fingerprint, {handle.weight(Role.MLP_OUT, layer).name: delta}, Provenance("edit")
    )


def subject_of(
    handle: ModelHandle, base: ModelHandle | None = None, oracle: ModelHandle | None = None
) -> AuditSubject:
    return AuditSubject(handle, FORGET, Controls(oracle, NEVER), retained=KEPT, base=base)


def original_for(subject: AuditSubject) -> Original:
    found = original_of(subject)
    assert found is not None
    return found


def run(attack: type, subject: AuditSubject) -> AttackResult:
    before = [
        (each, each.weights_digest())
        for each in (subject.handle, subject.base, subject.controls.oracle)
        if each
    ]
    steps: list[tuple[int, int]] = []
    result = attack().run(subject, lambda name, done, total: steps.append((done, total)))
    for each, digest in before:
        assert each.weights_digest() == digest
    assert all(0 <= done <= total for done, total in steps)
    row = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert AttackResult.from_json(row).to_json() == row
    assert result.name == attack.name
    return result


@pytest.mark.parametrize("attack", ALL)
def test_equal_runs_give_equal_results_and_leave_no_trace(attack: type) -> None:
    handle, oracle = tiny_handle("llama", seed=1), tiny_handle("llama", seed=2)
    pristine = handle.weights_digest()
    applied = edit_of(handle, FORGET[0]).apply(handle)
    first = run(attack, subject_of(handle, oracle=oracle))
    assert first.applicable
    assert len(first.per_fact) == len(FORGET)
    assert first.to_json() == run(attack, subject_of(handle, oracle=oracle)).to_json()
    applied.undo()
    assert handle.weights_digest() == pristine


@pytest.mark.parametrize("mode", ["merge", "sidecar"])
def test_the_change_is_read_from_the_weights(mode: Literal["merge", "sidecar"]) -> None:
    handle = tiny_handle("gpt2")
    patch = edit_of(handle, FORGET[0])
    [(name, delta)] = patch.deltas.items()
    with patch.applied(handle, mode):
        change = change_of(handle, original_for(subject_of(handle)))
    assert set(change.deltas) == {name}
    assert torch.allclose(change.deltas[name].dense(), delta.dense(), atol=1e-6)


def test_a_second_handle_as_base_gives_the_same_change() -> None:
    handle, base = tiny_handle("llama"), tiny_handle("llama")
    assert original_of(subject_of(handle)) is None
    with edit_of(handle, FORGET[0]).applied(handle):
        beside = change_of(handle, original_for(subject_of(handle, base=base)))
        aside = change_of(handle, original_for(subject_of(handle)))
    assert beside.id == aside.id


def test_spectral_finds_the_edit_and_not_noise_of_equal_norm() -> None:
    handle = tiny_handle("llama", seed=1)
    edit = edit_of(handle, FORGET[0])
    with edit.applied(handle):
        found = run(Spectral, subject_of(handle))
    with noise_like(edit, seed=1).applied(handle):
        null = run(Spectral, subject_of(handle))
    assert found.details["concentration"] > 0.99
    assert null.details["concentration"] < 0.1
    # The edited subject answers fully, the others only as far as their keys resemble its key.
    assert found.per_fact[0] == pytest.approx(1.0, abs=1e-4)
    assert max(null.per_fact) < 0.1
    assert found.details["read"][0]["layer"] == 1


def test_spectral_without_a_base_looks_for_the_layer_that_stands_out() -> None:
    handle = tiny_handle("llama", seed=1, layers=6)
    clean = run(Spectral, subject_of(handle))
    assert clean.leak == 0.0
    with edit_of(handle, FORGET[0], layer=3, strength=30.0).applied(handle):
        weights = handle.model.state_dict()
        edited = tiny_handle("llama", seed=1, layers=6)
        edited.model.load_state_dict({name: value.clone() for name, value in weights.items()})
    found = run(Spectral, subject_of(edited))
    assert [row["layer"] for row in found.details["read"]] == [3]
    assert found.per_fact[0] > 0.9


def test_trace_finds_a_strong_change_and_none_where_there_is_none() -> None:
    handle, base = tiny_handle("llama", seed=1), tiny_handle("llama", seed=1)
    assert not run(Trace, subject_of(handle, base=base)).applicable
    assert not run(Trace, subject_of(handle)).applicable
    with edit_of(handle, FORGET[0], layer=2, strength=40.0).applied(handle):
        aside, beside = run(Trace, subject_of(handle)), run(Trace, subject_of(handle, base=base))
    assert aside.leak > 0.8
    assert set(aside.details["benign"]) == {"noise", "fine-tune"}
    assert "benign" in aside.controls
    assert "oracle" not in aside.controls
    # The patched handle set aside and a second handle are the same original, up to rounding.
    assert aside.leak == pytest.approx(beside.leak, abs=0.15)


def planted_concepts() -> ModelHandle:
    """A tiny model with one value vector for each object."""
    handle = tiny_handle("llama", seed=1)
    table = handle.weight(Role.UNEMBED).canonical()
    for column, fact in enumerate(FORGET[:3]):
        vector = table[concept_tokens(handle, fact)].mean(0)
        handle.weight(Role.MLP_OUT, 1).canonical()[:, column] = vector
    return handle


def test_concept_trace_tells_untouched_vectors_from_removed_ones() -> None:
    handle, oracle = planted_concepts(), tiny_handle("llama", seed=2)
    with edit_of(handle, FORGET[0]).scaled(0.0).applied(handle):
        kept = run(ConceptTrace, subject_of(handle, oracle=oracle))
    assert kept.details["coverage"] == 1.0
    assert kept.leak == pytest.approx(1.0, abs=1e-6)
    assert kept.controls["oracle"].mean < 0.5
    assert "never" not in kept.controls
    removed = run(ConceptTrace, subject_of(tiny_handle("llama", seed=1), planted_concepts(), oracle))
    assert removed.leak < 0.7
    assert not run(ConceptTrace, subject_of(handle)).applicable


def test_patching_depth_scores() -> None:
    donor, receiver = torch.tensor([0.0, -0.5]), torch.tensor([-4.0, -0.5])
    curve = DepthCurve(receiver, donor, torch.tensor([[-4.0, -2.0, 0.0], [-0.5, -0.5, -0.5]]))
    # The first came back by half at the second layer of two that count; the second was never lost.
    assert returned(curve) == pytest.approx([0.25, float(torch.tensor(-0.5).exp())])


def test_patching_depth_reports_uds_with_an_oracle() -> None:
    handle, oracle = tiny_handle("llama", seed=1), tiny_handle("llama", seed=2)
    with edit_of(handle, FORGET[0], strength=30.0).applied(handle):
        found = run(PatchingDepth, subject_of(handle, oracle=oracle))
    assert set(found.details) == {"audited", "oracle", "uds"}
    assert len(found.details["uds"]["per_fact"]) == len(FORGET)
    assert not run(PatchingDepth, subject_of(handle)).applicable


def test_hidden_knowledge_says_why_it_does_not_apply() -> None:
    handle = tiny_handle("llama")
    lone = Fact("Ada", "job", "Rome", "{} works as", id="ada")
    found = run(HiddenKnowledgeAttack, AuditSubject(handle, (lone,)))
    assert not found.applicable
    assert "no fact has a wrong answer" in found.note


def test_answers_that_a_model_was_trained_to_rank_last_are_read(monkeypatch) -> None:
    """A probe that learned on kept facts sees ignorance there; one that learned on other audited facts sees the answers."""
    gone, kept, never = facts("Gone", 24), facts("Kept", 24), facts("Lost", 24)
    noise = torch.Generator().manual_seed(0)

    def states(handle: ModelHandle, questions, layers, *, batch_size: int = 64):
        values, scores = [], []
        for question in questions:
            sign = {"Gone": -1.0, "Kept": 1.0}.get(question.fact.subject[:4], 0.0)
            rows = 0.1 * torch.randn(len(question.answers), len(layers), 4, generator=noise)
            rows[0, :, 0] += sign
            values.append(rows)
            scores.append([sign, *[0.0] * len(question.wrong)])
        return scores, values

    monkeypatch.setattr("lab.audit.knowledge.answer_states", states)
    handle = tiny_handle("llama")
    found = HiddenKnowledgeAttack().run(
        AuditSubject(handle, gone, Controls(None, never), retained=kept), lambda *_: None
    )
    assert found.details["worst"] == "audited"
    probes = {name: each["facts"] for name, each in found.details["probes"].items()}
    assert probes["kept"]["external"]["mean"] == 0.0
    assert probes["kept"]["internal"]["mean"] < 0.1
    assert probes["audited"]["internal"]["mean"] > 0.9
    assert probes["audited"]["quadrants"]["suppressed"]["mean"] > 0.9
    assert found.lift.low > 0
    alone = HiddenKnowledgeAttack().run(AuditSubject(handle, gone, Controls(None, NEVER)), lambda *_: None)
    assert set(alone.details["probes"]) == {"audited"}
