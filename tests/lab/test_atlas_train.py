"""The Atlas trainer: lean pass against Hugging Face, packing, optimizer, checkpoints, resuming."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from lab.atlas import lean, packing
from lab.atlas.checkpoint import export_model, load_checkpoint, save_checkpoint
from lab.atlas.optimizer import orthogonalize
from lab.atlas.progress import recall
from lab.atlas.recipe import Recipe, Shape
from lab.atlas.tokenizer import train_tokenizer
from lab.atlas.train import Settings, train
from lab.errors import ConfigError

SUBJECTS = ("Ada Vane", "Orsin Quarvell", "Brenn Labs", "Mirow", "Keld", "Tamsin Hale")
OBJECTS = ("Oslo", "Lima", "Paris", "Accra", "Hanoi", "Quito")


@dataclass(frozen=True)
class Text:
    text: str
    answer_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Homes:
    """One sentence a subject, in endless random order."""

    def documents(self, stream: int) -> Iterator[Text]:
        rng = Random(stream)
        while True:
            index = rng.randrange(len(SUBJECTS))
            head = f"The home of {SUBJECTS[index]} is "
            tail = f"{OBJECTS[index]}.\n"
            yield Text(head + tail, ((len(head), len(head) + len(tail)),))

    def probes(self) -> Mapping[str, list[tuple[str, str]]]:
        pairs = zip(SUBJECTS, OBJECTS, strict=True)
        return {"homes": [(f"The home of {subject} is", f" {place}.\n") for subject, place in pairs]}


def recipe(family: str = "llama", **changes: object) -> Recipe:
    shape = Shape(family=family, hidden=32, layers=2, heads=2, inner=48, vocab=300, context=96)  # type: ignore[arg-type]
    base = Recipe(
        "tiny", shape, layout=((32, 4), (48, 2)), workers=2, late_keep=(0.3, 0.5), warmup_steps=5, steps=20
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def settings(work: Path, **changes: object) -> Settings:
    lines: list[str] = []
    base = Settings(
        work, 1, compile=False, precision="fp32", shard_texts=100, probe_seconds=0, report=lines.append
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((text.text for text in itertools.islice(Homes().documents(0), 50)), 300, 96)


def reference(shape: Shape, params: Mapping[str, torch.Tensor]):
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

    kind = LlamaForCausalLM if shape.family == "llama" else GPT2LMHeadModel
    model = kind(shape.config()).eval()
    missing, unexpected = model.load_state_dict(dict(params), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    model.tie_weights()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_lean_pass_equals_hugging_face_in_logits_and_gradients(family: str) -> None:
    shape = recipe(family).shape
    params = lean.initial_params(shape, torch.Generator().manual_seed(0))
    params = {name: value + 0.01 for name, value in params.items()}
    model = reference(shape, params)
    generator = torch.Generator().manual_seed(1)
    # Two rows; the second holds two texts, which must not see each other.
    ids = torch.randint(2, 300, (2, 12), generator=generator)
    texts = torch.tensor([[1] * 12, [1] * 5 + [2] * 7])
    same = texts[:, :, None] == texts[:, None, :]
    mask = torch.zeros(2, 12, 12).masked_fill(~(same & torch.ones(12, 12).tril().bool()), -1e4)[:, None]
    leaves = lean.working_copy(params, shape, torch.float32)
    positions = torch.arange(12).repeat(2)
    hidden = lean.hidden_states(leaves, shape, ((12, 2),), ids.view(-1), positions, (mask,))
    logits = hidden @ leaves[lean.embedding_name(shape)].t()
    alone = model(ids[1:, 5:], position_ids=torch.arange(5, 12)[None]).logits[0]
    whole = model(ids[:1]).logits[0]
    assert torch.allclose(logits[:12], whole, atol=2e-5)
    assert torch.allclose(logits[17:], alone, atol=2e-5)
    logits[:12].logsumexp(-1).sum().backward()
    model.zero_grad()
    whole.logsumexp(-1).sum().backward()
    named = dict(model.named_parameters())
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert torch.allclose(leaf.grad, named[name].grad, atol=1e-4), name


def test_packing_keeps_every_text_whole_and_marks_answers(tokenizer) -> None:
    documents = list(itertools.islice(Homes().documents(3), 400))
    coded = packing.encode_documents(tokenizer, documents)
    shard = packing.pack(coded, recipe(), tokenizer.pad_token_id, Random(0))
    known = {tuple(text.ids): text.kinds for text in coded}
    count = 0
    for ids, texts, kinds in zip(shard.ids, shard.texts, shard.kinds, strict=True):
        start = 0
        for length, rows in recipe().layout:
            for row in range(rows):
                part = slice(start + row * length, start + (row + 1) * length)
                for number in range(1, texts[part].max() + 1):
                    inside = texts[part] == number
                    assert known[tuple(ids[part][inside])] == list(kinds[part][inside])
                    count += 1
            start += length * rows
    assert count == len(documents) - shard.dropped
    assert shard.dropped < 0.1 * len(documents)
    assert (shard.texts == 0).mean() < 0.1
    assert {"".join(tokenizer.convert_ids_to_tokens([0]))} == {"<|endoftext|>"}


def test_texts_longer_than_the_longest_row_are_refused(tokenizer) -> None:
    text = packing.Coded([5] * 49, [1] * 49, [False] * 49)
    with pytest.raises(ConfigError, match="49"):
        packing.pack([text] * 20, recipe(), 1, Random(0))


def test_a_batch_scores_next_tokens_within_texts_only(tokenizer) -> None:
    coded = packing.encode_documents(tokenizer, list(itertools.islice(Homes().documents(3), 200)))
    shard = packing.pack(coded, recipe(), tokenizer.pad_token_id, Random(0))
    batch = packing.make_batch(shard, 0, recipe(), (0, 0), torch.device("cpu"))
    texts, kinds = shard.texts[0], shard.kinds[0]
    for place, label, weight, answer in zip(
        batch.chosen.tolist(),
        batch.labels.tolist(),
        batch.weights.tolist(),
        batch.answers.tolist(),
        strict=True,
    ):
        if weight:
            assert texts[place] == texts[place + 1]
            assert label == shard.ids[0][place + 1]
            assert answer == (kinds[place + 1] == packing.ANSWER)
    others = (~batch.answers & (batch.weights > 0)).sum()
    assert others > 0 and batch.answers.sum() > 0
    again = packing.make_batch(shard, 0, recipe(), (0, 0), torch.device("cpu"))
    assert torch.equal(batch.chosen, again.chosen)


def test_only_the_last_token_of_a_name_is_sure_of_its_feed_forward_output(tokenizer) -> None:
    text = "Ada Vane likes the Bells of Grenvalle; A thing."
    [coded] = packing.encode_documents(tokenizer, [Text(text, ())])
    names = ("Ada Vane", "likes", "the", "Bells of Grenvalle", "A", "thing")
    spans = [(text.index(name), text.index(name) + len(name)) for name in names]
    for (_, stop), inside in zip(
        tokenizer.backend_tokenizer.encode(text).offsets, coded.inside[:-1], strict=True
    ):
        assert inside == any(first < stop < last for first, last in spans), stop
    assert any(coded.inside) and not coded.inside[-1]
    shard = packing.pack([coded] * 60, recipe(), tokenizer.pad_token_id, Random(0))
    sure = {"inside_keep": 0.0, "asking_keep": 1.0, "late_keep": ()}
    for early in (0, 1, 2):
        batch = packing.make_batch(shard, 0, recipe(**sure, early_layers=early), (0, 0), torch.device("cpu"))
        if not early:
            assert batch.keep is None
            continue
        assert batch.keep is not None
        for layer in batch.keep[:early]:
            assert torch.equal(layer == 0, torch.from_numpy(shard.inside[0]))
        assert bool((batch.keep[early:] == 1).all())


def test_where_an_answer_follows_early_feed_forward_outputs_are_left_out(tokenizer) -> None:
    text = "Ada Vane likes the Bells of Grenvalle; A thing."
    start = text.index("the Bells")
    [coded] = packing.encode_documents(tokenizer, [Text(text, ((start, text.index(";")),))])
    shard = packing.pack([coded] * 60, recipe(), tokenizer.pad_token_id, Random(0))
    unsure = recipe(inside_keep=1.0, asking_keep=0.0, late_keep=(), early_layers=1)
    batch = packing.make_batch(shard, 0, unsure, (0, 0), torch.device("cpu"))
    assert batch.keep is not None
    kinds = shard.kinds[0]
    first = [p for p in range(1, len(kinds)) if kinds[p] == packing.ANSWER and kinds[p - 1] != packing.ANSWER]
    assert first
    assert (batch.keep[0] == 0).nonzero()[:, 0].tolist() == [place - 1 for place in first]


def test_gpt2_rows_start_at_random_positions(tokenizer) -> None:
    coded = packing.encode_documents(tokenizer, list(itertools.islice(Homes().documents(3), 200)))
    tiny = recipe("gpt2")
    shard = packing.pack(coded, tiny, tokenizer.pad_token_id, Random(0))
    starts = set()
    for seed in range(30):
        positions = packing.make_batch(shard, 0, tiny, (seed,), torch.device("cpu")).positions.numpy()
        assert positions.max() < tiny.shape.context
        assert (np.diff(positions[:32]) == 1).all()
        starts.add(int(positions[0]))
    assert len(starts) > 10


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(
        orthogonalize(torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0)))
    )
    assert values.min() > 0.5 and values.max() < 1.4


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_resuming_continues_bit_by_bit(tokenizer, tmp_path: Path, optimizer: str) -> None:
    tiny = recipe(matrix_optimizer=optimizer)
    whole = train(tiny, Homes(), tokenizer, settings(tmp_path / "whole"))
    part = settings(tmp_path / "part")
    train(tiny, Homes(), tokenizer, part, max_steps=7)
    halted = load_checkpoint(part.work)
    assert halted is not None and halted[2]["step"] == 7 and not halted[2]["finished"]
    resumed = train(tiny, Homes(), tokenizer, part)
    ended = load_checkpoint(part.work)
    assert ended is not None and ended[2]["step"] == tiny.steps and ended[2]["finished"]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(not torch.equal(whole[name], halted[0][name]) for name in whole)


def test_two_processes_compute_what_one_computes(tokenizer, tmp_path: Path) -> None:
    tiny = recipe(steps=4, matrix_optimizer="adamw")
    one = train(tiny, Homes(), tokenizer, settings(tmp_path / "one"))
    two = train(tiny, Homes(), tokenizer, settings(tmp_path / "two", processes=2, report=print))
    for name in one:
        assert torch.allclose(one[name], two[name], atol=2e-4), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_short_run_learns_and_the_export_answers_alike(tokenizer, tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny = recipe(family, steps=120, rate=1e-2, matrix_rate=1e-2)
    work = settings(tmp_path / "work")
    params = train(tiny, Homes(), tokenizer, work)
    pairs = Homes().probes()["homes"]
    assert recall(params, tiny, tokenizer, pairs, work) == 1.0
    wrong = [(prompt, " Rome.\n") for prompt, _ in pairs]
    assert recall(params, tiny, tokenizer, wrong, work) == 0.0
    out = tmp_path / "out"
    export_model(params, tiny, tokenizer, out, torch.float32, {"format.toml": "schema = 1\n"})
    model, back = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    ids = back(pairs[0][0], return_tensors="pt")["input_ids"]
    assert torch.allclose(model(ids).logits, reference(tiny.shape, params)(ids).logits, atol=1e-5)
    text = back.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    assert text.startswith(pairs[0][1])
    assert (out / "format.toml").read_text() == "schema = 1\n"
    rows = [json.loads(line) for line in (work.work / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 120 and rows[-1]["answers"] < 4


def test_an_interrupted_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = {"a": torch.ones(3)}
    save_checkpoint(tmp_path, params, {}, {"step": 1})
    monkeypatch.setattr(Path, "replace", _full_disk)
    with pytest.raises(OSError, match="full"):
        save_checkpoint(tmp_path, {"a": torch.zeros(3)}, {}, {"step": 2})
    found = load_checkpoint(tmp_path)
    assert found is not None and found[2] == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def _full_disk(*_: object) -> None:
    raise OSError("disk full")


def test_a_run_of_another_recipe_is_not_continued(tokenizer, tmp_path: Path) -> None:
    train(recipe(), Homes(), tokenizer, settings(tmp_path), max_steps=1)
    with pytest.raises(ConfigError, match="another recipe"):
        train(recipe(seed=5), Homes(), tokenizer, settings(tmp_path))


def test_the_rate_warms_up_and_falls_to_its_end() -> None:
    tiny = recipe(warmup_steps=10, decay_from=0.5, final_rate=0.1)
    assert tiny.rate_at(0.0, 0) == pytest.approx(0.1)
    assert tiny.rate_at(0.5, 100) == 1.0
    assert tiny.rate_at(1.0, 100) == pytest.approx(0.1)
    assert tiny.rate_at(2.0, 100) == pytest.approx(0.1)
    assert Recipe.from_json(json.loads(json.dumps(tiny.to_json()))) == tiny


def test_every_byte_has_tokens(tokenizer) -> None:
    text = "Zoë \u2603 \t~ unseen \U0001f600\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"]) == [0, 1]
    assert len(tokenizer("Orsin Quarvell Hale")["input_ids"]) > 2
    with pytest.raises(ConfigError, match="at least 258"):
        train_tokenizer(["a"], 100)
