"""GRACE: the rules of the codebook, the value search, and decisions that hold for a whole decoding."""

from __future__ import annotations

import pytest
import torch

from editors import get_editor
from editors.codebook import Codebook, GraceMemory
from editors.grace import GraceConfig, ValueSearch
from editors.rows import request_rows
from lab.arch import Role
from lab.errors import ConfigError, PatchError
from lab.eval import SuiteOptions, atlas_cases, evaluate_editing, get_suite
from lab.memory import memories_of
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.tokens import pad_rows
from lab.trace import Site, trace
from tests.tiny import tiny_handle

FRANCE = EditRequest("france", "The capital of {} is", "France", "Rome")
OBAMA = EditRequest("obama", "{}'s wife is", "Barack Obama", "Marie Curie")
KENYA = EditRequest("kenya", "The capital of {} is", "Kenya", "Rome")
QUICK = {"layers": (1,), "steps": 6, "epsilon": 0.1}
TEXTS = [FRANCE.text, "Toko Yasuda plays", OBAMA.text]


def point(*coordinates):
    return torch.tensor(coordinates, dtype=torch.float64)


def book_of(*edits):
    """A codebook from edits ``(key, label, epsilon)``, and the key that each edit's value went to."""
    book, slots = Codebook(torch.zeros(0, 2, dtype=torch.float64)), []
    for entry, (key, label, epsilon) in enumerate(edits):
        book, slot = book.with_edit(point(*key), label, epsilon, entry)
        slots.append(slot)
    return book, slots


def logits(handle, texts=TEXTS):
    return handle.logits(handle.encode(texts))


def target(handle, request=FRANCE):
    return score_targets(handle, [(request.text, request.target_new)])[0].mean_logprob


# -- the codebook -------------------------------------------------------------------------------------------------


def test_distant_edits_get_keys_of_their_own():
    book, slots = book_of(((0, 0), (1,), 1.0), ((5, 0), (1,), 1.0))
    assert (book.radii, slots, book.source) == ((1.0, 1.0), [0, 1], (0, 1))


def test_near_edits_with_different_targets_split_the_space_between_them():
    book, slots = book_of(((0, 0), (1,), 1.0), ((1.6, 0), (2,), 1.0))
    assert slots == [0, 1]
    assert book.radii == pytest.approx((0.8 - 1e-5, 0.8))
    assert book.nearest(torch.stack([point(0.7, 0), point(0.9, 0), point(-1, 0)])).tolist() == [0, 1, -1]


def test_near_edits_with_the_same_target_share_a_key_that_covers_both():
    book, slots = book_of(((0, 0), (1, 2), 1.0), ((1.6, 0), (1, 2), 1.0), ((0.5, 0), (1, 2), 1.0))
    assert slots == [0, 0, 0]
    assert book.radii == pytest.approx((1.6,))
    # The value searched last is the one that answers.
    assert book.source == (2,)


def test_targets_are_compared_token_by_token_and_with_their_own_keys():
    # Equal means of token ids, and a label that released code would look up at another key, after two edits.
    book, slots = book_of(((0, 0), (1, 4), 1.0), ((1.5, 0), (2, 3), 1.0))
    assert slots == [0, 1]
    edits = (((0, 0), (1,), 1.0), ((10, 0), (2,), 1.0), ((20, 0), (3,), 1.0), ((20.5, 0), (3,), 1.0))
    book, slots = book_of(*edits)
    assert slots == [0, 1, 2, 2]
    assert book.radii == pytest.approx((1.0, 1.0, 1.0))


def test_the_same_prompt_edited_again_takes_the_later_target():
    book, slots = book_of(((3, 4), (1,), 1.0), ((3, 4), (2,), 1.0))
    assert (slots, book.labels, book.source, book.radii) == ([0, 0], ((2,),), (1,), (1.0,))


def test_queries_are_answered_row_by_row_up_to_the_radius():
    book, _ = book_of(((0, 0), (1,), 1.0), ((10, 0), (2,), 0.5))
    queries = torch.stack([point(1, 0), point(1.001, 0), point(10, 0.5), point(4, 0)])
    assert book.nearest(queries).tolist() == [0, -1, 1, -1]


