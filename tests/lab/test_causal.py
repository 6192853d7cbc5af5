from __future__ import annotations

import time

import pytest
import torch

from lab.arch import Role
from lab.causal import SiteReport, causal_trace, logit_lens, position_class, subject_site
from lab.errors import ConfigError, RequestError, SubjectNotFoundError
from lab.records import Fact
from lab.tokens import join_target, subject_span
from lab.trace import Site, trace
from tests.tiny import FAMILIES, tiny_handle

PROMPT, SUBJECT = "The city of Toko Yasuda is in", "Toko Yasuda"


def first(output):
    return output[0] if isinstance(output, tuple) else output


def plain_trace(handle, text: str, span: range, role: Role, window: int, std: float, samples: int, seed: int):
    """One row, one sample and one cell at a time, with hooks of its own."""
    ids = handle.encode([text]).input_ids
    length = ids.shape[1]
    noise = torch.randn(
        len(span),
        samples,
        handle.hidden_size,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    noise = (noise * std).to(handle.dtype)
    clean_states: dict[int, torch.Tensor] = {}
    hooks = [
        handle.module(role, layer).register_forward_hook(
            lambda _m, _a, output, layer=layer: clean_states.__setitem__(
                layer, first(output).detach().clone().view(length, -1)
            )
        )
        for layer in range(handle.n_layers)
    ]
    with torch.no_grad():
        table = handle.model(ids).logits[0, -1].double().softmax(-1)
    for hook in hooks:
        hook.remove()
    answer = int(table.argmax())

    def run(sample: int, cell: tuple[int, int] = (-1, -1)) -> float:
        def corrupt(_m, _a, output):
            changed = output.clone()
            changed[0, span.start : span.stop] += noise[:, sample]
            return changed

        def restore(layer: int):
            def hook(_m, _a, output):
                changed = first(output).clone()
                changed.view(length, -1)[cell[0]] = clean_states[layer][cell[0]]
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        handles = [handle.module(Role.EMBED).register_forward_hook(corrupt)]
        if cell[0] >= 0:
            for layer in range(
                max(0, cell[1] - window // 2), min(handle.n_layers, cell[1] + (window + 1) // 2)
            ):
                handles.append(handle.module(role, layer).register_forward_hook(restore(layer)))
        with torch.no_grad():
            value = float(handle.model(ids).logits[0, -1].double().softmax(-1)[answer])
        for hook in handles:
            hook.remove()
        return value

    corrupted = sum(run(s) for s in range(samples)) / samples
    effects = torch.zeros(length, handle.n_layers, dtype=torch.float64)
    for token in range(length):
        for layer in range(handle.n_layers):
            effects[token, layer] = sum(run(s, (token, layer)) for s in range(samples)) / samples - corrupted
    return float(table[answer]), corrupted, effects


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "kind, role, window", [("block", Role.BLOCK, 1), ("mlp", Role.MLP, 1), ("attn", Role.ATTN, 2)]
)
def test_the_batched_map_equals_one_cell_at_a_time(family, kind, role, window):
    fp64 = family not in ("gptj", "gemma2")
    handle = tiny_handle(family, layers=2, dtype=torch.float64 if fp64 else torch.float32, scale=2.0)
    text, subject = "The city of Rome is", "Rome"
    result = causal_trace(
        handle, text, subject, kind=kind, window=window, noise=0.7, samples=2, seed=3, batch_tokens=90
    )
    span = subject_span(handle.tokenizer, text, subject)
    clean, corrupted, effects = plain_trace(handle, text, span, role, window, 0.7, 2, 3)
    tolerance = 1e-10 if fp64 else 2e-5
    assert result.clean == pytest.approx(clean, abs=tolerance)
    assert result.corrupted == pytest.approx(corrupted, abs=tolerance)
    assert torch.allclose(result.effects, effects, atol=tolerance)
    assert float(effects.abs().max()) > 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in handle.model.modules())


def test_restoring_the_last_block_at_the_last_token_brings_everything_back():
    handle = tiny_handle("llama", dtype=torch.float64, scale=2.0)
    result = causal_trace(handle, "The city of {} is in", SUBJECT, samples=3)
    assert float(result.effects[-1, -1]) + result.corrupted == pytest.approx(result.clean, abs=1e-12)
    assert float(result.effects[: result.subject.start].abs().max()) == 0
    assert result.kind == "block"
    assert result.window == 1


def test_a_trace_is_seeded_and_its_noise_follows_the_embeddings(tmp_path):
    handle = tiny_handle("gpt2", scale=2.0)
    one, two = (causal_trace(handle, PROMPT, SUBJECT, kind="mlp", samples=2, seed=5) for _ in range(2))
    assert torch.equal(one.effects, two.effects)
    assert not torch.equal(
        one.effects, causal_trace(handle, PROMPT, SUBJECT, kind="mlp", samples=2, seed=6).effects
    )
    ids = handle.encode([PROMPT]).input_ids[0, one.subject.start : one.subject.stop]
    embedded = handle.model.get_input_embeddings()(ids).double()
    assert one.noise_std == pytest.approx(3 * float(embedded.detach().std()))
    many = causal_trace(handle, PROMPT, SUBJECT, samples=1, subjects=["France", "Japan"])
    assert many.noise_std != pytest.approx(one.noise_std)
    numbers = one.to_json()
    assert numbers["peak"]["class"] == one.peak_class
    assert set(numbers["by_class"]) == {
        "before",
        "subject_first",
        "subject_middle",
        "subject_last",
        "first_after",
        "last",
    }
    path = one.plot(tmp_path / "trace.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_position_classes():
    subject = range(2, 5)
    names = [position_class(token, subject, 8) for token in range(8)]
    assert names == [
        "before", "before", "subject_first", "subject_middle", "subject_last", "first_after", "further", "last",
    ]  # fmt: skip
    assert position_class(2, range(2, 3), 8) == "subject_last"
    assert position_class(3, range(2, 3), 4) == "last"
    assert position_class(3, range(2, 4), 4) == "subject_last"


def test_mistakes_are_refused():
    handle = tiny_handle("llama")
    with pytest.raises(SubjectNotFoundError):
        causal_trace(handle, PROMPT, "France")
    with pytest.raises(ConfigError, match="kind"):
        causal_trace(handle, PROMPT, SUBJECT, kind="head")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="noise"):
        causal_trace(handle, PROMPT, SUBJECT, noise="gaussian")
    with pytest.raises(ConfigError, match="noise"):
        causal_trace(handle, PROMPT, SUBJECT, noise=-1.0)
    with pytest.raises(ConfigError, match="window"):
        causal_trace(handle, PROMPT, SUBJECT, window=0)
    with pytest.raises(ConfigError, match="sample"):
        causal_trace(handle, PROMPT, SUBJECT, samples=0)


