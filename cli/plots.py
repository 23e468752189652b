"""The plots of `foresight simulate`, `plan` and `calibrate`, as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scheduler.capacity import LoadPoint
from scheduler.outcome import Timeline

Panel = Callable[[Axes, Mapping[str, Sequence[float]]], None]


def draw_timelines(timelines: Mapping[str, Timeline], folder: Path) -> list[Path]:
    """Memory, queues and evictions over time, a panel per policy; returns the files."""
    return [
        _draw(timelines, folder / "utilisation.svg", _memory),
        _draw(timelines, folder / "requests.svg", _requests),
        _draw(timelines, folder / "evictions.svg", _evictions),
    ]


def draw_curves(curves: Mapping[str, Sequence[LoadPoint]], path: Path) -> Path:
    """Goodput of one replica against load, a line per configuration."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    most = 0.0
    for name, points in curves.items():
        loads = [point.load for point in points]
        axes.plot(loads, [point.goodput for point in points], marker="o", label=name)
        most = max(most, *loads)
    axes.plot([0, most], [0, most], color="0.7", linestyle=":", label="all requests in time")
    axes.set(xlabel="load, requests/s", ylabel="goodput, requests/s")
    axes.set_ylim(bottom=0)
    axes.legend()
    return _save(figure, path)


def draw_formats(points: Mapping[str, tuple[float, float]], path: Path) -> Path:
    """Divergence in nats against bytes of a token, a point per format."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, (size, divergence) in points.items():
        axes.plot(size, divergence, marker="o", color="C0")
        axes.annotate(name, (size, divergence), (4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="bytes of a token", ylabel="KL of the next token, nats", yscale="log")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _draw(timelines: Mapping[str, Timeline], path: Path, panel: Panel) -> Path:
    figure = Figure(figsize=(9, 2.6 * len(timelines)), layout="constrained")
    panels = figure.subplots(len(timelines), 1, sharex=True, sharey=True, squeeze=False)
    for axes, (name, timeline) in zip(panels[:, 0], timelines.items(), strict=True):
        axes.set_title(name)
        panel(axes, timeline.columns())
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")
    panels[-1, 0].set_xlabel("seconds")
    return _save(figure, path)


def _memory(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    axes.plot(columns["time"], columns["used"], label="pages in use, share")
    free = [1 - reserve for reserve in columns["reserve"]]
    axes.plot(columns["time"], free, linestyle="--", label="all but the reserve")


def _requests(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    axes.plot(columns["time"], columns["running"], label="running")
    axes.plot(columns["time"], columns["waiting"], label="waiting")


def _evictions(axes: Axes, columns: Mapping[str, Sequence[float]]) -> None:
    axes.plot(columns["time"], columns["evictions"], label="evictions in each interval")


def _save(figure: Figure, path: Path) -> Path:
    mpl.rcParams["svg.hashsalt"] = path.stem  # the same data gives the same file
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path
