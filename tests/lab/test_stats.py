from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lab.arch import Role
from lab.errors import ConfigError, DataError, NumericalError
from lab.patch import LowRank, Provenance, WeightPatch
from lab.solve import emmet_factors, factorize, null_space, woodbury_factors, woodbury_update
from lab.sources import file_source, text_source
from lab.stats import Corpus, KeyStats, StatsCache, collect_key_stats, default_cache_dir, load_stats
from lab.trace import Site, trace
from tests.tiny import FAMILIES, tiny_handle

TEXTS = [
    f"The capital of {a} is {b}, and item {i} is a guitar."
    for i, (a, b) in enumerate([("France", "Paris"), ("Kenya", "Nairobi")] * 12)
]


def spread(size: int, condition: float, seed: int = 0) -> torch.Tensor:
    """A symmetric positive definite matrix of the wanted condition number."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (
        basis
        @ torch.diag(
            torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
        )
        @ basis.T
    )


def plain_moment(handle, layer: int, texts: list[str]) -> tuple[torch.Tensor, int]:
    site = Site(Role.MLP_OUT, layer, "in")
    keys = []
    with trace(handle, [site]) as recording:
        for text in texts:
            recording.run(handle.encode([text]))
            keys.append(recording[site][0].double())
    stacked = torch.cat(keys)
    return stacked.T @ stacked / len(stacked), len(stacked)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_over_all_layers_equals_one_text_at_a_time(family):
    fp64 = family not in ("gptj", "gemma2")
    handle = tiny_handle(family, dtype=torch.float64 if fp64 else torch.float32, scale=2.0)
    stats = collect_key_stats(handle, [0, 2], TEXTS, max_tokens=10_000, batch_tokens=100, held_out=0)
    for layer in (0, 2):
        moment, count = plain_moment(handle, layer, TEXTS)
        assert stats[layer].count == count
        error = (stats[layer].moment - moment).abs().max() / moment.abs().max()
        assert float(error) < (1e-12 if fp64 else 1e-5)
        assert torch.equal(stats[layer].moment, stats[layer].moment.T)


def test_the_budget_is_exact_and_the_batching_does_not_matter():
    handle = tiny_handle("llama", dtype=torch.float64)
    one = collect_key_stats(handle, [1], TEXTS, max_tokens=100, held_out=0)[1]
    assert one.count == 100
    long = collect_key_stats(handle, [1], ["word " * 500], max_tokens=50, max_length=20, held_out=0)[1]
    assert long.count == 20
    whole = collect_key_stats(handle, [1], TEXTS, max_tokens=10_000, batch_tokens=10_000)[1]
    rows = collect_key_stats(handle, [1], TEXTS, max_tokens=10_000, batch_tokens=10_000, held_out=0)[1]
    assert (
        whole.count == rows.count - 12
    )  # every second document of the one batch gives one key to the read-out


def test_upper_blocks_never_run():
    handle = tiny_handle("llama")

    def explode(*_args, **_kwargs):
        raise AssertionError("a block above the last tap was run")

    hook = handle.module(Role.BLOCK, 2).register_forward_pre_hook(explode)
    try:
        collect_key_stats(handle, [0, 1], TEXTS, max_tokens=100)
    finally:
        hook.remove()


def test_progress_and_convergence():
    handle = tiny_handle("gpt2", width=8)
    seen: list[tuple[int, int]] = []
    texts = [f"{i} {j} The capital of number {i * j} is guitar {i}" for i in range(20) for j in range(20)]
    stats = collect_key_stats(
        handle, [0], texts, max_tokens=4000, batch_tokens=400, progress=lambda *at: seen.append(at)
    )[0]
    assert seen[-1] == (4000, 4000)
    assert seen == sorted(seen)
    changes = [change for _, change in stats.convergence]
    assert [tokens for tokens, _ in stats.convergence][-1] == 4000
    assert len(changes) == 3
    assert 0 < changes[-1] < changes[0]


def test_statistics_are_of_the_pristine_model():
    handle = tiny_handle("llama", dtype=torch.float64)
    clean = collect_key_stats(handle, [1], TEXTS, max_tokens=200, held_out=0)[1]
    weight = handle.weight(Role.MLP_OUT, 0)
    patch = WeightPatch(
        handle.fingerprint,
        {weight.name: LowRank(torch.ones(weight.shape[0], 1), torch.ones(1, weight.shape[1]))},
        Provenance("test", {}, (), 0, {}, {}),
    )
    for mode in ("merge", "sidecar"):
        with patch.applied(handle, mode=mode):
            before = handle.weights_digest(), handle.state
            output = handle.logits(handle.encode(TEXTS[:1]))
            patched = collect_key_stats(handle, [1], TEXTS, max_tokens=200, held_out=0)[1]
            assert torch.equal(patched.moment, clean.moment)
            assert (handle.weights_digest(), handle.state) == before
            assert torch.equal(handle.logits(handle.encode(TEXTS[:1])), output)
        assert handle.state == handle.fingerprint


def test_bad_input_is_refused():
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError):
        collect_key_stats(handle, [], TEXTS, max_tokens=10)
    with pytest.raises(DataError, match="no token"):
        collect_key_stats(handle, [0], [], max_tokens=10)
    torch.nn.init.constant_(handle.model.get_parameter("model.embed_tokens.weight"), float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        collect_key_stats(handle, [0], TEXTS, max_tokens=10)


# -- solves ---------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 24), st.integers(1, 30), st.floats(0.1, 1e5), st.integers(0, 1000))
def test_woodbury_equals_the_dense_formula(size, edits, weight, seed):
    generator = torch.Generator().manual_seed(seed)
    moment = spread(size, 1e6, seed)
    keys = torch.randn(size, edits, generator=generator, dtype=torch.float64)
    residuals = torch.randn(7, edits, generator=generator, dtype=torch.float64)
    left, right = woodbury_factors(factorize(moment, weight), keys, residuals)
    dense = torch.linalg.solve(weight * moment + keys @ keys.T, keys @ residuals.T).T
    assert torch.allclose(left @ right, dense, rtol=1e-7, atol=1e-8 * float(dense.abs().max()))


def test_limits_of_the_weight_and_of_mu():
    generator = torch.Generator().manual_seed(0)
    moment = spread(16, 1e4)
    keys = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    residuals = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    stats = KeyStats(0, 100, moment, "test")
    left, right = woodbury_factors(stats.factor(1e12), keys, residuals)
    assert float((left @ right).norm()) < 1e-6
    left, right = woodbury_factors(stats.factor(1e-10), keys, residuals)
    assert torch.allclose(left @ right @ keys, residuals, atol=1e-6)
    left, right = emmet_factors(stats.factor(3.0), keys, residuals, mu=0.0)
    assert torch.allclose(left @ right @ keys, residuals, atol=1e-9)
    update = woodbury_update(stats.factor(2.0), keys, residuals)
    assert update.shape == (9, 16)
    assert update.rank == 5


def test_the_factor_is_made_once_and_serves_every_weight():
    stats = KeyStats(0, 100, spread(12, 100.0), "test")
    one, two = stats.factor(1.0), stats.factor(4.0)
    assert one.cholesky is two.cholesky
    vector = torch.arange(12.0)
    assert torch.allclose(one.solve(vector), torch.linalg.solve(stats.moment, vector.double()), atol=1e-10)
    assert torch.allclose(one.solve(vector) / 4, two.solve(vector), atol=1e-12)
    assert one.ridge == 0.0
    with pytest.raises(ConfigError, match="positive"):
        stats.factor(0.0)
    with pytest.raises(ConfigError, match="width"):
        one.solve(torch.ones(3))


def test_a_singular_moment_gets_the_smallest_ridge_that_works():
    keys = torch.randn(16, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moment = keys @ keys.T / 5
    factor = factorize(moment)
    assert factor.relative_ridge == pytest.approx(1e-10)
    assert factor.ridge == pytest.approx(1e-10 * float(moment.diagonal().mean()))
    rebuilt = factor.cholesky @ factor.cholesky.T
    assert torch.allclose(rebuilt, moment + factor.ridge * torch.eye(16, dtype=torch.float64), atol=1e-12)
    with pytest.raises(NumericalError, match="zero"):
        factorize(torch.zeros(3, 3))
    with pytest.raises(NumericalError):
        factorize(-torch.eye(3) + 2 * torch.ones(3, 3))
    with pytest.raises(NumericalError, match="singular"):
        emmet_factors(factorize(torch.eye(4)), torch.ones(4, 2), torch.ones(2, 2), mu=0.0)


@pytest.mark.parametrize("rank", [1, 3, 8, 15])
def test_the_projector_keeps_the_smaller_block_and_equals_the_dense_one(rank):
    moment = spread(16, 1e5, seed=rank)
    values, vectors = torch.linalg.eigh(moment)
    threshold = float((values[rank - 1] + values[rank]) / 2)
    projector = null_space(moment, threshold)
    assert projector.rank == rank
    assert projector.basis.shape[1] == min(rank, 16 - rank)
    dense = vectors[:, :rank] @ vectors[:, :rank].T
    assert torch.allclose(projector.dense(), dense, atol=1e-12)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    once = projector.apply(vector)
    assert torch.allclose(projector.apply(once), once, atol=1e-12)


def test_a_projector_that_keeps_nothing_or_everything_is_refused():
    moment = spread(8, 100.0)
    for threshold in (1e-9, 10.0):
        with pytest.raises(ConfigError, match="directions"):
            null_space(moment, threshold)


# -- cache ----------------------------------------------------------------------------------------------------------


def corpus_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    return path


def test_the_cache_answers_from_disk_and_computes_only_what_is_missing(tmp_path, monkeypatch):
    handle = tiny_handle("llama")
    corpus = Corpus(str(corpus_file(tmp_path)), max_tokens=200)
    first = StatsCache(tmp_path / "cache").get(handle, [0, 2], corpus)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    asked: list[list[int]] = []

    def spy(handle, layers, *args, **kwargs):
        asked.append(list(layers))
        return collect_key_stats(handle, layers, *args, **kwargs)

    monkeypatch.setattr("lab.stats.collect_key_stats", spy)
    cache = StatsCache(tmp_path / "cache")
    second = cache.get(handle, [2, 0, 1], corpus)
    assert asked == [[1]]
    assert torch.equal(first[2].moment, second[2].moment)
    assert (first[2].count, first[2].source, first[2].convergence) == (
        second[2].count,
        second[2].source,
        second[2].convergence,
    )
    assert cache.get(handle, [2], corpus)[2] is second[2]


def test_the_key_depends_on_model_text_and_budget(tmp_path):
    path = corpus_file(tmp_path)
    handle, other = tiny_handle("llama"), tiny_handle("llama", seed=1)
    source = file_source(path)
    keys = {
        StatsCache.key(handle, 0, source, 100, 1024),
        StatsCache.key(other, 0, source, 100, 1024),
        StatsCache.key(handle, 1, source, 100, 1024),
        StatsCache.key(handle, 0, source, 101, 1024),
        StatsCache.key(handle, 0, source, 100, 512),
    }
    path.write_text("another text", encoding="utf-8")
    keys.add(StatsCache.key(handle, 0, file_source(path), 100, 1024))
    assert len(keys) == 6


def damage_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 0xFF
    path.write_bytes(bytes(data))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def foreign(path: Path) -> None:
    save_file({"moment": torch.eye(4)}, path)


def of_another_key(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        meta = json.loads(file.metadata()["knowlab"])
    meta["key"] = "0" * 64
    save_file(load_file(path), path, metadata={"knowlab": json.dumps(meta)})


@pytest.mark.parametrize(
    "harm, message",
    [
        (damage_bytes, "checksum"),
        (cut_short, "readable"),
        (foreign, "not a key statistics"),
        (of_another_key, "another model"),
    ],
)
def test_damaged_and_foreign_files_are_refused_and_replaced(tmp_path, harm, message):
    handle = tiny_handle("gpt2")
    corpus = Corpus(str(corpus_file(tmp_path)), max_tokens=150)
    good = StatsCache(tmp_path / "cache").get(handle, [0], corpus)[0]
    [path] = (tmp_path / "cache").iterdir()
    key = path.stem
    harm(path)
    with pytest.raises(DataError, match=message):
        load_stats(path, key)
    with pytest.warns(UserWarning, match=message):
        again = StatsCache(tmp_path / "cache").get(handle, [0], corpus)[0]
    assert torch.equal(good.moment, again.moment)
    assert torch.equal(load_stats(path, key).moment, good.moment)


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    handle = tiny_handle("gpt2")

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lab.stats.save_file", full)
    with pytest.raises(OSError, match="No space"):
        StatsCache(tmp_path / "cache").get(handle, [0], Corpus(str(corpus_file(tmp_path)), max_tokens=50))
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KNOWLAB_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    assert StatsCache().folder == tmp_path / "stats"
    monkeypatch.delenv("KNOWLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir().name == "knowlab" or default_cache_dir().parent.name == "knowlab"


# -- text sources ---------------------------------------------------------------------------------------------------


def test_plain_files_and_rows(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("one\n\ntwo a\ntwo b\n\n\nthree\n", encoding="utf-8")
    assert sorted(text.strip() for text in text_source(str(lines)).texts()) == [
        "one",
        "three",
        "two a\ntwo b",
    ]
    lines.write_text("one\ntwo\r\n", encoding="utf-8")
    source = text_source(str(lines))
    assert sorted(source.texts()) == ["one", "two"]
    assert list(source.texts()) == list(source.texts())
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert sorted(text_source(str(rows)).texts()) == ["one", "two"]
    rows.write_text('{"text": "one"}\n{"body": "two"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        text_source(str(rows))
    with pytest.raises(DataError, match="no such text file"):
        text_source(str(tmp_path / "absent.txt"))
    lines.write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="holds no text"):
        text_source(str(lines))


def test_data_sets_are_read_from_a_local_folder_and_absence_is_loud(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        '{"id": "a", "text": "one"}\n{"id": "b", "text": "two"}\n', encoding="utf-8"
    )
    source = text_source(f"hub:{folder}::train")
    assert sorted(source.texts()) == ["one", "two"]
    assert source.id.startswith("hub:world@")
    with pytest.raises(DataError, match="no such data set folder"):
        text_source("hub:./absent")
    with pytest.raises(DataError, match="Offline"):
        text_source("hub:nobody/nothing-of-this-name")
    with pytest.raises(ConfigError):
        text_source("hub:")


def test_auto_prefers_the_models_own_corpus_and_warns_for_strangers(tmp_path):
    handle = tiny_handle("llama")
    with pytest.raises(ConfigError, match="auto"):
        text_source("auto")
    source = text_source("auto", handle)
    assert "stands in" in source.warning
    handle.folder = tmp_path
    (tmp_path / "corpus.txt").write_text("my own text", encoding="utf-8")
    own = text_source("auto", handle)
    assert own.warning == ""
    assert list(own.texts()) == ["my own text"]


def test_the_builtin_text_is_recorded_with_its_warning(tmp_path):
    handle = tiny_handle("llama")
    with pytest.warns(UserWarning, match="stands in"):
        stats = StatsCache(tmp_path).get(handle, [0], Corpus(max_tokens=300))[0]
    assert "stands in" in stats.warning
    assert stats.source.startswith("atlas@")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = StatsCache(tmp_path).get(handle, [0], Corpus("atlas", max_tokens=300))[0]
    assert quiet.warning == ""
    assert torch.equal(quiet.moment, stats.moment)


def test_documents_longer_than_the_context_are_cut_there():
    handle = tiny_handle("gpt2")
    context = handle.config.max_position_embeddings
    stats = collect_key_stats(handle, [0], [" ".join(TEXTS)] * 2, max_tokens=10_000, held_out=0)
    assert stats[0].count == 2 * context
