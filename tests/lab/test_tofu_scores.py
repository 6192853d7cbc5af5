"""TOFU's figures on a tiny model, against the scores and texts that they are made of."""

from __future__ import annotations

import dataclasses
import math

import pytest

from lab.data.asked import Asked
from lab.errors import ConfigError
from lab.eval.tofu import SETS, tofu_scores, tofu_summary
from lab.eval.unlearning_metrics import forget_quality, rouge_l
from lab.scoring import score_targets
from tests.tiny import tiny_handle

ITEMS = [
    Asked(
        "a",
        "qa",
        "Where is France?",
        ("Paris",),
        paraphrased_answer="In Paris",
        wrong=("Rome", "Tokyo"),
        line=1,
    ),
    Asked("b", "qa", "Who is Marie?", ("Curie",), wrong=("Obama", "Edwin"), line=2),
]


@pytest.fixture(scope="module")
def scores():
    handle = tiny_handle("llama")
    return handle, tofu_scores(handle, dict.fromkeys(SETS, ITEMS), max_new_tokens=6)


def test_figures_of_a_set(scores):
    handle, found = scores
    prompt = "Question: Where is France?\nAnswer:"
    answer, paraphrase, rome, tokyo = score_targets(
        handle, [(prompt, text) for text in ("Paris", "In Paris", "Rome", "Tokyo")]
    )
    forget = found["forget"]
    assert forget.probability[0] == pytest.approx(answer.probability, rel=1e-4)
    ratio = math.exp((rome.mean_logprob + tokyo.mean_logprob) / 2 - paraphrase.mean_logprob)
    assert forget.truth_ratio[0] == pytest.approx(ratio, rel=1e-3)
    total = answer.probability + rome.probability + tokyo.probability
    assert found["world_facts"].probability[0] == pytest.approx(answer.probability / total, rel=1e-3)
    (said,) = handle.generate([prompt], max_new_tokens=6, stop=("\n",))
    assert forget.rouge_l_recall[0] == rouge_l("Paris", said).recall
    assert forget.exact_memorization[0] == answer.accuracy


def test_summary(scores):
    _, found = scores
    summary = tofu_summary(found, found)
    assert summary["forget_quality"] == 1.0 and summary["forget_quality_statistic"] == 0.0
    # A random model says none of the answers: a recall of 0 makes the harmonic mean 0.
    assert summary["model_utility"] == 0.0
    assert set(summary["sets"]) == set(SETS)
    other = dict(found, forget=dataclasses.replace(found["forget"], truth_ratio=(50.0, 60.0)))
    expected = forget_quality(found["forget"].truth_ratio, (50.0, 60.0))
    assert tofu_summary(found, other)["forget_quality"] == expected.p
    assert tofu_summary({"forget": found["forget"]})["model_utility"] is None


def test_mistakes(scores):
    handle, _ = scores
    with pytest.raises(ConfigError, match="forgot"):
        tofu_scores(handle, {"forgot": ITEMS})
    with pytest.raises(ConfigError, match="perturbed files"):
        tofu_scores(handle, {"forget": [dataclasses.replace(ITEMS[0], wrong=())]})
