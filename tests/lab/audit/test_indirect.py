"""The indirect unlearning attack: contributions, chosen requests, and a model that is as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lab import ModelHandle
from lab.arch import Role
from lab.audit import indirect
from lab.audit.base import AuditSubject
from lab.audit.forward import id_lines, text_ids, written_logprobs
from lab.audit.indirect import Indirect, allowed, contributions
from lab.records import Fact
from lab.trace import Site
from tests.standin import CAPITALS
from tests.tiny import tiny_handle

FACTS = tuple(
    Fact(place, "capital", city, "The capital of {} is", id=place) for place, city in CAPITALS.items()
)


def quiet(phase: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_contributions_add_up_to_what_more_of_every_neuron_does() -> None:
    handle = tiny_handle("llama", layers=1, seed=2)
    lines = id_lines(handle, text_ids(handle, [(fact.text, fact.object) for fact in FACTS[:3]]))
    found = contributions(handle, lines)
    assert found.shape == (3, handle.weight(Role.MLP_OUT, 0).shape[1])
    site, step = Site(Role.MLP_OUT, 0, "in"), 1e-2
    up = written_logprobs(handle, lines, {site: lambda value: value * (1 + step)})
    down = written_logprobs(handle, lines, {site: lambda value: value * (1 - step)})
    assert found.sum(-1).tolist() == pytest.approx(((up - down) / (2 * step)).tolist(), rel=2e-2, abs=1e-4)


def test_nobody_asks_for_the_victim_or_its_answer() -> None:
    victim = FACTS[0]
    assert not allowed(replace(victim, relation="tongue"), victim)
    assert not allowed(replace(FACTS[1], object=victim.object), victim)
    assert allowed(FACTS[1], victim)


def test_requests_like_the_victim_are_chosen_and_the_model_comes_back(standin, monkeypatch) -> None:
    handle = ModelHandle.load("atlas")
    asked: list[tuple[str, ...]] = []
    plain = indirect._after_removal

    def watching(subject, handle, requests, victim):
        asked.append((victim.subject, *(fact.subject for fact in requests)))
        assert all(allowed(fact, victim) for fact in requests)
        return plain(subject, handle, requests, victim)

    monkeypatch.setattr(indirect, "_after_removal", watching)
    digest = handle.weights_digest()
    subject = AuditSubject(handle, FACTS[:1], retained=FACTS)
    found = Indirect().run(subject, quiet)
    assert handle.weights_digest() == digest
    assert found.applicable
    assert set(found.controls) == {"random requests"}
    assert len(found.per_fact) * 2 == len(asked)
    assert all(len(set(names)) == 5 for names in asked)
    assert found.leak > 0.1  # facts of one form on a tiny model do fall together
    lines = id_lines(handle, text_ids(handle, [(f.text, f.object) for f in FACTS]))
    near = torch.nn.functional.normalize(contributions(handle, lines), dim=-1)
    place = {fact.subject: index for index, fact in enumerate(FACTS)}
    for victim, *requests in asked[::2]:
        others = [name for name in place if name not in (victim, *requests)]
        like = [float(near[place[name]] @ near[place[victim]]) for name in (*requests, *others)]
        assert min(like[:4]) >= max(like[4:], default=-1.0)
    assert Indirect().run(subject, quiet).to_json() == found.to_json()


def test_without_facts_that_stay_there_is_no_victim() -> None:
    found = Indirect().run(AuditSubject(tiny_handle("llama", layers=2), FACTS[:1]), quiet)
    assert not found.applicable
    assert found.note
