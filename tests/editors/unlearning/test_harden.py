"""Hardening: what an audit found goes back into training, and what was fed is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from editors.unlearning import get_unlearner
from editors.unlearning.harden import Direction, Leaks, hardened, leaking_texts, leaks_of
from lab.arch import Role
from lab.audit.base import AttackResult, AuditSubject, Interval
from lab.audit.forward import id_lines, text_ids, written_logprobs
from lab.audit.latent import added, learn_direction
from lab.audit.report import AuditReport
from lab.errors import ConfigError
from lab.records import write_facts
from lab.scoring import score_targets
from lab.trace import Site
from tests.commands import call, result
from tests.editors.unlearning.test_cli_unlearn import FACTS as CAPITALS
from tests.editors.unlearning.test_gradient import FORGET, RETAIN
from tests.tiny import tiny_handle

NEVER = {"stop_above": None}
SURE, UNSURE = Interval(0.5, 0.3, 0.7), Interval(0.1, -0.1, 0.3)


def attack(name, family="prompt", lift=SURE, **details):
    return AttackResult(name, 0.5, (0.5,), lift, family=family, details=details)


def variants(**lifts):
    return {name: {"lift": lift.to_json()} for name, lift in lifts.items()}


def test_only_sure_leaks_are_fed_and_the_rest_is_named():
    report = AuditReport(
        "x",
        (
            attack("forms", variants=variants(twice=SURE, bedtime=UNSURE)),
            attack(
                "suffix",
                variants=variants(found_here=SURE, carried_over=UNSURE),
                suffixes={
                    "found_here/facts": ["!!", "!!", ""],
                    "carried_over/facts": ["?"],
                    "found_here/oracle": ["#"],
                },
            ),
            attack("latent", "latent", directions=[{"layer": 1, "vector": [1.0, 2.0]}]),
            attack("quantize", "weights"),
            attack("prune", "weights", UNSURE),
            attack("trace", "statistics"),
        ),
        {"model": "atlas", "facts from": "atlas:people05"},
    )
    found = leaks_of(report, model="atlas", facts="atlas:people05")
    assert found == Leaks(("twice",), ("!!",), (Direction(1, (1.0, 2.0)),), ("quantize",))
    assert leaks_of(AuditReport.from_json(json.loads(json.dumps(report.to_json())))) == found
    with pytest.raises(ConfigError, match="people05"):
        leaks_of(report, facts="atlas:people01")
    with pytest.raises(ConfigError, match="quantize"):
        leaks_of(replace(report, results=report.results[3:]))


def test_texts_hold_the_form_and_the_suffix_and_those_not_said_are_left_out():
    handle = tiny_handle("llama", layers=2)
    subject = AuditSubject(handle, tuple(FORGET))
    texts, asked = leaking_texts(handle, subject, Leaks(("twice", "subtoken"), (" zz",)), least=0.0)
    assert len(texts) == asked == 2 * len(FORGET)
    assert all(text.text.count(fact.subject) == 2 for text, fact in zip(texts, FORGET, strict=False))
    assert [text.text for text in texts[len(FORGET) :]] == [f"{fact.text} zz" for fact in FORGET]
    assert leaking_texts(handle, subject, Leaks(("twice",)), least=1.1) == ([], len(FORGET))


def test_forgetting_holds_along_a_found_direction_better_than_without_it():
    handle = tiny_handle("llama", layers=2, scale=1.5)
    digest = handle.weights_digest()
    lines = id_lines(handle, text_ids(handle, [(fact.text, fact.object) for fact in FORGET]))
    vector = learn_direction(handle, lines, 0, 1.0, 6)
    leaks = Leaks(directions=(Direction(0, tuple(vector.tolist())),), others=("prune",))
    unlearner = get_unlearner("ga", lr=2e-3, epochs=4, **NEVER)
    plain = unlearner.unlearn(handle, FORGET, RETAIN)
    hard = hardened(unlearner, handle, FORGET, leaks, RETAIN)
    assert handle.weights_digest() == digest

    def leak(patch):
        with patch.applied(handle), torch.no_grad():
            return float(written_logprobs(handle, lines, {Site(Role.BLOCK, 0): added(lines, vector)}).mean())

    assert leak(hard) < leak(plain)
    told = hard.provenance.extra["hardened"]
    assert told["directions"] == 1 and told["layers"] == [0] and told["not_fed"] == ["prune"]
    assert len(hard.provenance.requests) == len(FORGET)
    again = hardened(unlearner, handle, FORGET, leaks, RETAIN)
    assert all(torch.equal(again.deltas[name].dense(), delta.dense()) for name, delta in hard.deltas.items())


def test_what_cannot_be_hardened_is_refused_or_named():
    handle = tiny_handle("llama", layers=2)
    wide = Leaks(directions=(Direction(0, (1.0,)),))
    with pytest.raises(ConfigError, match="another model"):
        hardened(get_unlearner("ga"), handle, FORGET, wide)
    with pytest.raises(ConfigError, match="train"):
        hardened(get_unlearner("in_context"), handle, FORGET, wide)
    fits = Leaks(directions=(Direction(0, (0.1,) * handle.hidden_size),))
    with pytest.raises(ConfigError, match="leaks from this model any more"):
        hardened(get_unlearner("adv_ga"), handle, FORGET, fits)


def test_the_command_feeds_a_leaking_form_back(capsys, tmp_path, standin):
    paths = [tmp_path / f"{name}.jsonl" for name in ("forget", "retain")]
    for path, facts in zip(paths, (CAPITALS[:2], CAPITALS[2:]), strict=True):
        write_facts(path, facts)
    report = AuditReport(
        "x",
        (attack("forms", variants=variants(encyclopedia=SURE)),),
        {"model": "atlas", "facts from": str(paths[0])},
    )
    audit = tmp_path / "audit.json"
    audit.write_text(json.dumps(report.to_json()), encoding="utf-8")
    words = ["--forget", paths[0], "--retain", paths[1], "--set", "lr=1e-3", "--set", "epochs=8"]
    out = tmp_path / "hard"
    found = result(capsys, tmp_path, "unlearn", *words, "--harden", audit, "--out", out)
    assert found["harden"]["forms"] == ["encyclopedia"]
    assert found["harden"]["texts_asked"] == 2
    assert found["undo"]["bit_identical"] is True
    code, _, err = call(capsys, "unlearn", "--forget", paths[1], "--harden", audit)
    assert code == 2 and "hardened" in err


def test_a_fact_in_another_form_is_less_likely_after_hardening(standin):
    from lab.handle import ModelHandle

    handle = ModelHandle.load("atlas")
    facts = CAPITALS[:2]
    form = [(f"From the encyclopedia: {fact.text}", fact.object) for fact in facts]
    unlearner = get_unlearner("ga", lr=1e-3, epochs=8, **NEVER)
    hard = hardened(unlearner, handle, facts, Leaks(("encyclopedia",)), CAPITALS[4:])
    before = score_targets(handle, form)
    with hard.applied(handle):
        after = score_targets(handle, form)
    assert all(new.sum_logprob < old.sum_logprob - 0.5 for new, old in zip(after, before, strict=True))
