"""General ability: the three questions of lm-eval against plain computations, and its own runner where it is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch

from editors.bench import BenchOptions
from editors.bench_ability import ability_lines, ability_row
from lab.arch import Role
from lab.errors import ConfigError, MissingDependencyError, UnknownNameError
from lab.eval import lm_eval as ability
from lab.eval.stats import Estimate
from lab.patch import Dense, Provenance, WeightPatch
from lab.scoring import score_targets
from lab.tokens import encode_ids
from tests.commands import call
from tests.tiny import tiny_handle

HAS_LM_EVAL = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HAS_LM_EVAL, reason="lm_eval is not installed (extra `bench`)")


def plain(handle, ids, start):
    """Log-probabilities of ``ids[start:]`` from one unpadded forward pass, and whether all are greedy."""
    logits = handle.model(input_ids=torch.tensor([ids[:-1]])).logits[0].detach().log_softmax(-1)
    places = range(start - 1, len(ids) - 1)
    return (
        sum(float(logits[place, ids[place + 1]]) for place in places),
        all(int(logits[place].argmax()) == ids[place + 1] for place in places),
    )


def test_a_continuation_is_scored_like_a_target():
    handle = tiny_handle("llama", scale=2.0)
    pairs = [("The capital of France is", " Rome"), ("Marie Curie worked in", " the city of Rome")]
    found = ability.log_likelihoods(handle, pairs)
    wanted = score_targets(handle, [(prompt, target.strip()) for prompt, target in pairs])
    for (value, greedy), score in zip(found, wanted, strict=True):
        assert value == pytest.approx(score.sum_logprob, abs=1e-5)
        assert greedy == score.all_correct
    # A space at the end of the context belongs to the continuation.
    (moved,) = ability.log_likelihoods(handle, [("The capital of France is ", "Rome")])
    assert moved[0] == pytest.approx(found[0][0], abs=1e-5)
    text = handle.generate([pairs[0][0]], max_new_tokens=1)[0]
    assert ability.log_likelihoods(handle, [(pairs[0][0], text)])[0][1], "the greedy continuation is greedy"


def test_without_a_context_a_start_token_stands_before():
    handle = tiny_handle("llama", scale=2.0)
    start = handle.tokenizer.eos_token_id
    ids = [start, *encode_ids(handle.tokenizer, "The guitar", special=False)]
    wanted, greedy = plain(handle, ids, 1)
    ((found, same),) = ability.log_likelihoods(handle, [("", "The guitar")])
    assert (found, same) == (pytest.approx(wanted, abs=1e-5), greedy)
    assert ability.text_log_likelihoods(handle, ["The guitar", ""]) == [pytest.approx(wanted, abs=1e-5), 0.0]


def test_what_is_too_long_loses_its_beginning():
    handle = tiny_handle("llama", scale=2.0)
    handle.config.max_position_embeddings = 8
    long = "The capital of Japan is Tokyo. The capital of Kenya is"
    ids = encode_ids(handle.tokenizer, long + " Rome")
    size = len(ids) - len(encode_ids(handle.tokenizer, long))
    wanted, _ = plain(handle, ids[-9:], 9 - size)
    ((found, _),) = ability.log_likelihoods(handle, [(long, " Rome")])
    assert found == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ConfigError, match="fit"):
        ability.log_likelihoods(handle, [("The", " capital of Japan is Tokyo, not the capital of Kenya")])
    with pytest.raises(ConfigError, match="at least one"):
        ability.log_likelihoods(handle, [("The", "")])
    whole = [handle.tokenizer.eos_token_id, *encode_ids(handle.tokenizer, long, special=False)]
    assert len(whole) > 10
    # Every token once: the first eight after the start, then the rest with all that fits before them.
    total, done = plain(handle, whole[:9], 1)[0], 9
    while done < len(whole):
        end = min(done + 8, len(whole))
        piece = whole[max(0, end - 9) : end]
        total += plain(handle, piece, len(piece) - (end - done))[0]
        done = end
    assert ability.text_log_likelihoods(handle, [long])[0] == pytest.approx(total, abs=1e-4)


def test_continuations_are_the_handles_own():
    handle = tiny_handle("gpt2", scale=2.0)
    plain_text = handle.generate(["The capital of"], max_new_tokens=6)[0]
    stop = plain_text[2:4]
    found = ability.continuations(
        handle,
        [
            ("The capital of", {"until": [], "max_gen_toks": 6}),
            ("Tokyo", {"until": "x", "max_gen_toks": 3}),
            ("The capital of", {"until": [stop], "max_gen_toks": 6, "do_sample": False, "temperature": 3.0}),
        ],
    )
    assert found[0] == plain_text
    assert found[1] == handle.generate(["Tokyo"], max_new_tokens=3, stop=["x"])[0]
    assert found[2] == plain_text[: plain_text.index(stop)]
    with pytest.raises(ConfigError, match="no room"):
        ability.continuations(handle, [("Tokyo", {"max_gen_toks": 10_000})])


def test_ability_under_patches_alone_and_together(monkeypatch):
    handle = tiny_handle("llama")
    weight = handle.weight(Role.MLP_OUT, 1)

    def patch(size):
        delta = Dense(torch.full(weight.shape, float(size)))
        return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("test"))

    base = float(weight.canonical().sum())

    def fake(handle, tasks, **options):
        value = round((float(weight.canonical().sum()) - base) / weight.canonical().numel(), 3)
        return {tasks[0]: {"acc": Estimate(value, value - 1, value + 1, 5)}}

    monkeypatch.setattr(ability, "general_ability", fake)
    kept = [((), patch(1)), ((), patch(2))]
    cache: dict = {}
    alone = ability_row(handle, kept, BenchOptions(general_ability=("t",)), cache)
    assert cache["t"]["acc"].mean == 0
    pair = alone["tasks"]["t"]["acc"]
    assert (alone["edits"], pair["before"]["mean"], pair["after"]["mean"]) == (
        2,
        0,
        pytest.approx(1.5, abs=1e-2),
    )
    together = ability_row(handle, kept, BenchOptions(general_ability=("t",), protocol="sequential"), cache)
    assert together["tasks"]["t"]["acc"]["after"]["mean"] == pytest.approx(3, abs=1e-2)
    assert handle.applied == ()
    lines = ability_lines([{"editor": "e", "suite": "s", "model": "m", "general_ability": together}, {}])
    assert lines == [["e", "s", "m", "t", "acc", 0, pytest.approx(3, abs=1e-2)]]


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm_eval is installed here: nothing is missing")
def test_without_the_library_the_message_names_the_extra(capsys, tmp_path):
    with pytest.raises(MissingDependencyError, match="bench"):
        ability.general_ability(tiny_handle(), ["hellaswag"])
    code, _, err = call(
        capsys, "bench", "editing", "--general-ability", "hellaswag", "--out", tmp_path / "out"
    )
    assert code != 0 and "lm_eval" in err


def local_task(folder):
    """A multiple-choice task and a generation task over a file."""
    rows = [
        {"question": "The capital of France is", "choices": ["Paris", "Tokyo"], "answer": 0},
        {"question": "The capital of Japan is", "choices": ["Paris", "Tokyo"], "answer": 1},
        {"question": "The capital of Kenya is", "choices": ["Nairobi", "Rome"], "answer": 0},
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (folder / "capitals.yaml").write_text(
        "task: local_capitals\noutput_type: multiple_choice\n"
        + source
        + 'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        + "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (folder / "say.yaml").write_text(
        "task: local_say\noutput_type: generate_until\n"
        + source
        + 'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\n'
        + "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 4\n"
        + "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return rows


@needs_lm_eval
def test_lm_eval_runs_tasks_from_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = local_task(tmp_path)
    handle = tiny_handle("llama", scale=2.0)
    before = torch.random.get_rng_state()
    found = ability.general_ability(handle, ["local_capitals", "local_say"], task_path=tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    right = []
    for row in rows:
        scores = score_targets(handle, [(row["question"], choice) for choice in row["choices"]])
        best = max(range(2), key=lambda index: scores[index].sum_logprob)
        right.append(best == row["answer"])
    figure = found["local_capitals"]["acc"]
    assert (figure.mean, figure.n) == (pytest.approx(sum(right) / 3), 3)
    assert found["local_say"]["exact_match"].mean == 0
    with pytest.raises(UnknownNameError, match="local_capitals"):
        ability.general_ability(handle, ["local_capital"], task_path=tmp_path)