# -- the search ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_gradients_of_the_value_search_are_those_of_finite_differences(replacement):
    handle = tiny_handle("gpt2", dtype=torch.float64, scale=1.5)
    rows = [request_rows(handle, request, ["{}"], "last")[0] for request in (FRANCE, OBAMA)]
    site = Site(Role.MLP_OUT, 1)
    search = ValueSearch(handle, rows, replacement)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2, handle.hidden_size, generator=generator, dtype=torch.float64).requires_grad_()
    with trace(handle, writes={site: search.write}, detach=False) as recording:
        losses = search.losses(recording, values)
        (gradient,) = torch.autograd.grad(losses.sum(), values)
        for row, column in ((0, 3), (1, 17)):
            step = torch.zeros_like(values)
            step[row, column] = 1e-5
            with torch.no_grad():
                up, down = (search.losses(recording, values + sign * step) for sign in (1, -1))
            slope = (up - down) / 2e-5
            assert float(slope[row]) == pytest.approx(float(gradient[row, column]), rel=1e-6)
            # Rows do not see each other's values.
            assert float(slope[1 - row]) == 0.0
    assert float(gradient.abs().min()) > 0


def test_the_loss_of_the_search_is_the_score_of_the_patched_model():
    handle = tiny_handle("llama", scale=1.5)
    patch = get_editor("grace", **QUICK, stop_below=0.0).edit(handle, [FRANCE])
    rows = request_rows(handle, FRANCE, ["{}"], "last")
    search = ValueSearch(handle, rows, "last")
    with torch.no_grad(), trace(handle, writes={Site(Role.MLP_OUT, 1): search.write}) as recording:
        loss = float(search.losses(recording, patch.memory.values))
    with patch.applied(handle):
        assert target(handle) == pytest.approx(-loss, abs=1e-5)


def test_values_found_together_are_those_found_alone():
    handle = tiny_handle("gpt2", scale=1.5)
    editor = get_editor("grace", **QUICK)
    together = editor.edit_many(handle, [FRANCE, OBAMA])
    for patch, request in zip(together, (FRANCE, OBAMA), strict=True):
        alone = editor.edit(handle, [request])
        assert torch.allclose(patch.memory.keys, alone.memory.keys, atol=1e-5)
        assert torch.allclose(patch.memory.values, alone.memory.values, atol=1e-3)
        assert patch.provenance.requests == (request.to_json(),)
    both = editor.edit(handle, [FRANCE, OBAMA]).memory
    assert both.ids == ("france", "obama")
    assert torch.allclose(both.values, torch.cat([patch.memory.values for patch in together]), atol=1e-3)


def test_the_search_stops_when_its_loss_is_small():
    handle = tiny_handle("gpt2", scale=1.5)
    settings = {"layers": (1,), "steps": 12, "epsilon": 0.1}
    whole = get_editor("grace", **settings, stop_below=0.0).edit(handle, [FRANCE, OBAMA])
    first, second = (note["losses"] for note in whole.provenance.extra["values"])
    assert (len(first), len(second)) == (12, 12)
    limit = (first[6] + first[7]) / 2
    assert min(first[:7]) > limit > first[7]
    early = get_editor("grace", **settings, stop_below=limit).edit(handle, [FRANCE, OBAMA])
    note, other = early.provenance.extra["values"]
    assert note["losses"] == pytest.approx(first[:8], abs=1e-4)
    # A finished value stays where it is while the other one moves on.
    assert other["losses"] == pytest.approx(second, abs=1e-3)
    with early.applied(handle):
        assert target(handle) == pytest.approx(-first[7], abs=1e-3)


