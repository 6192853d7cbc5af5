"""The index: what is read, what is written, what is found, and who may write."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.errors import BusyError, ConfigError, DataError
from rag.amend import annotate, replace_text, set_status
from rag.index import Index, ingest, open_index
from rag.index.ingest import Chunking, cut, difference
from rag.index.load import Document, read_folder
from rag.index.words import WordRanking, diverse, fuse
from rag.store import Chunk, DocumentStore, MemoryStore, chunk_id, fits
from tests.rag.hashed import HashedWords


@pytest.fixture
def index(tmp_path):
    with open_index(tmp_path / "index", embeddings=HashedWords(), write=True) as opened:
        yield opened


@pytest.fixture(params=["memory", "chroma"])
def store(request) -> DocumentStore:
    return MemoryStore() if request.param == "memory" else request.getfixturevalue("index")


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "docs"
    (root / "deep").mkdir(parents=True)
    (root / "a.txt").write_text("The capital of France is Paris.", encoding="utf-8")
    (root / "deep" / "b.md").write_text(
        "# Japan\n\nTokyo is the capital.\n\n## Food\n\nSushi.", encoding="utf-8"
    )
    (root / "c.html").write_text(
        "<html><head><title>Kenya</title><script>x()</script></head><body><p>Nairobi is <b>big</b>.</p></body></html>",
        encoding="utf-8",
    )
    (root / "d.jsonl").write_text(
        '{"id": "row", "text": "Oslo is in Norway.", "trust": "verified", "year": 2020, "tags": ["x", "y"]}\n\n{"text": "Lima."}\n',
        encoding="utf-8",
    )
    return root


def chunk(text: str, source: str = "s", **fields) -> Chunk:
    return Chunk(fields.pop("id", chunk_id(source, text)), text, source, **fields)


def pdf(text: str) -> bytes:
    """A PDF of one page with one line, written by hand."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode() if text else b""
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(out)
    return out + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


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


class TestIngest:
    def test_every_kind_is_read(self, folder, index):
        (folder / "e.pdf").write_bytes(pdf("Quito is in Ecuador."))
        (folder / "f.png").write_bytes(b"\x89PNG")
        done = ingest(index, folder)
        assert (done.documents, done.problems, done.skipped) == (6, (), ("docs/f.png",))
        texts = {chunk.source: chunk.text for chunk in index.chunks()}
        assert texts["docs/a.txt"] == "The capital of France is Paris."
        assert "Tokyo" in texts["docs/deep/b.md"]
        assert texts["docs/c.html"] == "Nairobi is\nbig\n."
        assert texts["docs/e.pdf"] == "Quito is in Ecuador."
        (row,) = index.chunks(where={"source": "docs/d.jsonl#row"})
        assert (row.trust, row.extra["year"], row.extra["tags"]) == ("verified", 2020, ("x", "y"))
        assert index.search("Quito Ecuador", 1)[0].chunk.source == "docs/e.pdf"

    def test_a_second_time_nothing_is_written(self, folder, index):
        first = ingest(index, folder)
        before, revision, embedded = (
            index.chunks(),
            (Path(index.place) / "revision").read_text(),
            index._embeddings._source.texts,
        )
        second = ingest(index, folder)
        assert (second.added, second.updated, second.removed, second.unchanged) == (0, 0, 0, first.added)
        assert index.chunks() == before
        assert (Path(index.place) / "revision").read_text() == revision
        assert index._embeddings._source.texts == embedded

    def test_a_changed_document_replaces_its_chunks(self, folder, index):
        ingest(index, folder)
        (folder / "a.txt").write_text("The capital of France is Lyon.", encoding="utf-8")
        (folder / "c.html").unlink()
        done = ingest(index, folder)
        assert (done.added, done.removed, done.missing) == (1, 1, ("docs/c.html",))
        assert not index.chunks(where={"contains": "Paris"})
        assert index.chunks(where={"source": "docs/c.html"})
        done = ingest(index, folder, prune=True)
        assert (done.removed, done.missing) == (1, ())
        assert not index.chunks(where={"source": "docs/c.html"})

    def test_what_others_said_of_a_chunk_stays(self, folder, index):
        ingest(index, folder)
        (a,) = index.chunks(where={"source": "docs/a.txt"})
        (row,) = index.chunks(where={"source": "docs/d.jsonl#row"})
        set_status(index, [row.id], "blocked", note="forgotten")
        new = replace_text(index, a.id, "The capital of France is Rome.")
        done = ingest(index, folder, prune=True)
        assert (done.added, done.updated, done.removed) == (0, 0, 0)
        assert index.chunks([row.id])[0].status == "blocked"
        assert [chunk.status for chunk in index.chunks([a.id, new.id])] == ["stale", "live"]
        (folder / "a.txt").write_text("Something else.", encoding="utf-8")
        ingest(index, folder)
        assert index.chunks([a.id, new.id]) == []

    def test_new_chunks_can_be_looked_at_first(self, folder, index):
        def admit(chunks):
            return [replace(chunk, status="blocked") if "Paris" in chunk.text else chunk for chunk in chunks]

        ingest(index, folder, admit=admit)
        assert all("Paris" not in found.chunk.text for found in index.search("Paris France capital", 9))
        assert ingest(index, folder).added == 0

    def test_two_folders_do_not_mix(self, folder, index, tmp_path):
        ingest(index, folder)
        other = tmp_path / "other"
        other.mkdir()
        (other / "a.txt").write_text("Other.", encoding="utf-8")
        ingest(index, other, prune=True)
        assert {"docs/a.txt", "other/a.txt"} <= {chunk.source for chunk in index.chunks()}

    def test_cutting(self):
        words = " ".join(f"word{number}" for number in range(100))
        chunks = cut(Document("s", f"{words}\n\n{words}", "text"), Chunking(120, 20))
        assert all(len(chunk.text) <= 120 for chunk in chunks)
        assert [chunk.position for chunk in chunks] == list(range(len(chunks)))
        assert len({chunk.id for chunk in chunks}) == len(chunks)
        with pytest.raises(ConfigError, match="share"):
            Chunking(10, 10)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.lists(
            st.dictionaries(st.sampled_from("abc"), st.lists(st.sampled_from(["x", "y", "z"]), min_size=1)),
            max_size=5,
        )
    )
    def test_a_store_follows_its_documents(self, versions):
        store = MemoryStore()
        for version in versions:
            documents = [Document(name, " ".join(texts), "text") for name, texts in version.items()]
            wanted = [chunk for document in documents for chunk in cut(document, Chunking(1, 0))]
            for _ in range(2):
                new, changed, obsolete = difference(wanted, store.chunks(), version)
                store.put([*new, *changed])
                store.remove([chunk.id for chunk in obsolete])
                held = [chunk for chunk in store.chunks() if chunk.source in version]
                assert held == sorted(wanted, key=lambda chunk: (chunk.source, chunk.position))
            assert difference(wanted, store.chunks(), version) == ([], [], [])


