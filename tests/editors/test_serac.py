from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from editors import get_editor
from editors.lessons import atlas_lessons, divide
from editors.serac import load_serac, train_serac
from editors.serac_learners import CounterfactualLearner, SeracConfig
from editors.serac_memory import Entry, Scope, SeracMemory, above, header
from lab.errors import BaseMismatchError, ConfigError, DataError, PatchError, PatchFormatError
from lab.memory import MemoryPatch
from lab.patch import LowRank, Provenance, WeightPatch
from lab.records import EditRequest
from lab.scoring import score_targets
from lab.tokens import pad_rows
from tests.fakes import WordEmbedder
from tests.lessons import small_lessons
from tests.tiny import tiny_handle

FRANCE = EditRequest("a", "The capital of {} is", "France", "Rome")
PERU = EditRequest("b", "The capital of {} is", "Peru", "Tokyo")
FAR = "Marie Curie plays the guitar, and"
QUICK = {
    "embedder": "words", "modules": "mlp", "lr": 0.005, "steps": 20, "lessons_per_step": 2, "eval_every": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return WordEmbedder()


@pytest.fixture(scope="module")
def network(tmp_path_factory, encoder):
    folder = tmp_path_factory.mktemp("serac") / "net"
    train_serac(tiny_handle("llama"), small_lessons(), folder, settings=QUICK, encoder=encoder)
    return folder


def editor_of(network, encoder):
    return get_editor("serac", network=str(network), encoder=encoder)


# -- the classifier -----------------------------------------------------------------------------------------------


def test_similarity_is_the_exponential_of_the_mapped_squared_distance():
    draw = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(3, 4, generator=draw), torch.randn(2, 4, generator=draw)
    scope = Scope(torch.randn(4, 4, generator=draw), torch.tensor(0.3))
    found = scope.log_similarity(queries, keys).exp()
    for row in range(3):
        for column in range(2):
            gap = scope.map @ queries[row] - scope.map @ keys[column]
            assert float(found[row, column]) == pytest.approx(
                math.exp(-math.exp(0.3) * float(gap @ gap)), rel=1e-4
            )


def test_before_training_the_border_is_a_cosine_of_three_quarters():
    key = torch.tensor([[1.0, 0.0]])
    for cosine, inside in ((0.76, True), (0.74, False)):
        query = torch.tensor([[cosine, math.sqrt(1 - cosine**2)]])
        assert (float(Scope.start(2).log_similarity(query, key).exp()) > 0.5) is inside


def test_training_on_real_sentences_takes_wordings_in_and_leaves_neighbours_out(tmp_path):
    from lab.embeddings import Embedder

    chosen = [
        lesson for lesson in atlas_lessons(draws=1) if lesson.request.id.startswith(("capital/", "currency/"))
    ]
    lessons = [replace(each, wordings=each.wordings[::4], locality=each.locality[:4]) for each in chosen[:40]]
    handle = tiny_handle("llama", width=16, layers=1)
    settings = {"steps": 60, "eval_every": 20, "lessons_per_step": 8, "modules": "mlp", "rank": 1}
    card = train_serac(handle, lessons, tmp_path / "net", settings=settings, encoder=Embedder()).card
    assert card["config"]["embedder"] == "minilm"
    run = card["training"]["scope"]
    before, best = (
        run["history"][0],
        next(each for each in run["history"] if each["step"] == run["best_step"]),
    )
    assert best["loss"] < 0.7 * before["loss"]
    assert best["inside"] > 0.8
    assert best["outside"] > 0.8


# -- the memory ---------------------------------------------------------------------------------------------------


def test_a_prompt_in_scope_is_asked_with_its_edit_above_and_others_as_they_are(network, encoder):
    handle = tiny_handle("llama")
    patch = editor_of(network, encoder).edit(handle, [FRANCE, PERU])
    assert isinstance(patch, MemoryPatch)
    prompts = [FRANCE.text, FAR, PERU.text]
    with patch.applied(handle):
        fed = handle.rewrite(prompts)
        alone = score_targets(handle, [(FAR, "Paris")])[0].mean_logprob
    assert fed == [
        "New fact: The capital of France is Rome.\nThe capital of France is",
        FAR,
        "New fact: The capital of Peru is Tokyo.\nThe capital of Peru is",
    ]
    assert alone == score_targets(handle, [(FAR, "Paris")])[0].mean_logprob
    assert handle.rewrite(prompts) == prompts


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_rows_with_an_edit_are_the_counterfactual_models_and_the_others_the_bases_to_the_bit(family, encoder):
    handle = tiny_handle(family)
    name = handle.weight("mlp_out", 1).name
    shape = handle.weight("mlp_out", 1).shape
    draw = torch.Generator().manual_seed(0)
    delta = LowRank(torch.randn(shape[0], 2, generator=draw), torch.randn(2, shape[1], generator=draw))
    entry = Entry("a", FRANCE.text, "The capital of France is Rome")
    memory = SeracMemory(
        (entry,), torch.from_numpy(encoder.encode([entry.prompt])), Scope.start(64), {name: delta}, 0.5, "n",
        "words", encoder,
    )  # fmt: skip
    texts = [
        above(entry.statement, FRANCE.text),
        FRANCE.text,
        above("The capital of Peru is Tokyo", FRANCE.text),
    ]
    batch = handle.encode(texts)
    plain = handle.logits(batch)
    with WeightPatch(handle.fingerprint, {name: delta}, Provenance("by hand")).applied(
        handle, mode="sidecar"
    ):
        adapted = handle.logits(batch)
    with MemoryPatch(handle.fingerprint, memory, Provenance("serac")).applied(handle):
        routed = handle.logits(batch)
    real = batch.attention_mask.bool()
    assert torch.allclose(routed[0][real[0]], adapted[0][real[0]], atol=1e-5)
    assert not torch.allclose(routed[0][real[0]], plain[0][real[0]], atol=1e-2)
    assert torch.equal(routed[1:], plain[1:])
    assert torch.equal(handle.logits(batch), plain)


def test_generation_with_a_cache_gives_what_full_passes_give(network, encoder):
    handle = tiny_handle("llama")
    with editor_of(network, encoder).edit(handle, [FRANCE]).applied(handle):
        written = handle.generate([FRANCE.text, FAR], max_new_tokens=5)
        for prompt, text in zip([FRANCE.text, FAR], written, strict=True):
            (fed,) = handle.rewrite([prompt])
            ids = handle.encode([fed]).input_ids[0].tolist()
            start = len(ids)
            for _ in range(5):
                logits = handle.logits(pad_rows([ids], 0, prompts=[start]))
                ids.append(int(logits[0, -1].argmax()))
            assert handle.decode(ids[start:]) == text


def test_a_memory_that_comes_in_the_middle_of_a_decoding_is_refused(network, encoder):
    handle = tiny_handle("llama")
    patch = editor_of(network, encoder).edit(handle, [FRANCE])
    ids = handle.encode([FRANCE.text]).input_ids
    with patch.applied(handle):
        cache = handle.model(input_ids=ids, use_cache=True).past_key_values
        with patch.applied(handle), pytest.raises(PatchError, match="middle of a decoding"):
            handle.model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)


