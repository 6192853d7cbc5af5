"""Memory patches: undo in any order beside weight patches, files, latched decisions, rewritten prompts."""

from __future__ import annotations

import itertools
import json
from contextlib import contextmanager

import pytest
import torch

from lab.arch import Role
from lab.causal import causal_trace
from lab.errors import BaseMismatchError, MissingParentsError, PatchError, PatchFormatError
from lab.eval import ModelRespondent, Probe
from lab.memory import MemoryPatch, memories_of
from lab.patch import LowRank, Provenance, WeightPatch
from lab.patch_io import load_saved, read_patch
from lab.replay import Replay
from lab.scoring import score_targets
from lab.tokens import join_target, pad_rows
from lab.trace import Site, trace
from tests.memories import Before, Nudge, registered
from tests.tiny import tiny_handle

TEXTS = ["The capital of France is", "Marie Curie", "Who wrote the book? The mother tongue of Danielle"]


def nudge(handle, seed=0, *, layer=1, limit=-100.0, parents=()):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(1, handle.hidden_size, generator=generator)
    memory = Nudge(layer, 3.0 * vectors, (limit,))
    return MemoryPatch(handle.fingerprint, memory, Provenance("test", seed=seed), parents)


def before(handle, *texts):
    return MemoryPatch(handle.fingerprint, Before(texts), Provenance("test"))


def weights(handle, seed):
    weight = handle.weight(Role.MLP_OUT, 1)
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(size, generator=generator) for size in ((weight.shape[0], 1), (1, weight.shape[1]))
    )
    return WeightPatch(
        handle.fingerprint, {weight.name: LowRank(0.1 * left, right)}, Provenance("test", seed=seed)
    )


def logits(handle, texts=TEXTS):
    return handle.logits(handle.encode(texts))


def hooks(handle):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules()]


def limits_of(handle, layer=1):
    """First coordinate at the last prompt token of each text: what a nudge decides on."""
    site = Site(Role.MLP_OUT, layer)
    with trace(handle, [site], stop=site) as recording:
        batch = handle.encode(TEXTS)
        recording.run(batch)
        return recording[site][torch.arange(len(TEXTS)), batch.last, 0].tolist()


# -- the life of a patch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_undo_in_any_order_beside_weight_patches(order):
    handle, fresh = tiny_handle("llama"), tiny_handle("llama")
    clean, bits, bare = logits(handle), handle.weights_digest(), hooks(handle)
    made = [
        lambda h: nudge(h, 1).apply(h),
        lambda h: weights(h, 2).apply(h, "sidecar"),
        lambda h: nudge(h, 3).apply(h),
    ]
    entries = [apply(handle) for apply in made]
    assert len(handle.applied) == 3
    assert handle.state != handle.fingerprint
    assert handle.weights_digest() == bits
    left = [0, 1, 2]
    for index in order:
        entries[index].undo()
        left.remove(index)
        again = [made[other](fresh) for other in left]
        assert torch.equal(logits(handle), logits(fresh))
        assert handle.state == fresh.state
        for entry in again:
            entry.undo()
    assert torch.equal(logits(handle), clean)
    assert (handle.state, handle.weights_digest(), hooks(handle)) == (handle.fingerprint, bits, bare)


def test_a_memory_changes_the_model_and_an_exception_takes_it_off():
    handle = tiny_handle("gpt2")
    clean, bare = logits(handle), hooks(handle)
    patch = nudge(handle)
    with pytest.raises(RuntimeError, match="boom"), patch.applied(handle) as entry:
        assert handle.applied == (entry,)
        assert handle.applied[0].mode == "memory"
        assert (logits(handle) - clean).abs().max() > 0.1
        raise RuntimeError("boom")
    assert torch.equal(logits(handle), clean)
    assert hooks(handle) == bare
    with patch.applied(handle) as entry:
        entry.undo()
        with pytest.raises(PatchError, match="not applied"):
            entry.undo()