def test_a_warm_value_begins_at_the_projections_output():
    handle = tiny_handle("llama", scale=1.5)
    warm = get_editor("grace", layers=(1,), steps=1, lr=1e-6, init="warm", stop_below=0.0).edit(
        handle, [FRANCE]
    )
    clean = logits(handle, [FRANCE.text])
    with warm.applied(handle):
        assert torch.allclose(logits(handle, [FRANCE.text]), clean, atol=1e-3)
    cold = get_editor("grace", layers=(1,), steps=1, lr=1e-6, stop_below=0.0).edit(handle, [FRANCE])
    assert 0 <= float(cold.memory.values.min()) < float(cold.memory.values.max()) < 1


# -- patches ------------------------------------------------------------------------------------------------------


def test_patches_form_one_codebook_and_come_off_in_any_order():
    handle = tiny_handle("llama", scale=1.5)
    editor = get_editor("grace", **QUICK)
    first = editor.edit(handle, [FRANCE])
    entry = first.apply(handle)
    # The same prompt again, with another target: on top of the first, and alone.
    again = EditRequest("again", FRANCE.prompt, FRANCE.subject, "Tokyo")
    second = editor.edit(handle, [again])
    other = second.apply(handle)
    (joined,) = memories_of(handle, "grace", first.memory.group)
    assert joined.ids == ("france", "again")
    assert len(joined.codebook().radii) == 1
    assert target(handle, again) > -4
    patched = logits(handle)
    entry.undo()
    assert torch.equal(logits(handle), patched)
    other.undo()
    with first.applied(handle):
        assert target(handle) > target(handle, again)


def test_two_edits_with_one_target_are_told_apart_when_one_is_undone():
    handle = tiny_handle("llama", scale=1.5)
    editor = get_editor("grace", **QUICK)
    clean = logits(handle)
    both = [editor.edit(handle, [request]) for request in (FRANCE, KENYA)]
    entries = [patch.apply(handle) for patch in both]
    before = target(handle, KENYA)
    entries[0].undo()
    assert torch.equal(logits(handle), clean)
    assert target(handle, KENYA) == pytest.approx(before, abs=1e-5)


def test_near_prompts_with_one_target_share_a_value_that_is_searched_on():
    handle = tiny_handle("llama", scale=1.5)
    patch = get_editor("grace", layers=(1,), steps=10, epsilon=30.0).edit(handle, [FRANCE, KENYA])
    book = patch.memory.codebook()
    assert book.source == (1,)
    first, second = patch.provenance.extra["values"]
    assert (first["goes_on"], second["goes_on"]) == (False, True)
    assert second["losses"][0] != first["losses"][0]
    with patch.applied(handle):
        assert target(handle, KENYA) > -second["losses"][0]
    # The same over two patches: the second search begins at the value that is applied.
    editor = get_editor("grace", layers=(1,), steps=10, epsilon=30.0)
    one = editor.edit(handle, [FRANCE])
    with one.applied(handle):
        two = editor.edit(handle, [KENYA])
    assert two.provenance.extra["values"][0]["losses"] == pytest.approx(second["losses"], abs=1e-3)


def test_a_suite_edits_in_sequence_and_leaves_the_model_alone():
    handle = tiny_handle("llama", scale=1.5)
    suite = get_suite("atlas", SuiteOptions(fluency=False))
    cases, state = atlas_cases(split="dev"), handle.state
    report = evaluate_editing(
        suite, handle, get_editor("grace", **QUICK), cases, limit=2, protocol="sequential", name="grace"
    )
    assert handle.state == state
    # Each case is answered from the codebook of both, and its neighbours are not touched.
    assert all(row.p_after > 1.5 * row.p_before for row in report.cases)
    assert report.metrics["neighborhood"].mean == report.before["neighborhood"].mean