def test_patches_share_one_memory_and_the_latest_edit_of_a_prompt_answers(network, encoder):
    handle = tiny_handle("llama")
    editor = editor_of(network, encoder)
    first = editor.edit(handle, [FRANCE])
    with first.applied(handle) as one:
        second = editor.edit(handle, [replace(FRANCE, id="c", target_new="Lima"), PERU])
        assert second.parents == (first.id,)
        with second.applied(handle):
            fed = handle.rewrite([FRANCE.text, PERU.text])
            assert fed[0].startswith(header("The capital of France is Lima"))
            assert fed[1].startswith(header("The capital of Peru is Tokyo"))
            one.undo()
            assert handle.rewrite([FRANCE.text])[0].startswith(header("The capital of France is Lima"))
        assert handle.rewrite([FRANCE.text]) == [FRANCE.text]
    with first.applied(handle):
        assert handle.rewrite([FRANCE.text])[0].startswith(header("The capital of France is Rome"))
        second.apply(handle).undo()
        assert handle.rewrite([FRANCE.text])[0].startswith(header("The capital of France is Rome"))


def test_a_saved_memory_routes_as_before(network, encoder, tmp_path, memory_kinds):
    handle = tiny_handle("llama")
    patch = editor_of(network, encoder).edit(handle, [FRANCE, PERU])
    again = MemoryPatch.load(patch.save(tmp_path / "patch"))
    assert again.id == patch.id
    memory = again.memory
    assert isinstance(memory, SeracMemory) and memory.embedder == "words"
    shared = replace(memory, encoder=encoder)
    assert shared.route([FRANCE.text, PERU.text, FAR]) == [0, 1, None]
    assert patch.memory.route([FRANCE.text, PERU.text, FAR]) == [0, 1, None]
    card = json.loads((tmp_path / "patch" / "patch.json").read_text())
    del card["settings"]["edits"]
    (tmp_path / "patch" / "patch.json").write_text(json.dumps(card))
    with pytest.raises(PatchFormatError):
        MemoryPatch.load(tmp_path / "patch")