def test_wrong_base_and_missing_parents_are_refused():
    handle, other = tiny_handle("llama"), tiny_handle("llama", seed=5)
    first = nudge(handle, 1)
    with pytest.raises(BaseMismatchError, match="made for base"):
        first.apply(other)
    child = nudge(handle, 2, parents=(first.id,))
    with pytest.raises(MissingParentsError, match="allow_missing_parents"):
        child.apply(handle)
    child.apply(handle, allow_missing_parents=True).undo()
    parent = first.apply(handle)
    child.apply(handle)
    assert parent.undo().stale == (child.id,)


def test_a_memory_that_cannot_be_attached_leaves_what_was_there(monkeypatch):
    handle = tiny_handle("llama")
    kept = nudge(handle, 1).apply(handle)
    patched, bare = logits(handle), hooks(handle)
    real = Nudge.active

    @contextmanager
    def failing(self, handle, routing):
        if len(self.limits) > 1:
            raise RuntimeError("no room")
        with real(self, handle, routing):
            yield None

    monkeypatch.setattr(Nudge, "active", failing)
    with pytest.raises(RuntimeError, match="no room"):
        nudge(handle, 2).apply(handle)
    assert handle.applied == (kept,)
    assert torch.equal(logits(handle), patched)
    assert hooks(handle) == bare


def test_memories_of_one_group_are_joined_in_order_and_others_stand_beside():
    handle = tiny_handle("llama")
    one, two, elsewhere = nudge(handle, 1), nudge(handle, 2, limit=5.0), nudge(handle, 3, layer=0)
    for patch in (one, two, elsewhere):
        patch.apply(handle)
    (joined,) = memories_of(handle, "nudge", 1)
    assert joined.limits == (-100.0, 5.0)
    assert len(handle.stack.memories) == 2
    assert memories_of(handle, "nudge", 2) == []
    both = one + two
    assert both.memory.limits == joined.limits
    assert [part["id"] for part in both.provenance.extra["parts"]] == [one.id, two.id]
    with pytest.raises(PatchError, match="cannot join"):
        one + elsewhere
    with pytest.raises(BaseMismatchError):
        one + nudge(tiny_handle("llama", seed=9), 1)


def test_statistics_see_the_model_without_memories():
    handle = tiny_handle("llama")
    clean = logits(handle)
    nudge(handle).apply(handle)
    before(handle, "Fact. ").apply(handle)
    patched = logits(handle)
    with handle.stack.suspended():
        assert torch.equal(logits(handle), clean)
        assert handle.rewrite(["x"]) == ["x"]
    assert torch.equal(logits(handle), patched)
    assert handle.rewrite(["x"]) == ["Fact. x"]


def test_one_memory_can_be_set_aside_while_another_is_computed():
    handle = tiny_handle("llama")
    beside, own = nudge(handle, 1, layer=0), nudge(handle, 2, layer=1)
    beside.apply(handle)
    without = logits(handle)
    own.apply(handle)
    patched, state = logits(handle), handle.state
    with pytest.raises(RuntimeError, match="boom"), handle.stack.aside("nudge", 1):
        assert torch.equal(logits(handle), without)
        assert handle.state == state
        raise RuntimeError("boom")
    assert torch.equal(logits(handle), patched)


# -- files --------------------------------------------------------------------------------------------------------


def test_save_and_load_round_trip(tmp_path, monkeypatch):
    registered(monkeypatch)
    handle = tiny_handle("llama")
    for name, patch in (
        ("nudge", nudge(handle, 4, parents=("abc",))),
        ("before", before(handle, "A fact. ")),
    ):
        folder = patch.save(tmp_path / name)
        again = MemoryPatch.load(folder)
        assert (again.id, again.base, again.parents) == (patch.id, patch.base, patch.parents)
        assert again.memory.settings() == patch.memory.settings()
        assert again.provenance.to_json() == patch.provenance.to_json()
        assert read_patch(folder, handle).id == load_saved(folder).id == patch.id
        assert {child.name for child in folder.iterdir()} == {"patch.json", "patch.safetensors"}
    with pytest.raises(PatchFormatError, match="weight patch"):
        WeightPatch.load(folder)


