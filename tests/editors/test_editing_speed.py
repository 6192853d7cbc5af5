"""``tests/benchmarks/editing_speed.py`` and ``editing_growth.py``: the sides they time make the same updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.editing_growth import markdown, slopes
from tests.benchmarks.editing_speed import PARTS, measure
from tests.benchmarks.speed_sides import Size, typical

# Two blocks are written, one lies above and one below them.
TINY = Size(4, 64, 3072, 3, 3, 2, 2, 4, 1, 1, 8, 600, (1, 2))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_the_plain_way_makes_the_same_updates(shape, tmp_path, shipped_atlas):
    found = measure(TINY, [shape], PARTS, None, tmp_path, flops=True)[shape]
    for part in ("rome", "memit", "alphaedit"):
        assert found[part]["plain_cosine"] > 1 - 1e-6, part
        assert found[part]["plain_cpu_ratio"] > 0
        assert "easyedit_ratio" not in found[part]
    assert 0 < 2 * found["single"]["gflop"] < found["single"]["plain_gflop"]
    assert found["single"]["edits"] == 2 and found["alphaedit"]["sequence"] == 4
    assert {file.name for file in tmp_path.glob("*.json")} == {f"{shape}-{part}.json" for part in PARTS}
    for file in tmp_path.glob("*.json"):
        Path(file).write_text('{"kept": 1}')
    assert measure(TINY, [shape], PARTS, None, tmp_path) == {shape: {part: {"kept": 1} for part in PARTS}}


def test_a_sample_is_even_over_the_lengths():
    lengths = [9, 2, 30, 4, 3, 5, 7, 6]
    assert [lengths[index] for index in typical(lengths, 1)] == [6]
    assert [lengths[index] for index in typical(lengths, 2)] == [4, 9]
    assert sorted(typical(lengths, 20)) == list(range(8))


def test_a_slope_of_one_is_linear():
    rows = [
        {"editor": "memit", "edits": edits, "cpu_seconds": seconds, "peak_mib": peak}
        for edits, seconds, peak in ((10, 2.0, 50.0), (100, 20.0, 50.0), (1000, 2000.0, None))
    ]
    found = slopes(rows)
    assert found[0]["time_slope"] is None
    assert [row["time_slope"] for row in found[1:]] == pytest.approx([1.0, 2.0])
    assert (found[1]["memory_slope"], found[2]["memory_slope"]) == (pytest.approx(0.0), None)
    assert markdown(found).count("\n") == 5
