"""How often `int8n` changes the first choice, and how close the choice was there.

    python -m benchmarks.kv_ties
    python -m benchmarks.kv_ties --versions balanced --unread 4 --texts 0

The bundled target in fp32 arithmetic, its forms and the held-out texts as in
benchmarks/kv_formats.py; and, since those overlap, texts of library modules that it was not
trained on, no token of which is read twice. Wherever the likeliest next token is not that of dense
pages, the margin is how much likelier dense pages hold their first choice than their second, in
nats. Beside `int8n`: with the mean of keys that `foresight calibrate` would store; with a scale for
every 64 dimensions, which takes 3 % more memory; and, for scale, dense pages and the whole model in
bfloat16. The interval is Wilson's of 95 %, as if tokens were independent.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import kv_texts
from benchmarks.kv_formats import SAME, formats_of
from benchmarks.kv_texts import CPU, held_out, training_texts, unread, versions
from benchmarks.report import Row, json_line, percentile, rows_table, share_interval, table
from kernels.cpu.build import start_build
from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.codec import Affine
from kernels.kv.format import KVFormat
from kernels.kv.paged import Paged
from kernels.kv.presets import AUTO, layer_formats
from kernels.ops import Ops
from makers.demo_data import Corpus
from models.loader import load_decoder
from worker.kv_moments import key_means
from worker.kv_quality import PAGE, Reader

FORMAT = "int8n"
HEADER = ("texts", "model", "pages", "tokens", "changed", "same", "95 % interval")
MARGINS = ("median margin", "90 % below", "largest", "tokens below that")


@dataclass(slots=True)
class Choices:
    """First choices beside those of dense pages, over tokens; margins in nats."""

    tokens: int = 0
    changed: list[float] = field(default_factory=list)  # margins where the choice is another one
    margins: list[float] = field(default_factory=list)  # of every token

    def add(self, found: Tensor, dense: Tensor) -> None:
        """Both [tokens, vocab], log-probabilities."""
        first, second = dense.topk(2).values.unbind(-1)
        margins = first - second
        self.tokens += len(margins)
        self.margins += margins.tolist()
        self.changed += margins[found.argmax(-1) != dense.argmax(-1)].tolist()

    @property
    def same(self) -> float:
        return 1 - len(self.changed) / self.tokens

    @property
    def interval(self) -> tuple[float, float]:
        return share_interval(self.tokens - len(self.changed), self.tokens)

    def cells(self) -> tuple[str, ...]:
        low, high = self.interval
        share = f"{self.tokens:,}", str(len(self.changed)), f"{self.same:.2%}"
        largest = max(self.changed, default=math.nan)
        below = sum(margin <= largest for margin in self.margins) / self.tokens
        margins = (percentile(self.changed, 0.5), percentile(self.changed, 0.9), largest)
        return (*share, f"{low:.2%} to {high:.2%}", *(f"{m:.2g}" for m in margins), f"{below:.1%}")


def ways(
    reader: Reader, calibration: Sequence[Sequence[int]]
) -> dict[str, tuple[Reader, list[KVFormat]]]:
    """Who reads which pages, by name."""
    spec = reader.model.spec
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    fitted = Calibration(FORMAT, (), key_means(reader, calibration), Balance.nothing(shape))
    form = (spec.num_layers, spec.num_kv_heads, PAGE, spec.head_dim)
    finer = Paged(
        spec.num_kv_heads, PAGE, spec.head_dim, Affine(8, 64), Affine(8, 64), rotated=True
    )
    return {
        FORMAT: (reader, formats_of(reader, FORMAT)),
        f"{FORMAT}, key means": (reader, layer_formats(FORMAT, *form, None, fitted)),
        f"{FORMAT}, a scale for 64": (reader, [finer] * spec.num_layers),
    }


def in_bfloat16(model: Path, ops: Ops) -> tuple[Reader, list[KVFormat]]:
    """The model as it is served, on dense pages."""
    decoder = load_decoder(model, dtype=torch.bfloat16, device=CPU)
    reader = Reader(decoder, ops, torch.bfloat16, CPU)
    return reader, formats_of(reader, AUTO)


def compare(
    reader: Reader,
    others: Mapping[str, tuple[Reader, list[KVFormat]]],
    texts: Sequence[Sequence[int]],
) -> dict[str, Choices]:
    found = {name: Choices() for name in others}
    for tokens in texts:
        dense = reader.log_probabilities(tokens, formats_of(reader, AUTO))[:-1]
        for name, (other, formats) in others.items():
            found[name].add(other.log_probabilities(tokens, formats)[:-1], dense)
    return found


def parser() -> argparse.ArgumentParser:
    made = kv_texts.parser("kv_ties", __doc__)
    add = made.add_argument
    add("--texts", type=int, default=12, help="held-out texts to read")
    add("--unread", type=int, default=40, help="texts of library modules to read")
    add("--length", type=int, default=2048, help="tokens of each")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ops = start_build(args.cache_dir).result()
    corpus, tokenizer = Corpus.load(), Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = {
        "held-out": held_out(corpus, tokenizer, args.texts, args.length),
        "library": unread(tokenizer, args.unread, args.length),
    }
    calibration = training_texts(corpus, tokenizer)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    for label, reader in versions(args.model, ops, args.versions, calibration):
        others = ways(reader, calibration)
        if label == "plain":
            others["dense, bfloat16"] = in_bfloat16(args.model, ops)
        for kind, some in texts.items():
            found = compare(reader, others, some) if some else {}
            for name, choices in found.items():
                lines.append((kind, label, name, *choices.cells()))
                target = SAME[FORMAT] if name.startswith(FORMAT) else None
                title = f"{kind}, {label}, {name}: same first choice"
                rows.append(Row(title, choices.same, target, interval=choices.interval))
            print(f"{label}, {kind}: read", file=sys.stderr, flush=True)
    print(table((*HEADER, *MARGINS), lines) + "\n")
    print(rows_table(rows))
    print(json_line("kv_ties", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