def test_ids_tell_memories_apart():
    handle = tiny_handle("llama")
    found = {
        nudge(handle, 1).id,
        nudge(handle, 2).id,
        nudge(handle, 1, limit=0.0).id,
        nudge(handle, 1, parents=("a",)).id,
    }
    assert len(found) == 4
    assert nudge(handle, 1).id == nudge(handle, 1).id


def test_damaged_and_foreign_folders_are_refused(tmp_path, monkeypatch):
    handle = tiny_handle("llama")
    folder = nudge(handle).save(tmp_path / "patch")
    with pytest.raises(PatchFormatError, match="nothing installed here"):
        MemoryPatch.load(folder)
    registered(monkeypatch)
    card = json.loads((folder / "patch.json").read_text())
    for change, match in (
        ({"settings": {"layer": 0, "limits": [0.0]}}, "changed after saving"),
        ({"settings": {"layer": 0}}, "not a readable patch"),
        ({"format_version": 9}, "version"),
        ({"kind": "nugde"}, "nudge"),
        ({"sha256": "0"}, "damaged"),
    ):
        (folder / "patch.json").write_text(json.dumps({**card, **change}))
        with pytest.raises(PatchFormatError, match=match):
            MemoryPatch.load(folder)
    with pytest.raises(PatchError, match="NaN"):
        MemoryPatch(handle.fingerprint, Nudge(1, torch.tensor([[float("nan")]]), (0.0,)), Provenance("test"))


# -- decisions ----------------------------------------------------------------------------------------------------


