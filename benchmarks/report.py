"""What every benchmark prints: a table and, as its last line, one JSON object.

`{"benchmark", "machine", "commit", "rows": [{"metric", "value", "target", "met"}]}`; a row that
has an interval also carries `"interval": [low, high]`.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Row:
    """One measured quantity. `target` is a bound in the direction `sense` says."""

    metric: str
    value: float
    target: float | None = None
    sense: Literal["at least", "at most"] = "at least"
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target. NaN never meets one."""
        if self.target is None:
            return None
        if self.sense == "at least":
            return self.value >= self.target
        return self.value <= self.target


def percentile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1) with linear interpolation; NaN of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """The median and a distribution-free interval for it, from order statistics.

    The interval between the k-th smallest and the k-th largest of n independent values covers the
    median with probability 1 - 2·P(Binomial(n, ½) < k). The widest k that still reaches
    `confidence` is taken; below six values none does, and the whole range is returned.
    """
    if not values:
        return math.nan, math.nan, math.nan
    ordered = sorted(values)
    n = len(ordered)
    k, outside = 1, 2 * 0.5**n
    while k < n // 2:
        outside += 2 * math.comb(n, k) * 0.5**n
        if outside > 1 - confidence:
            break
        k += 1
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


def share_interval(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval for the chance of a success; 0 to 1 of no trials."""
    if not trials:
        return 0.0, 1.0
    z = statistics.NormalDist().inv_cdf(0.975)
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    reach = z / (1 + spread) * math.sqrt((share * (1 - share) + spread / 4) / trials)
    return max(middle - reach, 0.0), min(middle + reach, 1.0)


def machine() -> str:
    """The machine in words: processor, cores this process may use, memory, system, Python."""
    name = platform.processor() or platform.machine()
    memory = 0.0
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    if meminfo.exists():
        memory = int(meminfo.read_text().split("MemTotal:")[1].split()[0]) / 2**20
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        cores = os.cpu_count() or 1
    return (
        f"{name}, {cores} cores, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}"
    )


def commit() -> str:
    """The checkout's short commit, with `-dirty` when tracked files differ; `unknown` outside."""
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal too."""
    widths = [max(len(row[i]) for row in (header, *lines)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(header), rule, *(line(cells) for cells in lines)])


def json_line(benchmark: str, rows: Sequence[Row]) -> str:
    """The last line of a benchmark's output. Values that are no number become null."""

    def number(value: float) -> float | None:
        return float(f"{value:.6g}") if math.isfinite(value) else None

    out: list[dict[str, object]] = []
    for row in rows:
        item: dict[str, object] = {
            "metric": row.metric,
            "value": number(row.value),
            "target": row.target,
            "met": row.met,
        }
        if row.interval is not None:
            item["interval"] = [number(bound) for bound in row.interval]
        out.append(item)
    return json.dumps(
        {"benchmark": benchmark, "machine": machine(), "commit": commit(), "rows": out}
    )


def rows_table(rows: Sequence[Row]) -> str:
    """Rows with targets as a table: metric, value, interval, target, met."""
    lines = [
        (
            row.metric,
            f"{row.value:.3g}",
            "" if row.interval is None else f"{row.interval[0]:.3g} to {row.interval[1]:.3g}",
            "" if row.target is None else f"{row.sense} {row.target:g}",
            {None: "", True: "yes", False: "no"}[row.met],
        )
        for row in rows
    ]
    return table(("metric", "value", "interval", "target", "met"), lines)
