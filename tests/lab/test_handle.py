"""The model handle: loading, identity, locks, generation; registry and records beside it."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab.arch import ARCHITECTURES, Role, architecture_for
from lab.errors import (
    BusyError,
    ConfigError,
    DataError,
    EmptyTargetError,
    RequestError,
    SubjectNotFoundError,
    UnknownNameError,
    UnsupportedModelError,
)
from lab.handle import ModelHandle
from lab.records import EditRequest, Fact, read_facts, write_facts
from lab.registry import Registry
from tests.tiny import FAMILIES, tiny_handle, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_resolves_with_canonical_shapes(family: str) -> None:
    handle = tiny_handle(family)
    for layer in range(handle.n_layers):
        for role in (Role.BLOCK, Role.ATTN, Role.MLP):
            handle.module(role, layer)
        assert handle.weight(Role.MLP_OUT, layer).shape[0] == handle.hidden_size
        assert handle.weight(Role.MLP_IN, layer).shape[1] == handle.hidden_size
        assert handle.weight(Role.ATTN_OUT, layer).shape[0] == handle.hidden_size
    assert handle.weight(Role.EMBED).parameter.shape == (len(tiny_tokenizer()), handle.hidden_size)
    assert handle.weight(Role.UNEMBED).shape == (len(tiny_tokenizer()), handle.hidden_size)
    handle.module(Role.FINAL_NORM)
    if family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"):
        assert handle.weight(Role.MLP_UP, 0).shape == handle.weight(Role.MLP_IN, 0).shape
    else:
        with pytest.raises(UnsupportedModelError, match="mlp_up"):
            handle.module(Role.MLP_UP, 0)
    names = dict(handle.model.named_parameters())
    assert handle.weight(Role.MLP_OUT, 0).name in names
    assert (
        handle.named_weight(handle.weight(Role.MLP_OUT, 0).name).parameter
        is handle.weight(Role.MLP_OUT, 0).parameter
    )


def test_wrong_layers_and_models_are_refused() -> None:
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        handle.module(Role.MLP, 3)
    with pytest.raises(ValueError, match="needs layer"):
        handle.module(Role.MLP)
    known = {name for row in ARCHITECTURES for name in row.model_types}
    assert len(known) == sum(len(row.model_types) for row in ARCHITECTURES) == 12
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        architecture_for(SimpleNamespace(model_type="t5", is_encoder_decoder=True))
    with pytest.raises(UnsupportedModelError, match="experts"):
        architecture_for(SimpleNamespace(model_type="mixtral", is_encoder_decoder=False, num_local_experts=8))
    with pytest.raises(UnsupportedModelError, match="A row in"):
        architecture_for(SimpleNamespace(model_type="mamba", is_encoder_decoder=False))


def test_load_from_a_folder_equals_the_model(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    handle, again = ModelHandle.load(tmp_path), ModelHandle.load(str(tmp_path))
    assert handle.fingerprint == again.fingerprint
    wrapped = ModelHandle.wrap(model, tiny_tokenizer())
    texts = ["The capital of France is"]
    assert torch.allclose(
        handle.logits(handle.encode(texts)), wrapped.logits(wrapped.encode(texts)), atol=1e-6
    )
    assert ModelHandle.load(tmp_path, dtype="bf16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype"):
        ModelHandle.load(tmp_path, dtype="float99")


def test_unknown_models_name_their_neighbours(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean atlas"):
        ModelHandle.load("atlass")
    with pytest.raises(ConfigError, match="cannot load"):
        ModelHandle.load(tmp_path)
    with pytest.raises(ConfigError, match="cannot load"):
        ModelHandle.load("nobody/has-this-model")


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma3"])
def test_generation_ignores_padding_and_order(family: str) -> None:
    handle = tiny_handle(family, scale=2.0)
    prompts = ["The capital of France is", "Tokyo", "Marie Curie worked in the city of"]
    together = handle.generate(prompts, max_new_tokens=6)
    alone = [handle.generate([prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone


def test_generation_is_greedy_seeded_and_stops() -> None:
    handle = tiny_handle("llama", scale=2.0)
    prompt = "The capital of France is"
    ids = handle.encode([prompt]).input_ids[0].tolist()
    expected = []
    for _ in range(5):
        batch = handle.encode([prompt])
        row = torch.tensor([ids + expected])
        logits = handle.model(input_ids=row).logits
        expected.append(int(logits[0, -1].argmax()))
        if expected[-1] == tiny_tokenizer().eos_token_id:
            break
    assert batch.input_ids.shape[0] == 1
    assert handle.generate([prompt], max_new_tokens=5) == [handle.decode(expected)]
    before = torch.random.get_rng_state()
    samples = [
        handle.generate([prompt], max_new_tokens=8, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2, 3)
    ]
    assert samples[0] == samples[1] and len(set(samples)) > 1
    assert torch.equal(torch.random.get_rng_state(), before)
    text = handle.generate([prompt], max_new_tokens=8)[0]
    mark = text[3:5]
    assert handle.generate([prompt], max_new_tokens=8, stop=[mark]) == [text[: text.index(mark)]]


def test_eager_attention_is_switched_back_on_errors() -> None:
    handle = tiny_handle("llama")
    before = handle.config._attn_implementation
    assert before != "eager"
    with pytest.raises(RuntimeError, match="boom"), handle.eager_attention():
        assert handle.config._attn_implementation == "eager"
        raise RuntimeError("boom")
    assert handle.config._attn_implementation == before


def test_writers_wait_for_readers_and_keep_new_ones_out() -> None:
    handle = tiny_handle("llama")
    log: list[str] = []
    reading, writing = threading.Event(), threading.Event()

    def writer() -> None:
        writing.set()
        with handle.writing():
            log.append("write")

    def late_reader() -> None:
        with handle.reading():
            log.append("late read")

    with handle.reading(), handle.reading():
        threads = [threading.Thread(target=writer)]
        threads[0].start()
        assert writing.wait(5)
        time.sleep(0.05)
        threads.append(threading.Thread(target=late_reader))
        threads[1].start()
        time.sleep(0.05)
        assert log == []
        reading.set()
        log.append("read done")
    for thread in threads:
        thread.join(5)
    assert log == ["read done", "write", "late read"]
    with pytest.raises(BusyError, match="leave it first"), handle.reading(), handle.writing():
        pass
    with handle.writing(), handle.reading(), handle.writing():
        pass


def test_registry_names_neighbours_and_broken_targets() -> None:
    registry: Registry[object] = Registry(
        "editor", {"rome": "lab.records:Fact", "memit": "lab.records:Nothing"}
    )
    assert registry.get("rome") is Fact and "rome" in registry and registry.names() == ("rome", "memit")
    with pytest.raises(UnknownNameError, match="did you mean rome"):
        registry.get("rom")
    with pytest.raises(ConfigError, match="does not exist"):
        registry.get("memit")


def test_facts_round_trip_and_malformed_rows_name_file_and_line(tmp_path: Path) -> None:
    facts = [
        Fact(
            "France",
            "capital",
            "Paris",
            "The capital of {} is",
            ("Paname",),
            "capital/France",
            "test",
            "country",
        )
    ]
    file = tmp_path / "facts.jsonl"
    write_facts(file, facts)
    assert read_facts(file) == facts
    for row, message in [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"subject": "a"}', "'object'"),
        ('{"subject": "a", "object": "b", "prompt": "no slot"}', r"exactly one \{\}"),
        ('{"subject": "a", "object": "b", "aliases": "c"}', "list of strings"),
        ('{"subject": "a", "object": "b", "extra": 1}', "unknown field 'extra'"),
    ]:
        file.write_text(f'{{"subject": "x", "object": "y"}}\n\n{row}\n')
        with pytest.raises(DataError, match=message) as caught:
            read_facts(file)
        assert caught.value.line == 3 and str(caught.value).startswith(f"{file}:3: ")
    file.write_text("\n")
    with pytest.raises(DataError, match="no facts"):
        read_facts(file)
    with pytest.raises(DataError, match="no such file"):
        read_facts(tmp_path / "absent.jsonl")


def test_requests_check_themselves() -> None:
    assert EditRequest("1", "The capital of {} is", "France", "Rome").text == "The capital of France is"
    with pytest.raises(EmptyTargetError):
        EditRequest("1", "The capital of {} is", "France", " ")
    with pytest.raises(SubjectNotFoundError):
        EditRequest("1", "The capital of {} is", "", "Rome")
    with pytest.raises(RequestError, match="exactly one"):
        EditRequest("1", "The capital of France is", "France", "Rome")
    request = EditRequest.from_text("1", "Rome said that Rome is in", "Rome", "France")
    assert request.prompt == "Rome said that {} is in"
    with pytest.raises(SubjectNotFoundError, match="does not occur"):
        EditRequest.from_text("1", "Rome is in", "Paris", "France")