def test_a_decision_at_the_prompt_holds_for_the_whole_decoding():
    handle = tiny_handle("gpt2", scale=1.5)
    for replacement in ("last", "prompt", "all"):
        patch = get_editor("grace", **QUICK, replacement=replacement).edit(handle, [FRANCE, OBAMA])
        clean = handle.generate(TEXTS, max_new_tokens=5)
        with patch.applied(handle):
            cached = handle.generate(TEXTS, max_new_tokens=5)
            alone = [handle.generate([text], max_new_tokens=5)[0] for text in TEXTS]
            rows = [handle.encode([text]).input_ids[0].tolist() for text in TEXTS]
            lengths = [len(row) for row in rows]
            for _ in range(5):
                batch = pad_rows(rows, handle.pad_id, prompts=lengths)
                found = handle.logits(batch)[torch.arange(len(rows)), batch.last].argmax(-1).tolist()
                rows = [[*row, token] for row, token in zip(rows, found, strict=True)]
        uncached = [handle.decode(row[length:]) for row, length in zip(rows, lengths, strict=True)]
        assert cached == uncached == alone
        assert [text == plain for text, plain in zip(cached, clean, strict=True)] == [False, True, False]


@pytest.mark.parametrize("replacement", ["last", "prompt", "all"])
def test_the_value_stands_at_the_chosen_tokens(replacement):
    handle = tiny_handle("opt", scale=1.5)
    patch = get_editor("grace", **QUICK, replacement=replacement).edit(handle, [FRANCE])
    ids = handle.encode([FRANCE.text]).input_ids[0].tolist()
    batch = pad_rows([[*ids, 7, 8], ids], handle.pad_id, prompts=[len(ids)] * 2)
    site = Site(Role.MLP_OUT, 1)
    with patch.applied(handle), trace(handle, [site]) as recording:
        recording.run(batch)
        held = (recording[site] - patch.memory.values[0]).abs().amax(-1) < 1e-5
    last = len(ids) - 1
    expected = {"last": [last], "prompt": range(last + 1), "all": range(last + 3)}[replacement]
    assert held[0].nonzero()[:, 0].tolist() == list(expected)
    assert held[1].nonzero()[:, 0].tolist() == [place for place in expected if place <= last]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_first_projection_of_an_mlp_can_carry_the_codebook(family):
    handle = tiny_handle(family, scale=1.5)
    before, clean = target(handle), logits(handle)
    patch = get_editor("grace", **QUICK, projection="mlp_in").edit(handle, [FRANCE])
    assert patch.memory.keys.shape == (1, handle.hidden_size)
    assert patch.memory.values.shape[1] == handle.weight(Role.MLP_IN, 1).shape[0]
    with patch.applied(handle):
        assert target(handle) > before
        assert torch.equal(logits(handle)[1], clean[1])


def test_half_precision_models_keep_keys_and_values_in_fp32():
    handle = tiny_handle("llama", dtype=torch.bfloat16, scale=1.5)
    before = target(handle)
    patch = get_editor("grace", **QUICK).edit(handle, [FRANCE])
    assert patch.memory.keys.dtype == patch.memory.values.dtype == torch.float32
    with patch.applied(handle):
        assert target(handle) > before + 0.5


def test_settings_that_make_no_sense():
    handle = tiny_handle("llama")
    for wrong, match in (
        ({"layers": (0, 1)}, "one layer"),
        ({"layers": (7,)}, "do not all exist"),
        ({"projection": "attn"}, "mlp_in or mlp_out"),
        ({"replacement": "first"}, "last, prompt or all"),
        ({"init": "hot"}, "cold or warm"),
        ({"epsilon": 0.0}, "epsilon must be positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            get_editor("grace", **{**QUICK, **wrong}).edit(handle, [FRANCE])
    with pytest.raises(ValueError, match="differ in number"):
        GraceMemory(1, "mlp_out", "last", torch.zeros(1, 2), torch.zeros(2, 2), ("a",), ((1,),), (1.0,))
    assert GraceConfig().steps == 100


def test_decoding_notices_that_patches_changed_under_it():
    handle = tiny_handle("llama", scale=1.5)
    one, two = get_editor("grace", **QUICK).edit_many(handle, [FRANCE, OBAMA])
    with one.applied(handle):
        cache = handle.model(**handle.inputs(handle.encode([FRANCE.text])), use_cache=True).past_key_values
        with two.applied(handle), pytest.raises(PatchError, match="middle of a decoding"):
            handle.model(input_ids=torch.tensor([[5]]), past_key_values=cache)
