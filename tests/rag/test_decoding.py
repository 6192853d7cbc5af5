"""Every rule against a plain reference in double precision, and the batch with its cache against single passes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import ConfigError, RequestError, UnknownNameError
from lab.handle import ModelHandle
from rag.decoding import DECODERS, TwoStreams, contrast_generate, get_rule
from rag.decoding.parammute import ParamMute
from rag.decoding.rules import CAD, COIECD, AdaCAD, CKPlug, Greedy, jensen_shannon
from tests.tiny import tiny_handle

LN2 = math.log(2)
RULES = (
    Greedy(), CAD(), CAD(0.5), AdaCAD(), AdaCAD(0.3), COIECD(), COIECD(variant="entropy"),
    CKPlug(), CKPlug(0.0), CKPlug(1.0, threshold=math.inf, top_k=3),
)  # fmt: skip
WITH = ["The capital of France is Rome. The capital of France is", "Edwin is here. Q: Who wrote the book? A:"]
WITHOUT = ["The capital of France is", "Q: Who wrote the book? A:"]


def plain(rule, c: list[float], u: list[float]) -> list[float]:
    """A rule by its formula, on lists, token by token."""
    tokens = range(len(c))

    def h(logs):
        return -sum(math.exp(x) * x for x in logs)

    if isinstance(rule, Greedy):
        return c
    if isinstance(rule, CAD):
        return [(1 + rule.alpha) * c[v] - rule.alpha * u[v] for v in tokens]
    if isinstance(rule, AdaCAD):
        p, q = [math.exp(x) for x in c], [math.exp(x) for x in u]
        m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        jsd = sum(a * math.log(a / x) + b * math.log(b / x) for a, b, x in zip(p, q, m, strict=True)) / 2
        weight = max(jsd, rule.floor)
        return [(1 + weight) * c[v] - weight * u[v] for v in tokens]
    if isinstance(rule, COIECD):
        shifted = [-x - h(u) for x in c]
        if rule.variant == "entropy":
            shifted = [abs(x) for x in shifted]
        total = math.log(sum(math.exp(x) for x in shifted))
        s = [x - total for x in shifted]
        low, high = min(s) + math.log(4), max(s) - math.log(4)
        drop = sum(x < low for x in s) == 1
        inside = [(drop or x >= low) and not x > high for x in s]
        return [(u[v] if inside[v] else c[v]) + rule.alpha * (c[v] - u[v]) for v in tokens]
    if h(u) - h(c) >= rule.threshold:
        return c
    a = h(c) / (h(u) + h(c)) if rule.memory is None else rule.memory
    head = {v for logs in (c, u) for v in sorted(tokens, key=lambda v: -logs[v])[: rule.top_k]}
    return [a * u[v] + (1 - a) * (c[v] - u[v]) if v in head else -math.inf for v in tokens]


def same(found, wanted) -> bool:
    return torch.allclose(
        torch.as_tensor(found, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64), atol=1e-9
    )


def logs(seed: int, rows: int = 4, size: int = 40, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(rows, size, generator=generator, dtype=torch.float64), -1)


@pytest.fixture(scope="module")
def tiny() -> ModelHandle:
    return tiny_handle("llama", dtype=torch.float64, scale=2.0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_is_its_formula(rule):
    c, u = logs(0), logs(1)
    wanted = [plain(rule, a, b) for a, b in zip(c.tolist(), u.tolist(), strict=True)]
    assert same(rule.combine(c, u), wanted)


def test_the_rows_of_the_formula_test_reach_both_branches():
    c, u = logs(0), logs(1)
    turned = torch.isinf(CKPlug().combine(c, u)).any(-1)
    assert turned.any() and not turned.all()
    for variant in ("official", "entropy"):
        inside = COIECD(variant=variant).band(c, u)
        assert inside.any() and not inside.all()
    assert (COIECD().band(c, u) != COIECD(variant="entropy").band(c, u)).any()


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        *(("llama", rule) for rule in RULES[:-1]),
        ("gpt2", AdaCAD()),
        ("gemma3", AdaCAD()),
        ("qwen2", CKPlug()),
    ],
    ids=repr,
)
def test_cached_rows_of_a_batch_equal_two_plain_passes(rule, family, tiny):
    handle = tiny if family == "llama" else tiny_handle(family, dtype=torch.float64, scale=2.0)
    rows = [[handle.tokenizer(text)["input_ids"] for text in side] for side in (WITH, WITHOUT)]
    streams = TwoStreams(handle, *rows, rule)
    said = [[], []]
    with torch.no_grad():
        for _ in range(4):
            scores = streams.scores()
            for question, already in enumerate(said):
                c, u = (
                    torch.log_softmax(
                        handle.model(torch.tensor([side[question] + already])).logits[0, -1], -1
                    ).tolist()
                    for side in rows
                )
                assert same(scores[question], plain(rule, c, u))
            tokens = scores.argmax(-1)
            for already, token in zip(said, tokens.tolist(), strict=True):
                already.append(token)
            streams.extend(tokens)
    texts = contrast_generate(handle, WITH, WITHOUT, rule, max_new_tokens=4)
    ends = handle.tokenizer.eos_token_id
    assert texts == [handle.decode(row[: row.index(ends)] if ends in row else row) for row in said]


def test_cad_equals_the_guidance_of_transformers(tiny):
    for context, bare in zip(WITH, WITHOUT, strict=True):
        one, other = (tiny.tokenizer(text, return_tensors="pt")["input_ids"] for text in (context, bare))
        wanted = tiny.model.generate(
            one, attention_mask=torch.ones_like(one), guidance_scale=1.5, negative_prompt_ids=other,
            negative_prompt_attention_mask=torch.ones_like(other), max_new_tokens=6, do_sample=False, pad_token_id=0,
        )  # fmt: skip
        found = contrast_generate(tiny, [context], [bare], CAD(0.5), max_new_tokens=6)
        assert found == [tiny.decode(wanted[0, one.shape[1] :])]


@pytest.mark.parametrize("rule", [Greedy(), CAD(0.5)], ids=repr)
def test_answers_that_are_done_are_computed_no_further(rule, tiny, monkeypatch):
    told = [f"{text} {number}" for number in range(3) for text in WITH]
    bare = [text for _ in range(3) for text in WITHOUT]
    free = [
        contrast_generate(tiny, [one], [two], rule, max_new_tokens=12)[0]
        for one, two in zip(told, bare, strict=True)
    ]
    # A mark that most answers hold early and one late or never, so that rows leave at different steps.
    signs = {sign for text in free for sign in text}
    places = {sign: sorted(text.find(sign) % 99 for text in free) for sign in signs}
    mark = max(places, key=lambda sign: places[sign][-1] - places[sign][len(free) // 2])
    kept = []
    real = TwoStreams.keep
    monkeypatch.setattr(
        TwoStreams, "keep", lambda self, places: (kept.append(len(places)), real(self, places))[1]
    )
    found = contrast_generate(tiny, told, bare, rule, max_new_tokens=12, stop=[mark])
    assert found == [text.partition(mark)[0] for text in free]
    assert kept and kept[0] <= len(told) // 2


def test_greedy_is_the_handles_own_decoding_and_stops_where_it_does(tiny):
    free = tiny.generate(WITH, max_new_tokens=8)
    assert contrast_generate(tiny, WITH, WITHOUT, Greedy(), max_new_tokens=8) == free
    mark = free[0][2]
    assert contrast_generate(tiny, WITH, WITHOUT, Greedy(), max_new_tokens=8, stop=[mark]) == [
        text.partition(mark)[0] for text in free
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 30))
def test_what_holds_for_every_pair_of_streams(seed, scale):
    c, u = logs(seed, scale=scale), logs(seed + 1, scale=scale)
    jsd = jensen_shannon(c, u)
    assert bool((jsd >= 0).all()) and bool((jsd <= LN2).all())
    for rule in RULES[:-1]:
        assert torch.equal(rule.combine(c, c).argmax(-1), c.argmax(-1)), rule
        assert not torch.isnan(rule.combine(c, u)).any(), rule
    assert torch.equal(CAD(0.0).combine(c, u), c)
    favoured = (c - u).argmax(-1, keepdim=True)
    odds = [CAD(a).combine(c, u).log_softmax(-1).gather(-1, favoured) for a in (0.0, 0.5, 1.0, 2.0)]
    assert all(bool((low <= high + 1e-9).all()) for low, high in pairwise(odds))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_token_that_the_model_rules_out_never_wins_and_makes_no_nan(rule):
    raw, other = logs(2).clone(), logs(3).clone()
    raw[:, :5] = -math.inf
    other[:, 3:8] = -math.inf
    scores = rule.combine(raw.log_softmax(-1), other.log_softmax(-1))
    assert not torch.isnan(scores).any()
    assert bool((scores[:, :5] == -math.inf).all())
    assert bool((scores < math.inf).all())
    assert bool(torch.isfinite(scores).any(-1).all())


def test_names_and_settings():
    assert [type(get_rule(name)) for name in DECODERS.names()] == [
        Greedy,
        CAD,
        AdaCAD,
        COIECD,
        CKPlug,
        ParamMute,
    ]
    assert get_rule("cad:alpha=0.5") == CAD(0.5)
    assert get_rule("ck_plug:memory=0,top_k=5") == CKPlug(0, top_k=5)
    assert get_rule("coiecd:variant=entropy") == COIECD(variant="entropy")
    with pytest.raises(UnknownNameError, match="alpha"):
        get_rule("cad:alpa=1")
    for wrong in (
        "cad:alpha=x",
        "cad:alpha",
        "cad:alpha=-1",
        "ck_plug:memory=2",
        "ck_plug:top_k=0",
        "coiecd:ratio=0",
    ):
        with pytest.raises(ConfigError):
            get_rule(wrong)


def test_lists_of_different_length_are_refused(tiny):
    with pytest.raises(ConfigError, match="2 prompts with documents, 1 without"):
        contrast_generate(tiny, WITH, WITHOUT[:1], CAD())


def test_an_answer_ends_where_the_positions_do():
    handle = tiny_handle("gpt2", scale=2.0)
    word = handle.tokenizer(" Paris")["input_ids"]
    long = " Paris" * (253 // len(word))
    used = len(handle.tokenizer(long)["input_ids"])
    assert 250 <= used < 256
    full, short = contrast_generate(handle, [long, WITH[0]], [WITHOUT[0]] * 2, CAD(), max_new_tokens=12)
    assert full == contrast_generate(handle, [long], [WITHOUT[0]], CAD(), max_new_tokens=256 - used)[0]
    assert short == contrast_generate(handle, [WITH[0]], [WITHOUT[0]], CAD(), max_new_tokens=12)[0]
    with pytest.raises(RequestError, match="prompt 1 has"):
        contrast_generate(handle, WITH, [WITHOUT[0], long * 2], CAD())
