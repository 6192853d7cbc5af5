"""Calibration figures against values worked out by hand."""

from __future__ import annotations

import pytest

from lab.errors import DataError
from rag.calibration import Graded, brier_score, by_kind, calibration, expected_calibration_error

ROWS = [Graded(0.9, True, "direct"), Graded(0.8, False, "direct"), Graded(0.3, False), Graded(0.2, True)]


def test_values_by_hand():
    # (0.01 + 0.64 + 0.09 + 0.64) / 4
    assert brier_score(ROWS) == pytest.approx(0.345)
    # Bins of width 0.5: |0.5 - 1| and |1.7 - 1|, over 4 rows.
    assert expected_calibration_error(ROWS, bins=2) == pytest.approx((0.5 + 0.7) / 4)
    # Bins of width 0.1: each row alone.
    assert expected_calibration_error(ROWS) == pytest.approx((0.1 + 0.8 + 0.3 + 0.8) / 4)
    found = calibration(ROWS, 2)
    assert (found.n, found.accuracy, found.confidence) == (4, 0.5, pytest.approx(0.55))


def test_borders_belong_below():
    rows = [Graded(0.3, True), Graded(0.25, False), Graded(0.0, False), Graded(1.0, True)]
    # 0.3 and 0.25 share the third of ten bins: |0.55 - 1|; the ends are perfect.
    assert expected_calibration_error(rows) == pytest.approx(0.45 / 4)


def test_by_kind_of_note():
    found = by_kind(ROWS)
    assert list(found) == ["direct", ""] and found["direct"].brier == pytest.approx(0.325)
    assert found[""].accuracy == 0.5


@pytest.mark.parametrize("rows", [[], [Graded(1.2, True)], [Graded(float("nan"), True)]])
def test_no_figure_over_nothing(rows):
    with pytest.raises(DataError):
        calibration(rows)
