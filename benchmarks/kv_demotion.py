"""How far the words move when pages are demoted (`--kv-demote`).

    python -m benchmarks.kv_demotion
    python -m benchmarks.kv_demotion --versions plain --contexts 1024 --texts 4

The bundled target in fp32 arithmetic reads the last tokens of texts that it was not trained on,
after as many tokens before them as `--contexts` says; the tokens that are judged are the same
whatever the context. Before them all pages are whole; from the first one on everything that the
scheduler may demote is demoted, all the time, which is the most that can happen to a request:
all pages, of as many tokens as in the server, but the first and those of the latest `--kept`
tokens, 64 in the server. The forms of the model are those of benchmarks/kv_formats.py.

Next-token distributions are compared with those of dense pages, and with those of whole pages of
`int8n`; `int4h`, for comparison, has been read by all tokens before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks import kv_texts
from benchmarks.kv_formats import formats_of
from benchmarks.kv_texts import CPU, training_texts, unread, versions
from benchmarks.report import Row, json_line, table
from engine.config import CacheConfig
from kernels.cpu.build import start_build
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.presets import AUTO
from makers.demo_data import Corpus
from scheduler.policy import demotable
from worker.kv_pool import allocate_pool
from worker.kv_quality import CHUNK, Distance, Reader, one_row
from worker.runner import EagerRunner

MODEL_LENGTH = 8192  # tokens, the most that the bundled target takes
WHOLE = "int8n"
PAGE = CacheConfig().page_size  # which tokens may be demoted depends on it
HEADER = ("model", "context", "pages", "loss", "KL, nats", "same", "KL to whole", "same as whole")


def pages_of(reader: Reader, name: str, halves: bool = False) -> list[KVFormat]:
    """Of the layers, with pages of `PAGE`."""
    return formats_of(reader, name, halves=halves, page_size=PAGE)


def read_on(
    reader: Reader,
    formats: Sequence[KVFormat],
    tokens: Sequence[int],
    start: int,
    kept: Sequence[int | None],
) -> list[Tensor]:
    """[len(tokens) - start, vocab] fp32 each, of what follows the tokens from `start` on, when
    the latest of `kept` tokens and the first page keep all bits. None: all of them do.

    Both lengths are multiples of `PAGE`. What is before `start` is read once, from whole pages,
    then a page at a time from a copy of them.
    """
    reader.model.use_formats(formats)
    runner, spec = EagerRunner(reader.model, reader.ops), reader.model.spec
    pages = len(tokens) // PAGE
    kv = allocate_pool(spec, pages + 1, PAGE, reader.dtype, CPU, formats)
    ids, found = torch.tensor(tokens), []
    with torch.inference_mode():
        for at in range(0, start, CHUNK):
            count = min(CHUNK, start - at)
            runner.forward(ids[at : at + count], one_row(at, count, pages, page_size=PAGE), kv)
        for latest in kept:
            own, said = [layer.clone() for layer in kv], []
            for at in range(start, len(tokens), PAGE):
                batch = one_row(at, PAGE, pages, page_size=PAGE)
                entries = batch.page_table.clone()
                if latest is not None:
                    places = list(demotable(at, latest, PAGE))
                    entries[:, places] = ~(2 * entries[:, places])  # upper halves, where they are
                batch = replace(batch, page_table=entries)
                hidden = runner.forward(ids[at : at + PAGE], batch, own)
                said.append(runner.logits(hidden).log_softmax(-1))
            found.append(torch.cat(said))
    reader.model.use_formats([DENSE] * len(formats))
    return found


def readings(
    reader: Reader, tokens: Sequence[int], start: int, kept: Sequence[int]
) -> dict[str, Tensor]:
    """What follows each token from `start` on, [tokens, vocab], by how pages are kept."""
    found = {
        name: read_on(reader, pages_of(reader, name), tokens, start, [None])[0]
        for name in (AUTO, "int4h")
    }
    formats = pages_of(reader, WHOLE, halves=True)
    whole, *demoted = read_on(reader, formats, tokens, start, [None, *kept])
    names = [f"demoted, {latest} kept" for latest in kept]
    return {**found, WHOLE: whole, **dict(zip(names, demoted, strict=True))}


def judge(
    label: str,
    reader: Reader,
    texts: Sequence[Sequence[int]],
    context: int,
    last: int,
    kept: list[int],
) -> tuple[list[tuple[str, ...]], list[Row]]:
    to_dense: dict[str, Distance] = {}
    to_whole: dict[str, Distance] = {}
    for text in texts:
        tokens = text[-context - last :]
        following = torch.tensor(tokens[context + 1 :])
        found = {k: v[:-1] for k, v in readings(reader, tokens, context, kept).items()}
        dense, whole = found.pop(AUTO), found[WHOLE]
        for name, said in found.items():
            to_dense.setdefault(name, Distance()).add(said, dense, following)
            to_whole.setdefault(name, Distance()).add(said, whole, following)
    lines, rows = [], []
    for name, distance in to_dense.items():
        other = to_whole[name].cells()[1:]
        lines.append((label, f"{context:,}", name, *distance.cells(), *other))
        title = f"{label}, {context} before, {name}"
        count = distance.tokens
        rows += [
            Row(f"{title}: KL, nats", distance.divergence / count),
            Row(f"{title}: rise of the loss, nats", (distance.loss - distance.dense_loss) / count),
            Row(f"{title}: same first choice", distance.same / count),
            Row(f"{title}: KL to whole pages, nats", to_whole[name].divergence / count),
            Row(f"{title}: same first choice as whole pages", to_whole[name].same / count),
        ]
    print(f"{label}, {context} before: {count} tokens", file=sys.stderr, flush=True)
    return lines, rows


def parser() -> argparse.ArgumentParser:
    made = kv_texts.parser("kv_demotion", __doc__)
    add = made.add_argument
    add("--contexts", type=int, nargs="+", default=[256, 1024, 4096, 7168])
    add("--kept", type=int, nargs="+", default=[0, 64, 256], help="latest tokens not demoted")
    add("--texts", type=int, default=5)
    add("--last", type=int, default=1024, help="tokens of each text that are judged")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    ops = start_build(args.cache_dir).result()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = unread(tokenizer, args.texts, MODEL_LENGTH)
    calibration = training_texts(Corpus.load(), tokenizer)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    for label, reader in versions(args.model, ops, args.versions, calibration):
        for context in args.contexts:
            found = judge(label, reader, texts, context, args.last, args.kept)
            lines += found[0]
            rows += found[1]
    print(table(HEADER, lines))
    print(json_line("kv_demotion", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