def continued(handle, prompts, steps):
    """Greedy continuations without a cache: every pass is told where the prompts end."""
    rows = [handle.tokenizer(prompt)["input_ids"] for prompt in prompts]
    lengths = [len(row) for row in rows]
    for _ in range(steps):
        batch = pad_rows(rows, handle.pad_id, prompts=lengths)
        found = handle.logits(batch)[torch.arange(len(rows)), batch.last].argmax(-1).tolist()
        rows = [[*row, token] for row, token in zip(rows, found, strict=True)]
    return [handle.decode(row[length:]) for row, length in zip(rows, lengths, strict=True)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3"])
def test_cached_decoding_keeps_the_decision_of_the_prompt(family):
    handle = tiny_handle(family, scale=1.5)
    found = limits_of(handle)
    # One row answers from the memory and the others do not; deciding at each new token would mix them.
    limit = (sorted(found)[-1] + sorted(found)[-2]) / 2
    clean = handle.generate(TEXTS, max_new_tokens=6)
    with nudge(handle, limit=limit).applied(handle):
        cached = handle.generate(TEXTS, max_new_tokens=6)
        assert cached == continued(handle, TEXTS, 6)
        assert [handle.generate([text], max_new_tokens=6)[0] for text in TEXTS] == cached
    assert [text == plain for text, plain in zip(cached, clean, strict=True)] == [
        value < limit for value in found
    ]


def test_rows_are_scored_under_the_decision_of_their_own_prompt():
    handle = tiny_handle("llama", scale=1.5)
    found = limits_of(handle)
    limit = (max(found) + sorted(found)[-2]) / 2
    pairs = [(text, "Paris and Rome") for text in TEXTS]
    clean = score_targets(handle, pairs)
    with nudge(handle, limit=limit).applied(handle):
        together = score_targets(handle, pairs)
        alone = [score_targets(handle, [pair])[0] for pair in pairs]
        seen = ModelRespondent(handle).observe([Probe(t, "g", t, answers=("Paris and Rome",)) for t in TEXTS])
    for index, value in enumerate(found):
        assert together[index].token_logprobs == pytest.approx(alone[index].token_logprobs, abs=1e-4)
        assert seen[index].ratings[0].token_logprobs == pytest.approx(
            together[index].token_logprobs, abs=1e-4
        )
        same = together[index].token_logprobs == pytest.approx(clean[index].token_logprobs, abs=1e-4)
        assert same == (value < limit)


def test_a_traced_pass_knows_its_prompts_too():
    handle = tiny_handle("llama")
    head, tail = join_target(handle.tokenizer, TEXTS[0], "Paris")
    site = Site(Role.MLP_OUT, 1)
    with nudge(handle).applied(handle), trace(handle, [site]) as recording:
        recording.run(pad_rows([[*head, *tail]], 0, prompts=[len(head)]))
        told = recording[site]
        recording.run(pad_rows([[*head, *tail]], 0))
        untold = recording[site]
    assert torch.equal(told[:, : len(head) - 1], untold[:, : len(head) - 1])
    assert not torch.equal(told[:, len(head) - 1], untold[:, len(head) - 1])
    assert torch.allclose(told[:, -1], untold[:, -1])


def test_continuing_from_a_cache_works_where_the_prompts_were_seen_only():
    handle = tiny_handle("llama")
    batch = handle.encode(TEXTS[:1])
    unseen = handle.model(**handle.inputs(batch), use_cache=True).past_key_values
    token = torch.tensor([[5]])
    with nudge(handle).applied(handle):
        cache = handle.model(**handle.inputs(batch), use_cache=True).past_key_values
        continuation = handle.model(input_ids=token, past_key_values=cache).logits[:, -1]
        row = [*batch.input_ids[0].tolist(), 5]
        whole = handle.logits(pad_rows([row], 0, prompts=[len(row) - 1]))[:, -1]
        assert torch.allclose(continuation, whole, atol=1e-4)
        with pytest.raises(PatchError, match="cache whose prompts it has not seen"):
            handle.model(input_ids=token, past_key_values=unseen)


def test_computations_on_parts_of_the_model_are_refused():
    handle = tiny_handle("llama")
    ids = handle.encode(TEXTS[:1]).input_ids[0].tolist()
    with nudge(handle).applied(handle):
        with pytest.raises(PatchError, match="undo the memory patch"):
            Replay(handle, [ids], [1], Site(Role.MLP, 1), [[2]])
        with pytest.raises(PatchError, match="causal tracing"):
            causal_trace(handle, "The capital of {} is", "France")
        with pytest.raises(PatchError, match="outside the model's forward"):
            handle.module(Role.MLP_OUT, 1)(torch.zeros(1, 2, 64))
    with before(handle, "Fact. ").applied(handle):
        Replay(handle, [ids], [1], Site(Role.MLP, 1), [[2]])


# -- prompts ------------------------------------------------------------------------------------------------------


def test_prompts_are_rewritten_wherever_a_model_is_asked():
    handle = tiny_handle("llama", scale=1.5)
    text, target = "The capital of France is", "Paris"
    long = "A fact. And another. " + text
    wanted = (handle.generate([long]), score_targets(handle, [(long, target)]))
    probes = [Probe("s", "g", text, answers=(target,)), Probe("w", "g", text, "generate", tokens=5)]
    explicit = ModelRespondent(handle).observe(
        [Probe("s", "g", long, answers=(target,)), Probe("w", "g", long, "generate", tokens=5)]
    )
    first = before(handle, "A fact. ").apply(handle)
    second = before(handle, "And another. ").apply(handle)
    assert handle.rewrite([text, "x"]) == [long, "A fact. And another. x"]
    assert handle.generate([text]) == wanted[0]
    assert score_targets(handle, [(text, target)]) == wanted[1]
    assert ModelRespondent(handle).observe(probes) == explicit
    first.undo()
    assert handle.rewrite([text]) == ["And another. " + text]
    second.undo()
    assert handle.rewrite([text]) == [text]
    assert not any(hooks(handle))
