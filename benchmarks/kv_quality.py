"""What attention loses by formats of keys and values, on a synthetic head.

    python -m benchmarks.kv_quality
    python -m benchmarks.kv_quality --sinks 64 --recent 128     windows kept exact
    python -m benchmarks.kv_quality --plot quality.svg

A head has read 4096 tokens; queries stand at the last one. Scales of channels and tokens are
lognormal, those of queries go with those of keys, and the first four keys are small. Outlier
channels are four of the slowest pairs of the rotary embedding, with a mean of 6 to 12 standard
deviations; then the first keys, which have no such mean, hold 10 to 50 % of a query's attention, as
attention sinks do. Queries look for three of the keys and are scaled until the likeliest token has
0.43 of the other attention on average.

Every format goes through pages as in the server. The mean of keys is taken from 256 tokens after
the first 64 and is the same for all. Reported: squared errors of keys and values over their
squares; the error of scores, weighted by attention, but for what all keys of a query share; the
divergence of attention in nats; the cosine of outputs; how often the likeliest token stays so.

Real heads differ from each other and from this one: it ranks formats, and finds bugs.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Row, json_line, rows_table, table
from kernels.kv.format import dense_rows, page_bytes
from kernels.kv.presets import NAMES as FORMATS
from kernels.kv.presets import LayerPages, packed_format
from kernels.kv.windows import DensePages, Windows

HEAD_DIM = 128
PAGE = 64
THETA = 1e6
SINKS = 4
LIKELIEST = 0.43
MEAN_OF = slice(64, 320)  # tokens that the mean of keys is taken from


@dataclass(frozen=True, slots=True)
class Head:
    """q: [queries, HEAD_DIM]; k, v: [tokens, HEAD_DIM], after the rotary embedding; fp32."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True)
class Stored:
    """Keys and values as pages give them back, [tokens, HEAD_DIM] fp32, and their space."""

    keys: Tensor
    values: Tensor
    turn: Callable[[Tensor], Tensor]
    turn_back: Callable[[Tensor], Tensor]
    bytes: float  # of a token's key and value


@dataclass(frozen=True, slots=True)
class Quality:
    keys: float
    values: float
    scores: float
    divergence: float
    cosine: float
    top: float


NAMES = ("key NMSE", "value NMSE", "logit error", "KL", "output cosine", "top-1")