class TestHostileFiles:
    def test_bad_files_are_named_and_the_others_read(self, folder, index, tmp_path):
        bad = {
            "zero.txt": b"",
            "blank.md": b" \n\t",
            "binary.txt": bytes(range(256)),
            "latin.txt": "Müller".encode("latin-1"),
            "nul.txt": b"a\0b",
            "big.txt": b"x" * 2000,
            "broken.pdf": b"%PDF-1.4 nothing",
            "scan.pdf": pdf(""),
            "charset.html": '<meta charset="ascii"><p>Müller</p>'.encode("latin-1"),
        }
        for name, data in bad.items():
            (folder / name).write_bytes(data)
        secret = tmp_path / "secret.txt"
        secret.write_text("password", encoding="utf-8")
        (folder / "link.txt").symlink_to(secret)
        (folder / "new\nline.txt").write_text("x", encoding="utf-8")
        (folder / "rows.jsonl").write_text(
            '{"id": "../../etc", "text": "out"}\nnot json\n{"text": 3}\n{"text": "\\ud800"}\n{"text": "fine", "trust": "sure"}\n'
            '{"id": "ok", "text": "fine"}\n{"id": "ok", "text": "twice"}\n',
            encoding="utf-8",
        )
        done = ingest(index, folder, size_limit=1500)
        reasons = {problem.source: problem.reason for problem in done.problems}
        assert set(reasons) == {
            *(f"docs/{name}" for name in bad),
            "docs/link.txt",
            "docs/new\\nline.txt",
            *(f"docs/rows.jsonl#{number}" for number in (1, 2, 3, 4, 5, 7)),
        }
        for name, part in (
            ("zero.txt", "empty"),
            ("binary.txt", "UTF-8"),
            ("nul.txt", "binary"),
            ("big.txt", "larger"),
        ):
            assert part in reasons[f"docs/{name}"]
        assert "outside" in reasons["docs/link.txt"]
        assert done.documents == 6
        assert not index.chunks(where={"contains": "password"})
        with pytest.raises(DataError, match="nothing was written"):
            ingest(MemoryStore(), folder, strict=True, size_limit=1500)

    def test_a_file_that_breaks_keeps_what_the_index_holds(self, folder, index):
        ingest(index, folder)
        before = index.chunks()
        (folder / "a.txt").write_bytes(b"\xff\xff\xff")
        (folder / "d.jsonl").write_text("{", encoding="utf-8")
        done = ingest(index, folder, prune=True)
        assert {problem.source for problem in done.problems} == {"docs/a.txt", "docs/d.jsonl#1"}
        assert index.chunks() == before

    def test_other_encodings_with_their_mark(self, tmp_path):
        (tmp_path / "a.txt").write_text("Zürich", encoding="utf-16")
        (tmp_path / "b.txt").write_text("Zürich", encoding="utf-8-sig")
        (tmp_path / "c.html").write_bytes('<meta charset="iso-8859-1"><p>Zürich'.encode("latin-1"))
        assert [document.text for document in read_folder(tmp_path).documents] == ["Zürich"] * 3

    def test_a_question_of_a_million_characters(self, folder, index):
        ingest(index, folder)
        assert index.search("Paris " * 170_000, 1)[0].chunk.source == "docs/a.txt"

    def test_no_such_folder(self, index, tmp_path):
        with pytest.raises(ConfigError, match="no such folder"):
            ingest(index, tmp_path / "nowhere")


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
            index._aside.write([stale], index._vectors([stale]))
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
