"""Medians, intervals, tables and the JSON line."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.report import (
    Row,
    json_line,
    median_interval,
    percentile,
    rows_table,
    share_interval,
)


def test_percentile_interpolates() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 1) == 4
    assert percentile(values, 0.5) == 2.5
    assert percentile([7.0], 0.99) == 7
    assert math.isnan(percentile([], 0.5))


@pytest.mark.parametrize(
    ("count", "low", "high"),
    # Tabulated order statistics of the sign-test interval at 95 %.
    [(3, 1, 3), (6, 1, 6), (7, 1, 7), (9, 2, 8), (12, 3, 10), (20, 6, 15), (25, 8, 18)],
)
def test_median_interval_uses_the_right_order_statistics(count: int, low: int, high: int) -> None:
    values = [float(i) for i in range(1, count + 1)]
    random.Random(0).shuffle(values)
    assert median_interval(values) == ((count + 1) / 2, low, high)


def test_median_interval_covers() -> None:
    rng = random.Random(1)
    trials = 2000
    hits = 0
    for _ in range(trials):
        _, low, high = median_interval([rng.gauss(0, 1) for _ in range(9)])
        hits += low <= 0 <= high
    assert 0.945 < hits / trials < 0.98  # exactly 0.961


def test_share_interval() -> None:
    assert share_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert share_interval(0, 0) == (0.0, 1.0)


def test_rows() -> None:
    rows = [
        Row("rate", 1.3, 1.25, interval=(1.2, 1.4)),
        Row("ttft", 1.01, 1.0, "at most"),
        Row("nothing", math.nan, 1.0),
        Row("plain", 12.345678),
    ]
    assert [row.met for row in rows] == [True, False, False, None]
    line = json_line("serving", rows)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["benchmark"] == "serving"
    assert parsed["machine"]
    assert parsed["commit"]
    assert parsed["rows"][0] == {
        "metric": "rate",
        "value": 1.3,
        "target": 1.25,
        "met": True,
        "interval": [1.2, 1.4],
    }
    assert parsed["rows"][2]["value"] is None
    assert rows_table(rows).count("\n") == 5
