"""Rows with patches of their own: equal to applying each patch, in scores and in texts, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lab.arch import Role
from lab.decoding import Start, continue_rows
from lab.errors import BaseMismatchError, ConfigError, PatchError
from lab.eval import ModelRespondent, Probe
from lab.handle import ModelHandle
from lab.patch import Dense, LowRank, Provenance, WeightPatch
from lab.rowwise import NOBODY, RowPatches, rowwise_obstacle
from lab.shared_prefix import Line, line_logits
from lab.tokens import encode_ids, pad_rows
from tests.tiny import FAMILIES, tiny_handle

SAMPLES = Path(__file__).resolve().parents[2] / "datasets"
# Eager attention of these families is computed in fp32, whatever the model.
ROUGH = ("gptj", "gemma2")
TEXTS = [
    "The capital of France is",
    "Who",
    "Marie Curie worked in the city",
    "The book",
    "Barack Obama's wife is",
]


def patches_for(handle: ModelHandle, ranks: Sequence[int] = (1, 3, 2), layers: Sequence[int] = (0, 2)):
    made = []
    for number, rank in enumerate(ranks):
        generator = torch.Generator().manual_seed(number)
        deltas = {}
        for layer in layers:
            weight = handle.weight(Role.MLP_OUT, layer)
            left = torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
            right = torch.randn(rank, weight.shape[1], generator=generator, dtype=torch.float64) / 8
            deltas[weight.name] = LowRank(left.to(handle.dtype), right.to(handle.dtype))
        made.append(WeightPatch(handle.fingerprint, deltas, Provenance("random")))
    return made


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma3", "opt"])
def test_each_row_is_as_under_its_own_patch(family):
    handle = tiny_handle(family, dtype=torch.float64, scale=1.5)
    patches = patches_for(handle)
    batch = handle.encode(TEXTS)
    owners = [0, 1, 2, NOBODY, 1]
    wanted = {NOBODY: handle.logits(batch)}
    for number, patch in enumerate(patches):
        with patch.applied(handle):
            wanted[number] = handle.logits(batch)
    bits = handle.weights_digest()
    with RowPatches(handle, patches).carried(owners):
        found = handle.logits(batch)
    real = batch.attention_mask.bool()
    for row, owner in enumerate(owners):
        difference = (found[row] - wanted[owner][row])[real[row]].abs().max()
        assert float(difference) < 1e-10
    assert float((wanted[0] - wanted[1])[real].abs().max()) > 1e-2
    assert handle.weights_digest() == bits
    assert torch.equal(handle.logits(batch), wanted[NOBODY]), "no hook is left"


def test_rows_sit_on_top_of_what_is_applied():
    handle = tiny_handle("llama", dtype=torch.float64)
    first, second = patches_for(handle, (1, 1))
    with first.applied(handle):
        assert rowwise_obstacle(handle, [second]) == ""
        with RowPatches(handle, [second]).carried([0]):
            found = handle.logits(handle.encode(TEXTS[:1]))
        with second.applied(handle):
            wanted = handle.logits(handle.encode(TEXTS[:1]))
    assert float((found - wanted).abs().max()) < 1e-10


def test_what_cannot_share_a_pass_says_why():
    handle = tiny_handle("gpt2")
    one, two = patches_for(handle, (1, 1))
    (other,) = patches_for(handle, (1,), layers=(1,))
    weight = handle.weight(Role.MLP_OUT, 0)
    dense = WeightPatch(handle.fingerprint, {weight.name: Dense(torch.zeros(weight.shape))}, Provenance("x"))
    head = handle.weight(Role.UNEMBED)
    factors = LowRank(torch.zeros(head.shape[0], 1), torch.zeros(1, head.shape[1]))
    tied = WeightPatch(handle.fingerprint, {head.name: factors}, Provenance("x"))
    assert rowwise_obstacle(handle, [one, two]) == ""
    for patches, reason in (
        ([one, other], "different parameters"),
        ([dense], "not low-rank"),
        ([tied], "projection of its own"),
        ([object()], "no weight patch"),
        ([], "there is none"),
    ):
        with pytest.raises(PatchError, match=reason):
            RowPatches(handle, patches)  # type: ignore[arg-type]
    with pytest.raises(BaseMismatchError):
        RowPatches(tiny_handle("gpt2", seed=1), [one])


def test_owners_must_fit_patches_and_batch():
    handle = tiny_handle("llama")
    rows = RowPatches(handle, patches_for(handle, (1,)))
    with pytest.raises(ConfigError, match="owners"), rows.carried([1]):
        pass
    with pytest.raises(ConfigError, match="batch of 2 rows"), rows.carried([0]):
        handle.logits(handle.encode(TEXTS[:2]))
    with pytest.raises(ConfigError, match="no patches were given"):
        continue_rows(handle, [Start((1,), 2, owner=0)])
    with pytest.raises(ConfigError, match="lists of probes"):
        ModelRespondent(handle).observe_each(rows, [])


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_answers_of_many_patched_models_at_once(family):
    handle = tiny_handle(family, dtype=torch.float64, scale=1.5)
    patches = patches_for(handle, (1, 2))
    probes = [
        Probe("a", "g", TEXTS[0], answers=("Paris", "Paris and Rome"), rival="Rome"),
        Probe("b", "g", TEXTS[3], answers=("Rome",), distribution=True),
        Probe("c", "g", TEXTS[4], "generate", tokens=5),
        Probe("d", "g", TEXTS[2], "generate", tokens=24, whole=True, top_k=5),
    ]
    asked = [probes, probes[1:]]
    respondent = ModelRespondent(handle, batch_size=3)
    found = respondent.observe_each(RowPatches(handle, patches), asked)
    texts = set()
    for patch, wanted, seen in zip(patches, asked, found, strict=True):
        with patch.applied(handle):
            for one, other in zip(seen, respondent.observe(wanted), strict=True):
                assert (one.probe_id, one.text) == (other.probe_id, other.text)
                texts.add(one.text)
                for left, right in zip(one.ratings, other.ratings, strict=True):
                    assert left.token_logprobs == pytest.approx(right.token_logprobs, abs=1e-10)
                    assert left.predicted == right.predicted
                    assert (left.distribution is None) == (right.distribution is None)
    assert len(texts) > 3, "the patches change what is written"


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "gemma3", "opt"])
def test_cached_decoding_writes_what_the_model_writes(family):
    handle = tiny_handle(family, scale=1.5)
    starts = [
        Start(tuple(encode_ids(handle.tokenizer, text)), 4 + 3 * number) for number, text in enumerate(TEXTS)
    ]
    found = continue_rows(handle, starts, batch_size=3)
    for text, start, tokens in zip(TEXTS, starts, found, strict=True):
        assert handle.decode(tokens) == handle.generate([text], max_new_tokens=start.tokens)[0]
        assert len(tokens) <= start.tokens
    assert max(map(len, found)) > 4


def test_a_text_ends_at_the_end_token():
    handle = tiny_handle("llama", scale=1.5)
    start = Start(tuple(encode_ids(handle.tokenizer, TEXTS[0])), 6)
    (whole,) = continue_rows(handle, [start])
    handle.model.generation_config.eos_token_id = [whole[2], 399]
    (cut,) = continue_rows(handle, [start])
    assert cut == whole[: whole.index(whole[2])]


def test_a_sampled_text_does_not_depend_on_its_neighbours():
    handle = tiny_handle("llama", dtype=torch.float64)
    ids = [tuple(encode_ids(handle.tokenizer, text)) for text in TEXTS]
    starts = [Start(row, 8, seed=number) for number, row in enumerate(ids)]
    together = continue_rows(handle, starts, top_k=5)
    assert together == [continue_rows(handle, [start], top_k=5)[0] for start in starts]
    shorter = continue_rows(handle, [Start(ids[0], 3, seed=0)], top_k=5)[0]
    assert shorter == together[0][:3]
    others = {tuple(continue_rows(handle, [Start(ids[0], 8, seed=seed)], top_k=5)[0]) for seed in range(6)}
    assert len(others) > 3
    narrow = continue_rows(handle, [Start(ids[0], 8, seed=5)], top_k=1)[0]
    assert narrow == continue_rows(handle, [Start(ids[0], 8)])[0]


def test_an_evaluation_equals_the_plain_one():
    """Cached baseline, shared rows, shared passes: the values of every case are those of one patch at a time."""
    from lab.data import load_cases
    from lab.eval import SuiteOptions, evaluate_editing, get_suite
    from tests.reference.single_edits import plain_single_edits

    handle = tiny_handle("gpt2", dtype=torch.float64, scale=1.5)
    cases = load_cases(SAMPLES / "counterfact/counterfact.json")
    suite = get_suite("counterfact", SuiteOptions(fluency=False))
    made = dict(zip([case.requests[0].id for case in cases], patches_for(handle, (1, 2, 1, 3)), strict=True))

    class Prepared:
        def edit(self, handle, requests):
            return made[requests[0].id]

    report = evaluate_editing(suite, handle, Prepared(), cases, batch_size=7, in_order=True)
    wanted = plain_single_edits(handle, suite, cases.cases, list(made.values()))
    assert report.n == len(wanted) == 4
    for row, values in zip(report.cases, wanted, strict=True):
        assert row.values == {name: pytest.approx(found, abs=1e-10) for name, found in values.items()}


@pytest.mark.parametrize("tokens", [256, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_begin_alike_give_the_logits_of_whole_rows(family, tokens, monkeypatch):
    monkeypatch.setattr("lab.shared_prefix._CPU_PASS", tokens)
    handle = tiny_handle(family, dtype=torch.float32 if family in ROUGH else torch.float64, scale=1.5)
    state, capital = "The capital of France is Rome. ", "The capital of"
    texts = [
        f"{state}{capital} {name} is{end}"
        for name in ("Japan", "Kenya")
        for end in (" Tokyo", " in Paris", "")
    ]
    texts += [f"{capital} Kenya is Nairobi", "Who wrote", texts[0]]
    ids = [tuple(encode_ids(handle.tokenizer, text)) for text in texts]
    lines = [Line(row, len(row) - 1 - number % 3 % len(row)) for number, row in enumerate(ids)]
    fed = []
    embedding = handle.module(Role.EMBED)
    hook = embedding.register_forward_pre_hook(lambda module, args: fed.append(args[0].numel()))
    parts = list(line_logits(handle, lines, batch_size=4))
    hook.remove()
    assert all(part.logits.shape[0] == 1 or part.logits[..., 0].numel() <= tokens for part in parts)
    assert sorted(index for part in parts for index in part.lines) == list(range(len(lines)))
    assert sum(fed) < 0.7 * sum(map(len, ids))
    for part in parts:
        for index, logits, offset in zip(part.lines, part.logits, part.offsets, strict=True):
            line = lines[index]
            assert offset <= line.first
            whole = handle.logits(handle.encode([texts[index]]))[0, line.first :]
            shown = logits[line.first - offset : len(line.ids) - offset]
            assert torch.allclose(shown, whole, rtol=1e-4, atol=1e-3 if family in ROUGH else 1e-10)


def test_lines_share_with_lines_of_their_own_patch_only():
    handle = tiny_handle("llama", dtype=torch.float64, scale=1.5)
    patches = patches_for(handle, (1, 2))
    ids = [
        tuple(encode_ids(handle.tokenizer, f"The capital of France is{end}")) for end in (" Paris", " Rome")
    ]
    lines = [Line(row, len(row) - 2, owner) for owner in (0, 1, NOBODY) for row in ids]
    found = {}
    for part in line_logits(handle, lines, patches=RowPatches(handle, patches)):
        for index, logits, offset in zip(part.lines, part.logits, part.offsets, strict=True):
            found[index] = logits[lines[index].first - offset]
    for index, line in enumerate(lines):
        batch = pad_rows([line.ids], 0)
        if line.owner == NOBODY:
            whole = handle.logits(batch)
        else:
            with patches[line.owner].applied(handle):
                whole = handle.logits(batch)
        assert float((found[index] - whole[0, line.first]).abs().max()) < 1e-10
    with pytest.raises(ConfigError, match="no patches were given"):
        list(line_logits(handle, lines))
    with pytest.raises(ConfigError, match="outside its tokens"):
        list(line_logits(handle, [Line((1, 2), 2)]))
