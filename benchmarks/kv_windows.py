"""What dense windows leave of what 2-bit formats change (`--kv-sink`, `--kv-window`).

    python -m benchmarks.kv_windows
    python -m benchmarks.kv_windows --versions plain --texts 2

The texts, the forms of the model and the comparison are those of benchmarks/kv_formats.py; each
format is read with each pair of windows. "left" is its divergence over that without windows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import product

import torch
from tokenizers import Tokenizer

from benchmarks import kv_texts
from benchmarks.kv_formats import AFFINE, Windowing, formats_of
from benchmarks.kv_texts import held_out, training_texts, versions
from benchmarks.report import Row, json_line, table
from kernels.cpu.build import start_build
from kernels.kv.presets import AUTO
from makers.demo_data import Corpus
from worker.kv_quality import Distance, Reader

NONE = (0, 0)
WINDOWS: tuple[Windowing, ...] = (
    NONE,
    (64, 0),
    (0, 64),
    (0, 128),
    (0, 256),
    (64, 128),
)  # first tokens, and a block
HEADER = ("model", "format", "sink", "window", "loss", "KL, nats", "same first choice", "left")


def distances(
    reader: Reader, names: Sequence[str], texts: Sequence[Sequence[int]]
) -> dict[tuple[str, Windowing], Distance]:
    """From dense pages, over all tokens but each text's last."""
    found: dict[tuple[str, Windowing], Distance] = {
        case: Distance() for case in product(names, WINDOWS)
    }
    for tokens in texts:
        following = torch.tensor(tokens[1:])
        dense = reader.log_probabilities(tokens, formats_of(reader, AUTO))[:-1]
        for (name, windows), distance in found.items():
            forms = formats_of(reader, name, windows=windows)
            distance.add(reader.log_probabilities(tokens, forms)[:-1], dense, following)
    return found


def parser() -> argparse.ArgumentParser:
    made = kv_texts.parser("kv_windows", __doc__)
    add = made.add_argument
    add("--formats", nargs="+", choices=AFFINE, default=["k4v2h", "int2h"])
    add("--texts", type=int, default=12, help="held-out texts to read")
    add("--length", type=int, default=2048, help="tokens of each")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ops = start_build(args.cache_dir).result()
    corpus, tokenizer = Corpus.load(), Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = held_out(corpus, tokenizer, args.texts, args.length)
    calibration = training_texts(corpus, tokenizer)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    for label, reader in versions(args.model, ops, args.versions, calibration):
        found = distances(reader, args.formats, texts)
        for (name, (sink, window)), distance in found.items():
            left = distance.divergence / found[name, NONE].divergence
            numbers = (str(sink), str(window), *distance.cells(), f"{left:.3f}")
            lines.append((label, name, *numbers))
            title = f"{label}, {name}, {sink} first, window {window}"
            rows += [
                Row(f"{title}: KL, nats", distance.divergence / distance.tokens),
                Row(f"{title}: rise of the loss", distance.rise),
                Row(f"{title}: same first choice", distance.same / distance.tokens),
            ]
        print(f"{label}: read", file=sys.stderr, flush=True)
    print(table(HEADER, lines))
    print(json_line("kv_windows", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
