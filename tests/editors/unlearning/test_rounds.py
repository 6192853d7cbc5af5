"""Methods whose updates are more than a loss of answers: what is particular to each."""

from __future__ import annotations

import functools

import pytest

from editors.unlearning import get_unlearner
from editors.unlearning.stones import stepping_stones
from lab.errors import ConfigError, RequestError
from lab.handle import ModelHandle
from lab.records import Fact
from lab.scoring import score_targets
from tests.editors.unlearning.test_gradient import FORGET, RETAIN, logprob
from tests.tiny import tiny_handle

NEVER = {"stop_above": None, "stop_retain": None}
QUICK = {"lr": 5e-3, **NEVER}


@functools.cache
def handle_of(family="llama"):
    return tiny_handle(family, layers=2, scale=1.5)


def notes(name, retain=RETAIN, **settings):
    made = get_unlearner(name, **{**QUICK, **settings}).unlearn(handle_of(), FORGET, retain)
    return made.provenance.extra


def test_pdu_moves_its_retain_weight_by_what_retained_facts_exceed():
    found = notes("pdu", epochs=4, warmup_epochs=2, retain_weight=3.0, dual_rate=0.5, tolerance=2.0)
    seen = [step["retain"] for step in found["history"]]
    assert len(seen) == 4
    first = 3.0 + 0.5 * (seen[1] - 2.0)
    assert found["retain_weights"] == pytest.approx([3.0, 3.0, first, first + 0.5 * (seen[2] - 2.0)])
    slack = notes("pdu", epochs=3, warmup_epochs=0, retain_weight=3.0, dual_rate=9.0, tolerance=99.0)
    assert slack["retain_weights"] == [3.0, 0.0, 0.0]


def test_icu_leaves_out_what_is_no_longer_said(monkeypatch):
    def says(self, prompts, **options):
        return ["it is Paris." if "France" in prompt else "nobody" for prompt in prompts]

    monkeypatch.setattr(ModelHandle, "generate", says)
    found = notes("icu", epochs=3, batch_size=1)
    assert found["facts_per_pass"] == [2, 1, 1]
    assert found["updates"] == 4
    kept = get_unlearner("icu", epochs=2, forgotten_below=0.0, **NEVER)
    assert kept.unlearn(handle_of(), FORGET, RETAIN).provenance.extra["facts_per_pass"] == [2, 2]
    with pytest.raises(RequestError, match="give some"):
        kept.unlearn(handle_of(), FORGET)


def test_icu_keeps_the_nearest_fact_beside_each():
    far = Fact("Toko Yasuda", "instrument", "guitar", "{} plays the")
    near = Fact("Japan", "capital", "Tokyo", "The capital of {} is")
    settings = {"epochs": 1, "forgotten_below": 0.0, **NEVER}
    both = get_unlearner("icu", **settings).unlearn(handle_of(), FORGET[:1], [far, near])
    alone = get_unlearner("icu", **settings).unlearn(handle_of(), FORGET[:1], [near])
    assert both.provenance.extra["history"] == alone.provenance.extra["history"]


def test_lfu_without_its_term_is_refusal_tuning_and_the_term_is_positive():
    options = {"lr": 5e-3, "epochs": 2, "stop_retain": None}
    refusal = get_unlearner("refusal", **options).unlearn(handle_of(), FORGET, RETAIN)
    bare = get_unlearner("lfu", consistency_weight=0.0, **options).unlearn(handle_of(), FORGET, RETAIN)
    held = get_unlearner("lfu", consistency_weight=5.0, **options).unlearn(handle_of(), FORGET, RETAIN)
    history = [each.provenance.extra["history"][0]["forget"] for each in (refusal, bare, held)]
    assert history[1] == pytest.approx(history[0], abs=1e-5)
    assert history[2] > history[0] + 1e-4


def test_bidirectional_takes_its_teacher_from_the_prompt_with_the_instruction():
    found = notes("bidirectional", epochs=1, instruction="{subject}, {subject}!", retain_weight=0.0)
    assert found["history"][0]["forget"] > 0.01
    # An empty instruction and prompt form leave the untouched model as its own teacher.
    same = notes("bidirectional", epochs=1, form=" {}", instruction="", retain_weight=0.0)
    assert same["history"][0]["forget"] < found["history"][0]["forget"]
    pulled = notes("bidirectional", epochs=1, retain_weight=1.0)
    assert pulled["history"][0]["retain"] == pytest.approx(0.0, abs=1e-6)


def test_altpo_draws_other_answers_and_needs_some():
    with pytest.raises(RequestError, match="no other fact"):
        get_unlearner("altpo").unlearn(handle_of(), FORGET[:1])
    one = notes("altpo", epochs=1, alternatives=("Rome",))
    other = notes("altpo", epochs=2, alternatives=("Tokyo",))
    assert one["history"][0] == other["history"][0]
    assert other["history"][1]["forget"] < other["history"][0]["forget"]


def test_wpn_holds_what_is_about_to_be_said_away_from_answers():
    found = notes("wpn", epochs=4, refusal_weight=0.0, retain_weight=0.0)["history"]
    assert found[-1]["forget"] < found[0]["forget"] - 0.1
    with pytest.raises(ConfigError, match="tau"):
        get_unlearner("wpn", tau=0.0)


def test_stepping_stones_lead_up_to_surprising_texts_only():
    handle = handle_of()
    pairs = [(FORGET[0].text, "Rome"), (FORGET[1].text, "Paris")]
    clauses = [["of the city", "and the piano"], ["not English"]]
    assert stepping_stones(handle, pairs, clauses, below=1e-30) == pairs
    written = stepping_stones(handle, pairs, clauses, below=1.0)

    def first(prompt, text):
        return score_targets(handle, [(prompt, text)])[0].token_logprobs[0]

    for (prompt, text), (same, new), offered in zip(pairs, written, clauses, strict=True):
        assert same == prompt
        best = max(offered, key=lambda clause: first(f"{prompt} {clause}", text))
        better = first(f"{prompt} {best}", text) > first(prompt, text)
        assert new == (f"{best} {text}" if better else text)
    assert written != pairs


def test_catnip_reads_nothing_but_the_facts_to_forget():
    told = []
    unlearner = get_unlearner("catnip", lr=5e-3, epochs=3, stop_above=None)
    alone = unlearner.unlearn(handle_of(), FORGET, progress=lambda *each: told.append(each[0]))
    assert set(told) == {"steps"}
    assert alone.id == unlearner.unlearn(handle_of(), FORGET, RETAIN).id
    before = logprob(handle_of())
    with alone.applied(handle_of()):
        assert logprob(handle_of()) < before - 0.1
