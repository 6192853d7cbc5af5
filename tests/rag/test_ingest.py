"""Bringing folders in: what is read, what is written, and what hostile files do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.errors import ConfigError, DataError
from rag.amend import replace_text, set_status
from rag.index import ingest
from rag.index.ingest import Chunking, cut, difference
from rag.index.load import Document, read_folder
from rag.store import MemoryStore


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
