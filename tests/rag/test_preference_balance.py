"""Rows brought to a ratio."""

from __future__ import annotations

from collections import Counter

import pytest

from lab.errors import ConfigError
from rag.preference.balance import balance, water_fill
from rag.preference.stage import finish, records


def test_water_filling_by_hand():
    assert water_fill({"a": 10, "b": 4}, {"a": 2, "b": 1}) == {"a": 8, "b": 4}
    assert water_fill({"a": 9, "b": 9, "c": 1}, {"a": 1, "b": 1, "c": 1}, total=9) == {"a": 4, "b": 4, "c": 1}
    assert water_fill({"a": 2}, {"a": 1, "b": 3}, total=9) == {"a": 2, "b": 0}
    assert water_fill({"a": 7, "b": 21}, {"a": 0.1, "b": 0.3}) == {"a": 7, "b": 21}
    rows = [{"error_type": "a", "n": n} for n in range(10)] + [{"error_type": "b", "n": n} for n in range(4)]
    data = finish("x", 14, rows).data
    stage = balance(data, {"a": 2, "b": 1}, seed=1)
    assert Counter(row["error_type"] for row in records(stage.data)) == {"a": 8, "b": 4}
    assert stage.manifest["settings"]["available"] == {"a": 10, "b": 4}
    assert stage.manifest["dropped"]["beyond the part of a"] == 2
    with pytest.raises(ConfigError, match="'b'"):
        balance(data, {"a": 1})