def test_the_edit_is_likelier_where_it_applies(network, encoder):
    handle = tiny_handle("llama")
    pairs = [(FRANCE.text, "Rome"), (PERU.text, "Tokyo")]
    before = score_targets(handle, pairs)
    with editor_of(network, encoder).edit(handle, [FRANCE, PERU]).applied(handle):
        after = score_targets(handle, pairs)
    assert all(now.mean_logprob > then.mean_logprob + 0.5 for now, then in zip(after, before, strict=True))


# -- training -----------------------------------------------------------------------------------------------------


def test_training_lowers_both_losses_and_leaves_the_model_alone(tmp_path, encoder):
    handle = tiny_handle("gpt2")
    bits, modules = handle.weights_digest(), [name for name, _ in handle.model.named_modules()]
    told = []
    trained = train_serac(
        handle, small_lessons(), tmp_path / "net", settings=QUICK, encoder=encoder,
        progress=lambda *step: told.append(step),
    )  # fmt: skip
    assert handle.weights_digest() == bits
    assert [name for name, _ in handle.model.named_modules()] == modules
    for part in ("scope", "counterfactual"):
        run = trained.card["training"][part]
        assert min(each["loss"] for each in run["history"]) < 0.95 * run["history"][0]["loss"]
    last = {phase: (done, total) for phase, done, total in told}
    assert set(last) == {"embeddings", "scope", "counterfactual"}
    assert all(done == total for done, total in last.values())
    read = load_serac(tmp_path / "net", handle)
    with WeightPatch(handle.fingerprint, read.adapter, Provenance("x")).applied(handle, mode="sidecar"):
        learner = CounterfactualLearner(handle, SeracConfig(**QUICK))
        held = learner.validate(divide(small_lessons()).validation)["loss"]
    best = min(each["loss"] for each in trained.card["training"]["counterfactual"]["history"])
    assert held == pytest.approx(best, rel=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, encoder, network):
    handle = tiny_handle("llama")
    bits = handle.weights_digest()

    def stop(phase, done, total):
        if (phase, done) == ("counterfactual", 13):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_serac(handle, small_lessons(), tmp_path / "net", settings=QUICK, encoder=encoder, progress=stop)
    assert handle.weights_digest() == bits
    again = train_serac(handle, small_lessons(), tmp_path / "net", settings=QUICK, encoder=encoder)
    assert again.id == load_serac(network, handle).trained.id


def test_what_cannot_be_trained_or_used_is_refused(tmp_path, encoder, network):
    handle = tiny_handle("llama")
    with pytest.raises(DataError, match="second wording"):
        bare = [replace(lesson, wordings=()) for lesson in small_lessons()]
        train_serac(handle, bare, tmp_path / "net", settings=QUICK, encoder=encoder)
    with pytest.raises(ConfigError, match="minilm"):
        train_serac(
            handle,
            small_lessons(),
            tmp_path / "net",
            settings={**QUICK, "embedder": "minilm"},
            encoder=encoder,
        )
    for wrong in ({"threshold": 1.0}, {"negatives": 0}, {"treshold": 0.4}):
        with pytest.raises(ConfigError):
            train_serac(
                handle, small_lessons(), tmp_path / "net", settings={**QUICK, **wrong}, encoder=encoder
            )
    with pytest.raises(BaseMismatchError, match="train-editor serac"):
        editor_of(network, encoder).edit(tiny_handle("llama", seed=1), [FRANCE])
    with pytest.raises(ConfigError, match="train-editor serac"):
        get_editor("serac").edit(handle, [FRANCE])