def test_the_site_of_each_fact_is_the_peak_of_its_own_map():
    handle = tiny_handle("llama", dtype=torch.float64, scale=2.0)
    facts = [
        Fact(name, "city", "x", "The city of {} is in", id=name)
        for name in ("France", "Toko Yasuda", "Marie Curie")
    ]
    report = subject_site(handle, facts, noise=0.7, samples=2, window=1, known_only=False)
    assert set(report.classes) | set(report.uncorrupted) == {fact.id for fact in facts}
    assert report.classes
    for fact in facts:
        if fact.id not in report.classes:
            continue
        alone = causal_trace(handle, fact.prompt, fact.subject, kind="mlp", noise=0.7, samples=2, window=1)
        assert report.classes[fact.id] == alone.peak_class
        assert report.layers[fact.id] == alone.peak[1]
    assert 0 <= report.share("subject_last") <= 1
    strict = subject_site(handle, facts, noise=0.7, samples=2)
    assert set(strict.unknown) == {fact.id for fact in facts}
    with pytest.raises(RequestError, match="no fact"):
        strict.share()
    assert subject_site(handle, []).classes == {}


def test_only_facts_that_the_model_knows_are_traced():
    handle = tiny_handle("llama", scale=2.0)
    prompt, text = "The city of {} is in", "The city of France is in"
    target = join_target(handle.tokenizer, text, "Paris")[1][0]
    site = Site(Role.FINAL_NORM)
    with trace(handle, [site]) as recording:
        recording.run(handle.encode([text]))
        handle.model.get_parameter("lm_head.weight").data[target] = recording[site][0, -1]
    facts = [
        Fact("France", "city", "Paris", prompt, id="known"),
        Fact("France", "city", "Rome", prompt, id="wrong"),
    ]
    report = subject_site(
        handle, [*facts, Fact("France", "city", "Rome", prompt, ("Paris",), id="alias")], samples=2
    )
    assert set(report.classes) == {"known", "alias"}
    assert report.unknown == ("wrong",)


def test_a_hundred_facts_take_seconds():
    handle = tiny_handle("llama", layers=6, width=64)
    names = [
        f"{a} {b}"
        for a in ("Marie", "Toko", "Edwin", "Barack", "Danielle")
        for b in ("Curie", "Obama", "Yasuda", "France")
    ]
    facts = [
        Fact(name, "city", "x", f"{lead} {{}} is in", id=f"{lead}/{name}")
        for name in names
        for lead in ("The city of", "The wife of")
    ]
    seen: list[int] = []
    start = time.monotonic()
    report = subject_site(
        handle, facts, samples=2, known_only=False, progress=lambda done, _total: seen.append(done)
    )
    assert time.monotonic() - start < 60
    assert seen[-1] == len(facts)
    assert isinstance(report, SiteReport)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_ends_in_the_models_own_prediction(family, tmp_path):
    handle = tiny_handle(family, scale=2.0)
    text = "The capital of France is"
    lens = logit_lens(handle, text, target="Paris", top_k=3)
    logits = handle.logits(handle.encode([text]))[0].double()
    assert lens.top_ids.shape == (3, logits.shape[0], 3)
    best = logits.softmax(-1).topk(3, dim=-1)
    assert torch.allclose(lens.top_probabilities[-1], best.values, atol=1e-4)
    assert torch.equal(lens.top_ids[-1, :, 0], best.indices[:, 0])
    target = join_target(handle.tokenizer, text, "Paris")[1][0]
    assert lens.target is not None
    assert torch.allclose(lens.target[-1], logits.softmax(-1)[:, target], atol=1e-4)
    assert lens.plot(tmp_path / "lens.png").stat().st_size > 1000
    assert len(lens.to_json()["top"]) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_the_lens_equals_norm_and_head_by_hand_where_that_is_all_there_is(family):
    handle = tiny_handle(family, dtype=torch.float64, scale=2.0)
    batch = handle.encode(["The capital of France is"])
    with torch.no_grad():
        states = handle.model(**handle.inputs(batch), output_hidden_states=True).hidden_states
        middle = handle.module(Role.UNEMBED)(handle.module(Role.FINAL_NORM)(states[1]))[0].softmax(-1)
    lens = logit_lens(handle, "The capital of France is", top_k=1)
    assert torch.allclose(lens.top_probabilities[0, :, 0], middle.max(-1).values, atol=1e-12)
    with pytest.raises(ConfigError):
        logit_lens(handle, "The", top_k=0)
