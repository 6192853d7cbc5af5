"""The index: what is read, what is written, what is found, and who may write."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lab.errors import BusyError, ConfigError
from rag.amend import annotate, replace_text, set_status
from rag.index import Index, open_index
from rag.index.words import WordRanking, diverse, fuse
from rag.store import Chunk, DocumentStore, MemoryStore, chunk_id, fits
from tests.rag.hashed import HashedWords


@pytest.fixture(params=["memory", "chroma"])
def store(request) -> DocumentStore:
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("index")


def chunk(text: str, source: str = "s", **fields) -> Chunk:
    return Chunk(fields.pop("id", chunk_id(source, text)), text, source, **fields)


class TestStores:
    def test_put_replaces_every_field(self, store):
        first = chunk(
            "Rome is old", trust="verified", note="n", extra={"tags": ("a", "b"), "year": 1, "gone": "x"}
        )
        store.put([first])
        second = replace(first, trust=None, note="", status="stale", extra={"tags": "c", "new": True})
        store.put([second])
        assert store.chunks() == [second]
        assert store.chunks(where={"gone": "x"}) == store.chunks(where={"tags": "a"}) == []
        store.put([first])
        assert store.chunks([first.id]) == [first]
        plain = replace(first, trust=None, note="")
        store.put([plain])
        assert store.chunks(where={"trust": None, "status": "live"}) == [plain]
        assert store.chunks(where={"trust": "verified"}) == store.chunks(where={"note": "n"}) == []

    def test_the_text_of_an_id_may_change(self, store):
        store.put([chunk("Rome is old", id="x"), chunk("Paris", id="y")])
        store.put([chunk("Berlin is young", id="x")])
        assert [found.chunk.text for found in store.search("Berlin young", 1)] == ["Berlin is young"]
        assert all("Rome" not in found.chunk.text for found in store.search("Rome", 5))

    def test_only_live_chunks_are_found(self, store):
        chunks = [chunk(f"Rome number {status}", status=status) for status in ("live", "stale", "blocked")]
        store.put(chunks)
        assert [found.chunk.status for found in store.search("Rome number", 5)] == ["live"]
        assert {
            found.chunk.status for found in store.search("Rome number", 5, {"status": ["stale", "live"]})
        } == {
            "live",
            "stale",
        }
        set_status(store, [chunks[0].id], "stale")
        assert store.search("Rome", 5) == []
        set_status(store, [chunks[0].id, chunks[1].id], "live")
        assert {found.chunk.id for found in store.search("Rome", 5)} == {chunks[0].id, chunks[1].id}

    def test_conditions(self, store):
        a = chunk("Rome", "one", trust="verified", extra={"fact": ("f1", "f2"), "n": 3})
        b = chunk("Paris ROMEO", "two", position=2, note="old", extra={"fact": "f1", "n": True})
        c = chunk("Oslo (a.b)", "two", extra={"n": 1})
        store.put([a, b, c])
        expected = [
            ({"source": "two"}, [c, b]),
            ({"trust": None}, [c, b]),
            ({"note": None, "source": "two"}, [c]),
            ({"fact": "f1"}, [a, b]),
            ({"fact": ["f2", "f9"]}, [a]),
            ({"fact": None}, [c]),
            ({"n": 1}, [c]),
            ({"n": True}, [b]),
            ({"n": [3, True]}, [a, b]),
            ({"source": []}, []),
            ({"contains": "rome"}, [a, b]),
            ({"contains": ["(A.B)", "paris"]}, [c, b]),
            ({"id": [a.id, c.id]}, [a, c]),
            ({"absent": "x"}, []),
            ({"position": 2, "trust": None}, [b]),
        ]
        for where, chunks in expected:
            assert store.chunks(where=where) == chunks, where
            found = {found.chunk.id for found in store.search("Rome Paris Romeo Oslo", 9, where)}
            assert found == {chunk.id for chunk in chunks}, where
        assert store.chunks([b.id, "no", a.id, b.id]) == [b, a]
        assert store.chunks([b.id, a.id], {"source": "one"}) == [a]

    def test_misuse_is_refused(self, store):
        with pytest.raises(ConfigError, match="at least one"):
            store.search("x", 0)
        with pytest.raises(ConfigError, match="have the id"):
            store.put([chunk("a", id="x"), chunk("b", id="x")])
        for fields in (
            {"status": "dead"},
            {"trust": "sure"},
            {"position": -1},
            {"extra": {"text": "x"}},
            {"extra": {"a": []}},
        ):
            with pytest.raises(ConfigError):
                chunk("a", **fields)
        assert store.search("", 3) == []
        store.remove(["nobody"])

    def test_changes_can_be_taken_back(self, store):
        a = chunk("Rome is the capital", trust="unverified", extra={"k": 1.5})
        store.put([a])
        before = annotate(store, [a.id], "superseded: Paris")
        assert "superseded: Paris" in store.chunks([a.id])[0].passage.text
        store.put(before)
        assert store.chunks() == [a]
        after = replace_text(store, a.id, "Paris is the capital")
        assert after.extra["replaces"] == a.id
        assert [found.chunk.text for found in store.search("capital", 5)] == ["Paris is the capital"]
        assert store.chunks([a.id])[0].status == "stale"
        with pytest.raises(ConfigError, match="no chunk 'zz'"):
            set_status(store, [a.id, "zz"], "live")


class TestSearch:
    def test_modes_filters_and_diversity(self, index):
        index.put(
            [
                chunk(f"Paris is big {word}", "p", position=n)
                for n, word in enumerate(("very", "very very", "so"))
            ]
        )
        index.put([chunk("Paris ate an apple", "q", trust="verified")])
        for mode in ("dense", "words", "hybrid"):
            found = index.search("Paris is very big", 4, mode=mode)
            assert len(found) == 4
            assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)
            assert found[0].chunk.source == "p"
            assert [
                hit.chunk.source for hit in index.search("Paris is very big", 4, {"source": "q"}, mode=mode)
            ] == ["q"]
        assert [hit.chunk.source for hit in index.search("Paris is very big", 2, mmr=1.0, mode="dense")] == [
            "p",
            "p",
        ]
        assert [hit.chunk.source for hit in index.search("Paris is very big", 2, mmr=0.1)] == ["p", "q"]
        with pytest.raises(ConfigError, match="mode"):
            index.search("x", 1, mode="fuzzy")
        with pytest.raises(ConfigError, match="mmr"):
            index.search("x", 1, mmr=2)

    def test_removed_chunks_are_found_by_no_ranking(self, index):
        chunks = [chunk(f"apple pie number {number}") for number in range(30)]
        index.put(chunks)
        assert len(index.search("apple", 5, mode="words")) == 5
        index.remove([one.id for one in chunks[:28]])
        for mode in ("dense", "words", "hybrid"):
            assert {hit.chunk.id for hit in index.search("apple", 5, mode=mode)} == {
                one.id for one in chunks[28:]
            }

    def test_ranks_are_joined(self):
        assert [name for name, _ in fuse([["a", "b", "c"], ["b", "d"]])] == ["b", "a", "d", "c"]
        assert fuse([["a"], ["a"]]) == [("a", pytest.approx(2 / 61))]

    def test_bm25_prefers_rare_words(self):
        ranking = WordRanking(["x", "y", "z"], ["the city the", "the rare city", "..."])
        assert [id for id, _ in ranking.rank("rare city", 3)] == ["y", "x"]
        assert ranking.rank("unheard", 3) == ranking.rank("?!", 3) == []
        assert ranking.rank("rare city", 3, {"x"})[0][0] == "x"
        assert WordRanking(["x"], ["..."]).rank("a", 1) == []

    def test_diverse_rows(self):
        vectors = np.asarray([[1, 0], [0.99, 0.1], [0.6, 0.8]], dtype=np.float32)
        query = np.asarray([1, 0], dtype=np.float32)
        assert diverse(query, vectors, 2, 1.0) == [0, 1]
        assert diverse(query, vectors, 2, 0.3) == [0, 2]


class TestOpening:
    def test_what_was_written_is_there_again(self, tmp_path):
        kept = [
            chunk("Rome", extra={"a": ("b",)}),
            chunk("Paris", status="stale", trust="superseded", note="n"),
        ]
        with open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index:
            index.put(kept)
        with open_index(tmp_path / "i", embeddings=HashedWords()) as index:
            assert {one.id: one for one in index.chunks()} == {one.id: one for one in kept}
            assert index.counts() == {"live": 1, "aside": 1}
            with pytest.raises(ConfigError, match="open for reading"):
                index.put(kept)
            with pytest.raises(ConfigError, match="open for reading"):
                index.remove([kept[0].id])

    def test_other_embeddings_are_refused(self, tmp_path):
        class Turned(HashedWords):
            def embed_query(self, text):
                return super().embed_query(text)[::-1]

        open_index(tmp_path / "i", embeddings=HashedWords(), write=True).close()
        for other in (HashedWords(32), Turned()):
            with pytest.raises(ConfigError, match="other vectors"):
                open_index(tmp_path / "i", embeddings=other)
        with pytest.raises(ConfigError, match="same object"):
            open_index(tmp_path / "i")
        open_index(tmp_path / "i", embeddings=HashedWords(), write=True).close()

    def test_one_writer_and_its_name(self, tmp_path):
        code = (
            "import sys\nfrom pathlib import Path\nfrom rag.index.lock import WriterLock\n"
            "lock = WriterLock(Path(sys.argv[1]))\nprint('held', flush=True)\nsys.stdin.read()\n"
        )
        open_index(tmp_path / "i", embeddings=HashedWords(), write=True).close()
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "i")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as other:  # fmt: skip
            assert other.stdout.readline() == "held\n"
            with pytest.raises(BusyError, match=rf"process {other.pid} on .*since"):
                open_index(tmp_path / "i", embeddings=HashedWords(), write=True)
            open_index(tmp_path / "i", embeddings=HashedWords()).close()
            other.kill()
        with (
            open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index,
            pytest.raises(BusyError, match="being written"),
        ):
            open_index(index.place, embeddings=HashedWords(), write=True)

    def test_a_reader_sees_what_another_process_wrote(self, tmp_path):
        code = (
            "import sys\nfrom rag.index import open_index\nfrom rag.store import Chunk\nfrom tests.rag.hashed import HashedWords\n"
            "with open_index(sys.argv[1], embeddings=HashedWords(), write=True) as index:\n"
            "    index.put([Chunk('late', 'Oslo is cold', 's')])\n"
        )
        with open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index:
            index.put([chunk("Rome is warm")])
        with open_index(tmp_path / "i", embeddings=HashedWords()) as reader:
            assert [hit.chunk.text for hit in reader.search("Oslo cold", 1, mode="dense")] == ["Rome is warm"]
            subprocess.run([sys.executable, "-c", code, str(tmp_path / "i")], check=True)
            for mode in ("dense", "words"):
                assert [hit.chunk.id for hit in reader.search("Oslo cold", 1, mode=mode)] == ["late"]

    def test_a_move_that_was_cut_off_is_finished(self, tmp_path):
        one = chunk("Rome is old")
        with open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index:
            index.put([one])
            stale = replace(one, status="stale")
            index._aside.write([stale], index._vectors([stale], {}), {})
            assert index.search("Rome", 1) == []
            assert index.chunks() == index.chunks([one.id]) == [stale]
        with open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index:
            assert index.counts() == {"live": 0, "aside": 1}

    def test_what_is_no_index(self, tmp_path):
        with pytest.raises(ConfigError, match="no index in"):
            open_index(tmp_path)
        (tmp_path / "file").write_text("x")
        with pytest.raises(ConfigError, match="is a file"):
            open_index(tmp_path / "file", write=True)

    def test_an_index_is_a_store(self, index):
        assert isinstance(index, DocumentStore) and isinstance(index, Index)
        assert isinstance(MemoryStore(), DocumentStore)
        assert fits(chunk("a"), {}) and fits(chunk("a"), None)


def test_many_changes_leave_both_stores_equal(tmp_path):
    import random

    rng = random.Random(5)
    texts = [f"text {word} {number}" for word in ("red", "green") for number in range(5)]
    memory = MemoryStore()
    with open_index(tmp_path / "i", embeddings=HashedWords(), write=True) as index:
        for _ in range(25):
            chosen = rng.sample(texts, 2)
            if rng.random() < 0.3:
                for store in (memory, index):
                    store.remove([chunk_id("s", text) for text in chosen])
            else:
                status = rng.choice(["live", "stale", "blocked"])
                extra = {rng.choice("ab"): rng.choice([1, True, "t", ("u", "v"), 0.5])}
                for store in (memory, index):
                    store.put([chunk(text, status=status, extra=extra) for text in chosen])
            assert index.chunks() == memory.chunks()
            live = {one.id for one in memory.chunks(where={"status": "live"})}
            assert {hit.chunk.id for hit in index.search("text red green", 20)} == live