def rotary(x: Tensor) -> Tensor:
    """x: [tokens, HEAD_DIM] at positions 0, 1, ..."""
    half = HEAD_DIM // 2
    angles = torch.arange(len(x))[:, None] * THETA ** (-torch.arange(half) / half)
    first, second = x.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def make_head(seed: int, tokens: int, queries: int, outliers: bool) -> Head:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape)).float()

    half = HEAD_DIM // 2
    scale = (0.4 * normal(half)).exp().repeat(2)  # of a channel; the same for both of a pair
    size = (0.15 * normal(tokens, 1)).exp()
    size[:SINKS] = 0.1
    mean = torch.zeros(tokens, HEAD_DIM)
    if outliers:
        for pair in rng.choice(np.arange(half * 3 // 4, half), 4, replace=False):
            length, angle = rng.uniform(6, 12), rng.uniform(0, 2 * math.pi)
            mean[SINKS:, pair] = length * math.cos(angle) * scale[pair]
            mean[SINKS:, pair + half] = length * math.sin(angle) * scale[pair]
    white = rotary(normal(tokens, HEAD_DIM))
    k = rotary(mean) + white * scale * size
    v = normal(tokens, HEAD_DIM) * (0.4 * normal(HEAD_DIM)).exp() * size

    wanted = torch.from_numpy(rng.integers(SINKS, tokens, (queries, 3)))
    toward = (white[wanted] * torch.tensor([1.0, 0.8, 0.6])[:, None]).sum(1)
    q = (0.6 * toward / math.sqrt(2) + 0.8 * normal(queries, HEAD_DIM)) * scale
    middle = k[SINKS:].mean(0)
    along = middle / middle.norm()
    if outliers:
        q -= (q @ along)[:, None] * along
    scores = q @ k[SINKS:].T / math.sqrt(HEAD_DIM)
    low, high = 0.0, 100.0
    for _ in range(30):
        factor = (low + high) / 2
        likeliest = float((factor * scores).softmax(-1).amax(-1).mean())
        low, high = (factor, high) if likeliest < LIKELIEST else (low, factor)
    q *= factor
    if outliers:
        # All but the sinks fall by as much as gives the sinks their share.
        share = torch.from_numpy(rng.uniform(0.1, 0.5, queries)).float()
        others = (factor * scores).logsumexp(-1)
        sinks = (q @ k[:SINKS].T / math.sqrt(HEAD_DIM)).logsumexp(-1)
        fall = others - sinks + (share / (1 - share)).log()
        q -= (fall * math.sqrt(HEAD_DIM) / middle.norm())[:, None] * along
    return Head(q, k, v)


def store(name: str, k: Tensor, v: Tensor, mean: Tensor | None) -> Stored:
    """Through the pages of a format. k, v: [tokens, HEAD_DIM], whole pages; mean: [HEAD_DIM]."""
    count, means = len(k) // PAGE, None if mean is None else mean[None]
    form = packed_format(name, LayerPages(1, PAGE, HEAD_DIM, means, Windows(0, PAGE)))
    rows = count + 1 + dense_rows(form, count + 1, 1, PAGE, HEAD_DIM, k.dtype)
    pool = torch.zeros(rows, *form.page_shape(1, PAGE, HEAD_DIM), dtype=torch.uint8)
    pages, slots = torch.arange(1, count + 1)[None], torch.arange(PAGE, PAGE + len(k))
    form.append(k[:, None], v[:, None], pool, slots, DensePages(pages, slots, count + 1))
    keys, values = (x[0, 0] for x in form.gather(pool, pages))
    size = page_bytes(form, 1, PAGE, HEAD_DIM, k.dtype) / PAGE
    return Stored(keys, values, form.turn, form.turn_back, size)


def compare(head: Head, stored: Stored, mean: Tensor | None, sinks: int, recent: int) -> Quality:
    """Attention by what is stored, with the windows exact, against attention by the head's own."""
    k, v = stored.turn(head.k if mean is None else head.k - mean), stored.turn(head.v)
    body = slice(sinks, len(k) - recent)
    keys, values = k.clone(), v.clone()
    keys[body], values[body] = stored.keys[body], stored.values[body]

    scale = 1 / math.sqrt(HEAD_DIM)
    right = (head.q @ head.k.T * scale).double()
    found = (stored.turn(head.q) @ keys.T * scale).double()
    p, log_p, log_found = right.softmax(-1), right.log_softmax(-1), found.log_softmax(-1)
    error = found - right
    error -= (p * error).sum(-1, keepdim=True)
    out = p.float() @ head.v
    out_found = stored.turn_back(log_found.exp().float() @ values)
    return Quality(
        float((keys - k)[body].square().sum() / head.k[body].square().sum()),
        float((values - v)[body].square().sum() / head.v[body].square().sum()),
        float((p * error.square()).sum(-1).mean().sqrt()),
        float((p * (log_p - log_found)).sum(-1).mean()),
        float(torch.cosine_similarity(out, out_found).mean()),
        float((right.argmax(-1) == found.argmax(-1)).double().mean()),
    )


@dataclass(frozen=True, slots=True)
class Case:
    """A format on all heads of a kind; the numbers are means."""

    outliers: bool
    name: str
    mean: bool
    bytes: float
    quality: Quality

    @property
    def title(self) -> str:
        heads = "outliers" if self.outliers else "no outliers"
        return f"{heads}, {self.name}{', key mean' if self.mean else ''}"


def cases(
    tokens: int, queries: int, seeds: int, outliers: bool, sinks: int, recent: int
) -> Iterator[Case]:
    heads = [make_head(seed, tokens, queries, outliers) for seed in range(seeds)]
    for name in FORMATS:
        for with_mean in (False, True):
            found, size = [], 0.0
            for head in heads:
                mean = head.k[MEAN_OF].mean(0) if with_mean else None
                stored = store(name, head.k, head.v, mean)
                size = stored.bytes
                found.append(astuple(compare(head, stored, mean, sinks, recent)))
            quality = Quality(*(statistics.fmean(x) for x in zip(*found, strict=True)))
            yield Case(outliers, name, with_mean, size, quality)


def show(found: Sequence[Case]) -> str:
    lines = [
        (
            case.name,
            "yes" if case.mean else "",
            f"{case.bytes * 8 / (2 * HEAD_DIM):.2f}",
            f"{case.bytes:g}",
            f"{case.quality.keys:.2g}",
            f"{case.quality.values:.2g}",
            f"{case.quality.scores:.3f}",
            f"{case.quality.divergence:.2g}",
            f"{case.quality.cosine:.4f}",
            f"{case.quality.top:.3f}",
        )
        for case in sorted(found, key=lambda case: (-case.bytes, case.name, case.mean))
    ]
    return table(("format", "key mean", "bits/element", "bytes/token", *NAMES), lines)


def rows_of(found: Sequence[Case]) -> list[Row]:
    """What must hold of any sound codec, then every number."""
    divergence = {(c.outliers, c.name, c.mean): c.quality.divergence for c in found}
    rows = []
    for outliers in sorted({case.outliers for case in found}):

        def kl(name: str, mean: bool = False) -> float:
            return divergence[outliers, name, mean]  # noqa: B023

        heads = "outliers" if outliers else "no outliers"
        rows.append(Row(f"{heads}: KL of fp8 over int8n", kl("fp8") / kl("int8n"), 10))
        rows.append(Row(f"{heads}: KL of int8n", kl("int8n"), 0.001, "at most"))
        rows.append(Row(f"{heads}: KL of int4h, key mean", kl("int4h", True), 0.03, "at most"))
        if outliers:
            ratio = kl("int4h") / kl("int4h", True)
            rows.append(Row(f"{heads}: KL of int4h over that with the key mean", ratio, 1.1))
        ratio = kl("int4h") / kl("turbo4")
        rows.append(Row(f"{heads}: KL of int4h over turbo4", ratio, 1.25, "at most"))
    for case in found:
        rows.append(Row(f"{case.title}: bytes/token", case.bytes))
        for name, value in zip(NAMES, astuple(case.quality), strict=True):
            rows.append(Row(f"{case.title}: {name}", value))
    return rows


def draw(found: Sequence[Case], path: Path) -> None:
    """Divergence against bytes, a panel for heads with outlier channels and one for others."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = path.stem  # the same data gives the same file
    kinds = sorted({case.outliers for case in found}, reverse=True)
    names = list(dict.fromkeys(c.name for c in sorted(found, key=lambda c: -c.bytes)))
    figure = Figure(figsize=(5 * len(kinds) + 1, 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)
    for axes, outliers in zip(panels[0], kinds, strict=True):
        for i, name in enumerate(names):
            marker, color = "os^D"[i % 4], mpl.colormaps["tab20"](i % 20)
            for case in (c for c in found if (c.outliers, c.name) == (outliers, name)):
                axes.plot(
                    case.bytes,
                    case.quality.divergence,
                    marker=marker,
                    linestyle="",
                    color=color,
                    fillstyle="full" if case.mean else "none",
                    label=name if case.mean else None,
                )
        heads = "with outlier channels" if outliers else "without outlier channels"
        axes.set(title=heads, xlabel="bytes of a token's key and value", yscale="log")
        axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("divergence of attention, nats")
    panels[0, -1].legend(
        title="filled: less\nthe mean key", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one head of each kind, 1024 tokens")
    parser.add_argument("--seeds", type=int, default=4, help="heads of each kind")
    parser.add_argument("--sinks", type=int, default=0, help="first tokens that are kept exact")
    parser.add_argument("--recent", type=int, default=0, help="last tokens that are kept exact")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the comparison, as SVG")
    args = parser.parse_args(argv)
    tokens, queries, seeds = (1024, 64, 1) if args.quick else (4096, 128, args.seeds)
    found: list[Case] = []
    for outliers in (True, False):
        kind = list(cases(tokens, queries, seeds, outliers, args.sinks, args.recent))
        print("With outlier channels:" if outliers else "Without:")
        print(show(kind) + "\n", flush=True)
        found += kind
    rows = rows_of(found)
    print(rows_table([row for row in rows if row.target is not None]))
    if args.plot is not None:
        draw(found, args.plot)
    print(json_line("kv_quality", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
