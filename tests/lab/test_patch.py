"""Weight patches: orientation, undo in any order, parents, files, half precision, PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lab.arch import Role
from lab.errors import (
    BaseMismatchError,
    ConfigError,
    MissingParentsError,
    NumericalError,
    OutputExistsError,
    PatchError,
    PatchFormatError,
)
from lab.handle import ModelHandle
from lab.patch import Carry, Delta, Dense, LowRank, Provenance, WeightPatch
from lab.peft_export import import_peft
from lab.stack import Mode
from tests.tiny import FAMILIES, tiny_handle

TEXTS = ["The capital of France is", "Marie Curie"]


def make_patch(
    handle: ModelHandle,
    seed: int,
    *,
    layer: int = 1,
    rank: int = 1,
    dense: bool = False,
    parents: tuple[str, ...] = (),
) -> WeightPatch:
    weight = handle.weight(Role.MLP_OUT, layer)
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(rows, rank, generator=generator),
        torch.randn(rank, columns, generator=generator),
    )
    delta: Delta = Dense(0.1 * left @ right) if dense else LowRank(0.1 * left, right)
    return WeightPatch(handle.fingerprint, {weight.name: delta}, Provenance("test", seed=seed), parents)


def logits(handle: ModelHandle) -> torch.Tensor:
    return handle.logits(handle.encode(TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_merge_and_sidecar_agree_and_undo_restores_every_bit(family: str) -> None:
    handle = tiny_handle(family)
    digest, clean = handle.weights_digest(), logits(handle)
    patch = make_patch(handle, 1, rank=2)
    with patch.applied(handle):
        merged = logits(handle)
        assert handle.state != handle.fingerprint
    with patch.applied(handle, "sidecar"):
        assert handle.weights_digest() == digest
        beside = logits(handle)
    assert torch.allclose(merged, beside, atol=1e-4)
    assert (merged - clean).abs().max() > 1e-2
    assert handle.weights_digest() == digest
    assert torch.equal(logits(handle), clean)
    assert handle.state == handle.fingerprint


def test_delta_is_added_in_canonical_orientation() -> None:
    # A square key space makes a wrong orientation invisible to a shape check.
    handle = tiny_handle("gpt2")
    weight = handle.weight(Role.MLP_OUT, 0)
    assert weight.transposed and isinstance(weight.parameter, nn.Parameter)
    before = weight.canonical().clone()
    patch = make_patch(handle, 3, layer=0)
    with patch.applied(handle):
        assert torch.allclose(weight.canonical() - before, patch.deltas[weight.name].dense(), atol=1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    modes=st.lists(st.sampled_from(["merge", "sidecar"]), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
)
def test_undo_in_any_order_restores_bits_and_state(modes: list[Mode], order) -> None:
    handle = tiny_handle("llama", layers=2)
    digest = handle.weights_digest()
    patches = [make_patch(handle, seed, dense=seed % 2 == 1) for seed in range(len(modes))]
    entries = [patch.apply(handle, mode) for patch, mode in zip(patches, modes, strict=True)]
    order.shuffle(entries)
    while entries:
        entries.pop().undo()
        kept = [entry for entry in handle.applied if entry.mode == "merge"]
        expected = tiny_handle("llama", layers=2)
        for entry in kept:
            entry.patch.apply(expected)
        assert handle.weights_digest() == expected.weights_digest()
    assert handle.weights_digest() == digest
    assert handle.state == handle.fingerprint


@pytest.mark.parametrize("modes", [[], ["merge"], ["sidecar"], ["merge", "sidecar", "merge"]])
def test_everything_is_undone_at_once(modes: list[Mode]) -> None:
    handle = tiny_handle("llama", layers=2)
    digest = handle.weights_digest()
    batch = handle.encode(["The capital of France is"])
    before = handle.logits(batch)
    patches = [make_patch(handle, seed) for seed in range(len(modes))]
    entries = [patch.apply(handle, mode) for patch, mode in zip(patches, modes, strict=True)]
    handle.undo_all()
    assert handle.weights_digest() == digest and handle.state == handle.fingerprint and handle.applied == ()
    assert torch.equal(handle.logits(batch), before)
    for entry in entries:
        with pytest.raises(PatchError, match="not applied"):
            entry.undo()
    # The handle goes on as a fresh one.
    for patch in patches:
        patch.apply(handle).undo()
    assert handle.weights_digest() == digest


def test_undoing_everything_keeps_what_others_wrote() -> None:
    handle = tiny_handle("llama", layers=2)
    patch = make_patch(handle, 1)
    patch.apply(handle)
    weight = handle.named_weight(next(iter(patch.deltas))).parameter
    with torch.no_grad():
        weight[0, 0] += 1
    written = handle.weights_digest()
    with pytest.raises(PatchError, match="behind the handle's back"):
        handle.undo_all()
    assert handle.weights_digest() == written and len(handle.applied) == 1


def test_fingerprint_stays_and_tells_models_apart() -> None:
    handle = tiny_handle("llama")
    base = handle.fingerprint
    fresh = tiny_handle("llama")
    make_patch(fresh, 1).apply(fresh)
    assert fresh.fingerprint == base
    assert tiny_handle("llama", seed=1).fingerprint != base
    assert tiny_handle("qwen2").fingerprint != base
    patched_first = tiny_handle("llama")
    patch = WeightPatch(base, make_patch(handle, 1).deltas, Provenance("test"))
    # The fingerprint is of the pristine bits even when it is first asked for under a patch.
    patched_first.stack.apply(patch, "merge", False)
    assert patched_first.fingerprint == base


def test_wrong_base_is_refused() -> None:
    one, other = tiny_handle("llama"), tiny_handle("llama", seed=5)
    digest = other.weights_digest()
    with pytest.raises(BaseMismatchError, match="made for base"):
        make_patch(one, 1).apply(other)
    assert other.weights_digest() == digest


def test_parents_must_be_applied_and_dependants_are_reported() -> None:
    handle = tiny_handle("llama")
    parent = make_patch(handle, 1)
    child = make_patch(handle, 2, parents=(parent.id,))
    with pytest.raises(MissingParentsError, match="allow_missing_parents"):
        child.apply(handle)
    assert handle.applied == ()
    child.apply(handle, allow_missing_parents=True).undo()
    first = parent.apply(handle)
    second = child.apply(handle)
    assert first.undo().stale == (child.id,)
    assert [entry.patch.id for entry in handle.applied] == [child.id]
    assert second.undo().stale == ()
    with pytest.raises(PatchError, match="not applied"):
        second.undo()


def test_applied_undoes_on_exceptions_and_tolerates_an_early_undo() -> None:
    handle = tiny_handle("llama")
    digest = handle.weights_digest()
    with pytest.raises(RuntimeError, match="boom"), make_patch(handle, 1).applied(handle):
        raise RuntimeError("boom")
    assert handle.weights_digest() == digest
    with make_patch(handle, 1).applied(handle) as entry:
        entry.undo()
    assert handle.weights_digest() == digest


def test_failed_apply_leaves_the_model_alone() -> None:
    handle = tiny_handle("llama", dtype=torch.float16)
    digest = handle.weights_digest()
    weight = handle.weight(Role.MLP_OUT, 0)
    huge = WeightPatch(
        handle.fingerprint, {weight.name: Dense(torch.full(weight.shape, 1e38))}, Provenance("test")
    )
    with pytest.raises(NumericalError), huge.scaled(2.0).applied(handle, "merge"):
        pass
    assert handle.weights_digest() == digest and handle.applied == ()
    odd = WeightPatch(handle.fingerprint, {weight.name: Dense(torch.zeros(3, 3))}, Provenance("test"))
    with pytest.raises(PatchError, match="shape"):
        odd.apply(handle)
    with pytest.raises(ConfigError, match="no parameter"):
        WeightPatch(handle.fingerprint, {"nowhere.weight": Dense(torch.zeros(1))}, Provenance("t")).apply(
            handle
        )
    with pytest.raises(ConfigError, match="mode"):
        make_patch(handle, 1).apply(handle, "besides")  # type: ignore[arg-type]
    embedding = handle.weight(Role.EMBED)
    delta = Dense(torch.ones(embedding.parameter.shape))
    with pytest.raises(PatchError, match="merge"):
        WeightPatch(handle.fingerprint, {embedding.name: delta}, Provenance("t")).apply(handle, "sidecar")
    assert handle.weights_digest() == digest and handle.applied == ()
    assert not handle.model.model.layers[0].mlp.down_proj._forward_hooks


def test_nan_never_becomes_a_patch() -> None:
    with pytest.raises(PatchError, match="NaN"):
        WeightPatch("base", {"w": Dense(torch.tensor([[float("nan")]]))}, Provenance("test"))


def test_writes_behind_the_back_are_noticed() -> None:
    handle = tiny_handle("llama")
    entry = make_patch(handle, 1).apply(handle)
    with torch.no_grad():
        handle.weight(Role.MLP_OUT, 1).parameter.add_(1.0)
    with pytest.raises(PatchError, match="behind the handle's back"):
        entry.undo()


def test_tied_weights_share_one_pristine_copy() -> None:
    handle = tiny_handle("gpt2")
    digest = handle.weights_digest()
    embedding, head = handle.weight(Role.EMBED), handle.weight(Role.UNEMBED)
    assert embedding.parameter is head.parameter
    ones = Dense(torch.ones(embedding.parameter.shape))
    first = WeightPatch(handle.fingerprint, {embedding.name: ones}, Provenance("t")).apply(handle)
    second = WeightPatch(handle.fingerprint, {head.name: ones}, Provenance("t")).apply(handle)
    first.undo()
    second.undo()
    assert handle.weights_digest() == digest


def test_sidecar_keeps_what_a_bf16_merge_rounds_away() -> None:
    handle = tiny_handle("llama", dtype=torch.bfloat16)
    patch = make_patch(handle, 1).scaled(1e-3)
    weight = handle.weight(Role.MLP_OUT, 1)
    before = weight.canonical().float().clone()
    wanted = patch.deltas[weight.name].dense()
    with patch.applied(handle, "merge"):
        realised = weight.canonical().float() - before
    assert (realised - wanted).norm() / wanted.norm() > 0.1
    with patch.applied(handle, "sidecar"):
        assert torch.equal(weight.canonical().float(), before)


def test_sum_and_scale() -> None:
    handle = tiny_handle("llama")
    one, two, full = make_patch(handle, 1), make_patch(handle, 2, rank=2), make_patch(handle, 4, dense=True)
    name = handle.weight(Role.MLP_OUT, 1).name
    both = one + two
    assert isinstance(both.deltas[name], LowRank) and both.rank == 3
    assert torch.allclose(
        both.deltas[name].dense(), one.deltas[name].dense() + two.deltas[name].dense(), atol=1e-6
    )
    assert isinstance((one + full).deltas[name], Dense)
    assert torch.allclose(two.scaled(-2.0).deltas[name].dense(), -2 * two.deltas[name].dense(), atol=1e-6)
    assert abs(two.deltas[name].norm() - float(two.deltas[name].dense().norm())) < 1e-4
    with pytest.raises(BaseMismatchError):
        one + make_patch(tiny_handle("llama", seed=9), 1)
    parent = make_patch(handle, 6)
    child = make_patch(handle, 7, parents=(parent.id,))
    assert (parent + child).parents == ()


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    handle = tiny_handle("llama")
    patch = make_patch(handle, 1, parents=("abc",)) + make_patch(handle, 2, layer=0, dense=True)
    folder = patch.save(tmp_path / "patch")
    again = WeightPatch.load(folder)
    assert again.id == patch.id and again.parents == patch.parents
    assert again.provenance.to_json() == json.loads(json.dumps(patch.provenance.to_json()))
    assert not [child for child in tmp_path.iterdir() if child.name.startswith(".")]
    with pytest.raises(OutputExistsError):
        patch.save(folder)
    patch.save(folder, overwrite=True)
    assert (folder / "patch.json").read_bytes() == (
        patch.save(tmp_path / "other") / "patch.json"
    ).read_bytes()


def test_what_is_carried_for_later_edits_is_saved_and_counts(tmp_path: Path) -> None:
    handle = tiny_handle("llama")
    bare = make_patch(handle, 1)
    keys = {"layer 1": torch.arange(6, dtype=torch.float64).reshape(3, 2) / 7, "count": torch.tensor([4.0])}
    patch = replace(bare, carry=(Carry("first", keys), Carry("second", {"mean": torch.ones(2)})))
    assert patch.id != bare.id
    assert patch.id != replace(bare, carry=patch.carry[:1]).id
    again = WeightPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    assert [each.kind for each in again.carry] == ["first", "second"]
    for saved, kept in zip(again.carry, patch.carry, strict=True):
        assert saved.tensors.keys() == kept.tensors.keys()
        for name, tensor in saved.tensors.items():
            assert tensor.dtype == kept.tensors[name].dtype
            assert torch.equal(tensor, kept.tensors[name])
    # Readers that know nothing of it must refuse such a patch, and go on reading the others.
    versions = [json.loads((folder / "patch.json").read_text())["format_version"]
                for folder in (tmp_path / "patch", bare.save(tmp_path / "bare"))]  # fmt: skip
    assert versions == [2, 1]
    other = replace(make_patch(handle, 2), carry=(Carry("third", {}),))
    assert [each.kind for each in (patch + other).carry] == ["first", "second", "third"]
    assert patch.scaled(-1.0).carry == patch.carry
    with pytest.raises(PatchError, match=r"'second'.*NaN"):
        Carry("second", {"mean": torch.tensor([float("nan")])})


def test_interrupted_save_leaves_the_old_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = tiny_handle("llama")
    folder = make_patch(handle, 1).save(tmp_path / "patch")
    old = WeightPatch.load(folder).id

    def full_disk(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lab.patch_files.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_patch(handle, 2).save(folder, overwrite=True)
    assert WeightPatch.load(folder).id == old
    with pytest.raises(OSError, match="No space left"):
        make_patch(handle, 2).save(tmp_path / "fresh")
    assert [child.name for child in tmp_path.iterdir()] == ["patch"]


def test_damaged_patches_are_refused(tmp_path: Path) -> None:
    handle = tiny_handle("llama")
    folder = make_patch(handle, 1).save(tmp_path / "patch")
    with pytest.raises(PatchFormatError, match=r"no patch\.json"):
        WeightPatch.load(tmp_path / "nowhere")
    card = json.loads((folder / "patch.json").read_text())
    (folder / "patch.json").write_text(json.dumps({**card, "base": "0" * 64}))
    with pytest.raises(PatchFormatError, match="changed after saving"):
        WeightPatch.load(folder)
    (folder / "patch.json").write_text(json.dumps({**card, "format_version": 99}))
    with pytest.raises(PatchFormatError, match="version"):
        WeightPatch.load(folder)
    (folder / "patch.json").write_text("{")
    with pytest.raises(PatchFormatError, match="not JSON"):
        WeightPatch.load(folder)
    (folder / "patch.json").write_text(json.dumps(card))
    raw = bytearray((folder / "patch.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "patch.safetensors").write_bytes(bytes(raw))
    with pytest.raises(PatchFormatError, match="damaged"):
        WeightPatch.load(folder)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "phi3"])
def test_peft_loads_the_export_with_equal_logits(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    handle = tiny_handle(family)
    patch = make_patch(handle, 1, rank=2) + make_patch(handle, 2, layer=0)
    with patch.applied(handle, "sidecar"):
        expected = logits(handle)
    export = patch.to_peft(tmp_path / "adapter", handle)
    assert set(export.relative_error.values()) == {0.0}
    fresh = tiny_handle(family)
    adapted = PeftModel.from_pretrained(fresh.model, str(export.path))
    batch = fresh.encode(TEXTS)
    found = adapted(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    real = batch.attention_mask.bool()
    assert torch.allclose(found[real], expected[real], atol=1e-4)
    assert import_peft(export.path, handle).deltas.keys() == patch.deltas.keys()
    with import_peft(export.path, handle).applied(handle, "sidecar"):
        assert torch.allclose(logits(handle), expected, atol=1e-5)


def test_dense_export_needs_a_rank_and_reports_the_error(tmp_path: Path) -> None:
    handle = tiny_handle("llama")
    patch = make_patch(handle, 1, rank=4, dense=True)
    with pytest.raises(PatchError, match="rank="):
        patch.to_peft(tmp_path / "none", handle)
    assert not (tmp_path / "none").exists()
    errors = [
        next(iter(patch.to_peft(tmp_path / str(rank), handle, rank=rank).relative_error.values()))
        for rank in (1, 2, 4)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_a_patch_on_top_of_many_leaves_the_bits_of_a_replay():
    """Applying adds to what is there; undoing replays from the pristine weights; both must give the same bits."""
    handle = tiny_handle("llama")
    weight = handle.weight(Role.MLP_OUT, 1)
    made = []
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        left, right = (
            torch.randn(*size, generator=draw) for size in ((weight.shape[0], 2), (2, weight.shape[1]))
        )
        made.append(WeightPatch(handle.fingerprint, {weight.name: LowRank(left, right)}, Provenance("made")))
    pristine = weight.parameter.detach().clone()
    first = [patch.apply(handle) for patch in made[:3]]
    grown = weight.parameter.detach().clone()
    expected = pristine.clone()
    for patch in made[:3]:
        expected += patch.deltas[weight.name].dense()
    assert torch.equal(grown, expected)
    with made[3].applied(handle, mode="sidecar"):
        assert torch.equal(weight.parameter, grown), "beside the weights, not in them"
    made[3].apply(handle).undo()
    assert torch.equal(weight.parameter, grown), "the replay has the same bits"
    for entry in first:
        entry.undo()
    assert torch.equal(weight.parameter, pristine)
