"""Draws docs/forecast.svg with the scheduler's own forecast: `python -m docs.figures`."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from scheduler.forecast import LAG, Batch, Forecast, Growth

PAGE = 16
CAPACITY = 50  # pages
RUNNING = {"A": (120, 180), "B": (300, 60), "C": (64, 120)}  # positions held, tokens to come
CANDIDATE = (150, 140)


def pages_over_time(length: int, remaining: int, steps: np.ndarray) -> np.ndarray:
    grown = np.minimum(steps, remaining)
    return np.where(steps <= remaining + LAG, -(-(length + grown) // PAGE), 0)


def draw(path: Path) -> None:
    steps = np.arange(0, 200)
    length, remaining = np.array(list(RUNNING.values())).T
    batch = Batch.of(length, remaining[None], np.ones(3), np.zeros(3, dtype=np.int64))
    forecast = Forecast(batch, PAGE)
    candidate = Growth(CANDIDATE[0], np.array(CANDIDATE[1:]), 1.0, 0)
    peak = forecast.peak_with(candidate)
    parts = [*RUNNING.values(), CANDIDATE]
    layers = [pages_over_time(*part, steps) for part in parts]
    assert peak == int(sum(layers).max()), "the picture shows what the scheduler computes"

    mpl.rcParams["svg.hashsalt"] = "forecast"
    figure = Figure(figsize=(8.5, 4.2), layout="constrained")
    axes = figure.subplots()
    colours = ("#4477aa", "#66ccee", "#228833", "#ddaa33")
    labels = [f"{name}: running" for name in RUNNING]
    axes.stackplot(steps, layers, colors=colours, labels=[*labels, "D: wants in"], alpha=0.9)
    now = int(sum(layer[0] for layer in layers))
    at = int(np.argmax(sum(layers)))
    axes.axhline(CAPACITY, color="black", linewidth=1.5)
    axes.text(199, CAPACITY + 0.7, "all pages", ha="right")
    axes.annotate(
        f"peak with D: {peak} pages", (at, peak), (at + 14, peak + 3),
        arrowprops={"arrowstyle": "->"},
    )  # fmt: skip
    axes.annotate(
        f"now with D: {now} pages", (0, now), (8, CAPACITY + 6), arrowprops={"arrowstyle": "->"}
    )
    for name, (_, left) in RUNNING.items():
        axes.axvline(left, color="0.4", linestyle=":", linewidth=1)
        axes.text(left + 1, 1, f"{name} ends", rotation=90, fontsize="small", color="0.25")
    axes.set(xlabel="steps from now", ylabel="pages held", xlim=(0, 199), ylim=(0, peak + 8))
    axes.legend(loc="upper right", bbox_to_anchor=(1.0, 0.74), fontsize="small")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(__file__).parent / "forecast.svg")
