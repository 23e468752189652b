"""The front-end benchmark runs, and counts one event for each token."""

from __future__ import annotations

from pathlib import Path

from benchmarks.frontend import measure

CHECKPOINT = Path(__file__).parents[2] / "assets" / "demo" / "target"


def test_a_short_run() -> None:
    rows = {row.metric: row for row in measure(CHECKPOINT, repeats=1, tokens=20)}
    assert rows["64 streams: tokens/s"].value > 0
    assert 0.9 < rows["64 streams: events per token"].value < 1.3
    assert rows["API process memory, MB"].met
