"""The commands around the index, with the offline sentence model."""

from __future__ import annotations

import pytest

from rag.metrics import hit_at_k, mean_scored, reciprocal_rank
from tests.commands import call, result
from tests.rag.facts import conflicts

CASES = conflicts(20, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli") / "docs"
    root.mkdir()
    for number, case in enumerate(CASES):
        (root / f"{number}.txt").write_text(case.document.text, encoding="utf-8")
    (root / "bad.txt").write_bytes(b"\xff\xfa\0")
    return root


@pytest.fixture(scope="module")
def built(folder, tmp_path_factory):
    from lab.cli.root import run

    place = tmp_path_factory.mktemp("cli") / "index"
    assert run(["rag", "index", str(folder), "--store", str(place)]) == 0
    return place


def test_add_again_and_show(built, folder, capsys, tmp_path):
    again = result(capsys, tmp_path, "rag", "index", str(folder), "--store", str(built))
    assert (again["added"], again["removed"], again["unchanged"]) == (0, 0, 20)
    assert [problem["source"] for problem in again["problems"]] == ["docs/bad.txt"]
    shown = result(capsys, tmp_path, "rag", "show", "--store", str(built))
    assert (shown["chunks"], shown["statuses"], shown["embeddings"]) == (20, {"live": 20}, "minilm")
    code, _, err = call(capsys, "rag", "index", str(folder), "--store", str(built), "--strict")
    assert code != 0 and "bad.txt" in err and "nothing was written" in err


def test_the_sentence_model_finds_the_documents(built):
    from rag.index import open_index

    with open_index(built) as index:
        for mode, least in (("dense", 0.8), ("words", 0.8), ("hybrid", 0.9)):
            ranked = [[hit.chunk.text for hit in index.search(case.question, 5, mode=mode)] for case in CASES]
            hits = [hit_at_k(row, [case.document.text], 5) for row, case in zip(ranked, CASES, strict=True)]
            mrr = [
                reciprocal_rank(row, [case.document.text]) for row, case in zip(ranked, CASES, strict=True)
            ]
            print(mode, mean_scored(hits), mean_scored(mrr))
            assert mean_scored(hits) >= least
            assert mean_scored(mrr) >= 0.5


def test_search_and_read(built, capsys, tmp_path, shipped_atlas):
    case = CASES[0]
    found = result(capsys, tmp_path, "rag", "search", case.question, "--store", str(built), "--k", "2")[
        "found"
    ]
    assert len(found) == 2
    assert case.document.text in [hit["text"] for hit in found]
    source = found[1]["source"]
    narrow = result(
        capsys, tmp_path, "rag", "search", case.question, "--store", str(built), "--source", source
    )
    assert [hit["source"] for hit in narrow["found"]] == [source]
    read = result(
        capsys, tmp_path, "rag", "ask", case.question, "--store", str(built), "--k", "2", "-d", "Mine.", "--max-new-tokens", "2"
    )  # fmt: skip
    assert [passage["text"] for passage in read["passages"]] == ["Mine.", *(hit["text"] for hit in found)]


def test_errors_are_one_line(built, capsys, tmp_path):
    for words, part in (
        (("rag", "search", "x", "--store", str(tmp_path / "no")), "no index"),
        (("rag", "search", "x", "--store", str(built), "--mode", "fuzzy"), "fuzzy"),
        (("rag", "search", "x", "--store", str(built), "--trust", "sure"), "sure"),
        (("rag", "index", str(tmp_path / "no"), "--store", str(tmp_path / "i")), "no such folder"),
        (("rag", "ask", "x", "--store", str(tmp_path / "no")), "no index"),
    ):
        code, _, err = call(capsys, *words)
        assert code != 0 and part in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "i").exists()
