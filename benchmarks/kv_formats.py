"""What KV formats cost and save: text, capacity, the speed of attention.

    python -m benchmarks.kv_formats
    python -m benchmarks.kv_formats --quick

Quality is that of the bundled target in fp32 arithmetic, so that all differences are the format's:
held-out text is read in chunks of 256 tokens, every position attends to stored pages, and the
distributions of the next token are compared with those of dense pages, by position. "outliers" is
the same model made to look like a large one: pairs of key dimensions that rotate slowly are scaled
by six to fifteen, others at random, queries by the inverse, and values' dimensions at random, with
the output projection undoing it; in exact arithmetic that changes nothing. "balanced" is that one
after `foresight calibrate` has made its channels alike, by texts of the training. "sizes" is the
model with all keys of a layer and values of a head larger or smaller by a power of two, up to 1,024
either way, queries and the output projection undoing it. "own text" are 4,000 tokens that the model
sampled with the format in use, read again with both. Boundary layers are as the server sets them.
"fp8, scales" has a scale for each head, as calibrate finds them by the same texts of the training.

"exact mode" is int8n with drafts by the upper halves of its own pages.

Capacity is counted in bytes of pages for Qwen3-8B and a sequence of 8,192 tokens. Attention is
timed on native kernels in bf16, of the formats that they read: one sequence, in turns, medians.
`--sink` and `--window` give all formats dense windows, which count in quality and capacity, not in
attention's time. A sealed format has a window of 32 tokens at least.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from tokenizers import Tokenizer

from benchmarks.kv_texts import held_out, inject_outliers, training_texts
from benchmarks.report import Row, json_line, rows_table, table
from engine.build import build_worker
from engine.config import CacheConfig
from engine.llm import LLM
from kernels.cpu.build import start_build
from kernels.cpu.ops import NativeOps
from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.codec import Affine
from kernels.kv.format import KVFormat, dense_rows, page_bytes, windows_of
from kernels.kv.presets import AUTO, NAMES, PRESETS, SCALED, SEALED, layer_formats
from kernels.ops import AttentionLayer
from makers.demo_data import Corpus, Mixture
from makers.demo_recall import lookup, needles
from models.balance import apply_balance
from models.decoder import Decoder
from models.loader import load_decoder
from scheduler.request import SamplingParams
from worker.kv_moments import balance, head_scales
from worker.kv_quality import PAGE, Distance, Reader, one_row
from worker.window_pages import dense_page_count

CPU = torch.device("cpu")
BUCKETS = (0, 256, 1024, 4096)  # positions
# Wanted: at most this rise of the loss, and at least this share of the same first choices.
LOSS = {"int8n": 0.001, "int4h": 0.01, "int4h64": 0.01, "k4v2h": 0.03}
SAME = {"int8n": 0.995}
CAPACITY = {"int8n": 1.9, "int4h": 3.3, "k4v2h": 3.8}
AFFINE = [name for name, preset in PRESETS.items() if isinstance(preset.keys(), Affine)]
CONTEXT = 8192  # tokens
HALF_BITS, WHOLE_BITS = 4.25, 8.25  # of int8n's numbers in a head of 128, with their scales
LARGEST_SIZE = 10  # powers of two that heads are made larger or smaller by, at most
SLOWER = 2.5  # times the time of dense attention, at most
QWEN3_8B = {"layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128}


def inject_sizes(decoder: Decoder, seed: int = 0) -> None:
    """Makes heads larger and smaller; outputs stay the same bit for bit. Heads of keys share their
    norm, so all of a layer have one size."""
    spec, rng = decoder.spec, torch.Generator().manual_seed(seed)
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    keys = torch.randint(-LARGEST_SIZE, LARGEST_SIZE + 1, (shape[0], 1, 1), generator=rng)
    values = torch.randint(-LARGEST_SIZE, LARGEST_SIZE + 1, (*shape[:2], 1), generator=rng)
    apply_balance(decoder, Balance(keys.expand(shape), values.expand(shape)))


# First tokens and block of the latest that are dense; None: as the format has it.
Windowing = tuple[int, int | None]
UNASKED: Windowing = (0, None)


def formats_of(
    reader: Reader,
    name: str,
    boundary: int | None = None,
    windows: Windowing = UNASKED,
    fitted: Calibration | None = None,
    halves: bool = False,
    page_size: int = PAGE,
) -> list[KVFormat]:
    spec = reader.model.spec
    shape = (spec.num_layers, spec.num_kv_heads, page_size, spec.head_dim)
    near = UNASKED if name == AUTO else windows
    return layer_formats(name, *shape, boundary, fitted, *near, halves)


def with_scales(
    reader: Reader,
    names: Sequence[str],
    training: Sequence[Sequence[int]],
    boundary: int | None,
    windows: Windowing,
) -> dict[str, list[KVFormat]]:
    """By name, for `quality`; those whose heads can have scales once more, with them."""
    found = {name: formats_of(reader, name, boundary, windows) for name in names}
    spec = reader.model.spec
    means = torch.zeros(spec.num_layers, spec.num_kv_heads, spec.head_dim)
    for name in names:
        if name in SCALED:
            scales = head_scales(reader, training, means)
            fitted = Calibration(name, (), means, Balance.nothing(means.shape), scales)
            found[f"{name}, scales"] = formats_of(reader, name, boundary, windows, fitted)
    return found


def quality(
    reader: Reader,
    formats: Mapping[str, Sequence[KVFormat]],
    texts: Sequence[Sequence[int]],
    label: str,
) -> tuple[list[tuple[str, ...]], list[Row]]:
    """Lines by format and position, and the rows that have a target."""
    found = {(name, bucket): Distance() for name in formats for bucket in range(len(BUCKETS) - 1)}
    whole = {name: Distance() for name in formats}
    for tokens in texts:
        following = torch.tensor(tokens[1:])
        dense = reader.log_probabilities(tokens, formats_of(reader, AUTO))[:-1]
        for name, forms in formats.items():
            other = reader.log_probabilities(tokens, forms)[:-1]
            whole[name].add(other, dense, following)
            for bucket in range(len(BUCKETS) - 1):
                part = slice(BUCKETS[bucket], BUCKETS[bucket + 1])
                if BUCKETS[bucket] < len(following):
                    found[name, bucket].add(other[part], dense[part], following[part])
        print(f"{label}: {len(tokens)} tokens", file=sys.stderr, flush=True)
    lines, rows = [], []
    for name in formats:
        for bucket in range(len(BUCKETS) - 1):
            if found[name, bucket].tokens:
                span = f"{BUCKETS[bucket]} to {BUCKETS[bucket + 1]}"
                lines.append((label, name, span, *found[name, bucket].cells()))
        lines.append((label, name, "all", *whole[name].cells()))
        if name in LOSS:
            rise = whole[name].rise
            rows.append(Row(f"{label}, {name}: rise of the loss", rise, LOSS[name], "at most"))
        if name in SAME:
            share = whole[name].same / whole[name].tokens
            rows.append(Row(f"{label}, {name}: same first choice", share, SAME[name]))
    return lines, rows


def own_text(model: Path, name: str, length: int, cache: str | None) -> list[int]:
    """What the model writes at temperature 1 with the format in use."""
    with LLM(str(model), dtype="float32", kv_format=name, cache_dir=cache) as llm:
        prompt = llm.tokenize("The standard library of Python ")
        params = SamplingParams(max_tokens=length, temperature=1.0, seed=1)
        done = llm.generate([prompt], [params], ignore_eos=True)[0]
        return [*prompt, *done.choices[0].tokens]


def recall(
    model: Path, name: str, corpus: Corpus, tokenizer: Tokenizer, count: int, cache: str | None
) -> float:
    """Share of needles and looked-up values in about 1,000 tokens that are told exactly."""
    mixture, rng = Mixture(corpus, tokenizer), Random("recall")
    prompts, answers = [], []
    with LLM(str(model), dtype="float32", kv_format=name, cache_dir=cache) as llm:
        for i in range(count):
            task = (needles, lookup)[i % 2]
            question, answer = task(rng, partial(mixture.filler, rng), 1000)[0]
            prompts.append(llm.tokenize_chat([{"role": "user", "content": question}]))
            answers.append(answer)
        params = [SamplingParams(max_tokens=40, temperature=0.0) for _ in prompts]
        done = llm.generate(prompts, params)
    texts = [completion.choices[0].text.strip() for completion in done]
    return sum(a == b for a, b in zip(texts, answers, strict=True)) / count


def exact_mode(model: Path, lengths: Sequence[int], cache: str | None) -> list[Row]:
    """int8n drafted by the upper halves of its own pages, in bfloat16 after 6,000 tokens: whether
    the text is that of int8n alone, drafts accepted a step, and the bits of a cached number that
    are read for each token, when every draft reads the halves of four bits and every verification
    all eight, with their scales."""
    text, rows, expected = inspect.getsource(argparse), [], {}
    options = {"kv_format": "int8n", "cache_dir": cache, "max_num_seqs": 1}
    for length in (0, *lengths):
        drafting: dict[str, Any] = {"drafters": ()}
        if length:
            drafting = {"drafters": ("coarse",), "fixed_draft_tokens": length}
        patient = partial(build_worker, patient=True)
        with LLM(str(model), builder=patient, **options, **drafting) as llm:
            for temperature in (0.0, 1.0):
                params = SamplingParams(max_tokens=256, temperature=temperature, seed=1)
                before = llm.load()
                done = llm.generate([llm.tokenize(text)[:6000]], [params], ignore_eos=True)[0]
                after = llm.load()
                tokens = done.choices[0].tokens
                if not length:
                    expected[temperature] = tokens
                    continue
                label = f"exact mode, {length} drafts, temperature {temperature:g}"
                drafts = after.draft_tokens - before.draft_tokens
                taken = after.accepted_tokens - before.accepted_tokens
                verified = len(tokens) - taken
                bits = (drafts * HALF_BITS + verified * WHOLE_BITS) / len(tokens)
                same = tokens == expected[temperature]
                rows += [
                    Row(f"{label}: the same text", float(same), 1.0),
                    Row(f"{label}: accepted a step", taken / verified),
                    Row(f"{label}: share accepted", taken / drafts),
                    Row(f"{label}: bits read a number and token", bits, 6.0, "at most"),
                ]
    return rows


def capacity(formats: Sequence[str], windows: Windowing) -> list[Row]:
    """Tokens in the bytes of one dense token, for a sequence of `CONTEXT` and its windows."""
    layers, heads = QWEN3_8B["layers"], QWEN3_8B["kv_heads"]
    dim = QWEN3_8B["head_dim"]
    dtype = torch.bfloat16

    def size(name: str) -> int:
        near = UNASKED if name == AUTO else windows
        page = SEALED[name].group if name in SEALED else CacheConfig().page_size
        forms = layer_formats(name, layers, heads, page, dim, None, None, *near)
        copies = dense_page_count(windows_of(forms), 1, page, 0)
        return sum(
            (CONTEXT // page + dense_rows(form, copies, heads, page, dim, dtype))
            * page_bytes(form, heads, page, dim, dtype)
            for form in forms
        )

    return [
        Row(
            f"{name}: tokens in the bytes of a dense one",
            size(AUTO) / size(name),
            CAPACITY.get(name),
        )
        for name in formats
    ]


def attention_times(ops: NativeOps, formats: Sequence[str], context: int, rounds: int) -> list[Row]:
    """Of one decoding row of Qwen3-8B, over that of dense pages."""
    heads, kv_heads, dim = QWEN3_8B["heads"], QWEN3_8B["kv_heads"], QWEN3_8B["head_dim"]
    pages, generator = -(-context // PAGE), torch.Generator().manual_seed(0)
    shape = AttentionLayer(heads, kv_heads, dim, dim**-0.5, None)
    whole, last = one_row(0, context, pages), one_row(context - 1, 1, pages)
    k = torch.randn(context, kv_heads, dim, generator=generator).bfloat16()
    q = torch.randn(1, heads, dim, generator=generator).bfloat16()
    cases = {}
    for name in (AUTO, *formats):
        form = layer_formats(name, 1, kv_heads, PAGE, dim, 0)[0]
        layer = replace(shape, kv=form)
        size = (pages + 1, *form.page_shape(kv_heads, PAGE, dim))
        kv = torch.zeros(size, dtype=form.pool_dtype(torch.bfloat16))
        ops.append(k, k, layer, kv, whole)
        cases[name] = (layer, kv)
    ratios: dict[str, list[float]] = {name: [] for name in formats}
    for _ in range(rounds):
        times = {}
        for name, (layer, kv) in cases.items():
            started = time.perf_counter()
            for _ in range(4):
                ops.attend(q, kv, layer, last)
            times[name] = time.perf_counter() - started
        for name in formats:
            ratios[name].append(times[name] / times[AUTO])
    return [
        Row(f"{name}: attention at {context:,} tokens over dense", median(r), SLOWER, "at most")
        for name, r in ratios.items()
    ]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_formats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", type=Path, default=Path("assets/demo/target"))
    add("--formats", nargs="+", choices=NAMES, default=AFFINE)
    add("--texts", type=int, default=12, help="held-out texts to read")
    add("--length", type=int, default=2048, help="tokens of each")
    add("--boundary", type=int, help="layers at each end in 8 bits; default: as the server has it")
    add("--sink", type=int, default=0, help="first tokens that are dense")
    add("--window", type=int, help="block of the latest tokens that is dense")
    add("--own", type=int, default=4000, help="tokens of the text that the model writes itself")
    add("--own-formats", nargs="*", choices=list(PRESETS), default=["int8n", "int4h", "k4v2h"])
    add("--needles", type=int, default=20, help="questions about hidden facts; 0: none")
    add("--exact-lengths", type=int, nargs="*", default=[4, 8], help="of drafts on half pages")
    add("--rounds", type=int, default=15, help="of timing")
    add("--cache-dir", help="where compiled kernels are kept")
    add("--quick", action="store_true", help="two texts of 512 tokens, nothing generated")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.quick:
        args.texts, args.length, args.own_formats, args.needles = 2, 512, [], 0
        args.exact_lengths = [8]
    ops = start_build(Path(args.cache_dir) if args.cache_dir else None).result()
    corpus = Corpus.load()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = held_out(corpus, tokenizer, args.texts, args.length)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    decoder = load_decoder(args.model, dtype=torch.float32, device=CPU)
    reader = Reader(decoder, ops, torch.float32, CPU)
    windows = (args.sink, args.window)
    training = training_texts(corpus, tokenizer)

    def measure(label: str, names: Sequence[str] = args.formats) -> None:
        forms = with_scales(reader, names, training, args.boundary, windows)
        found = quality(reader, forms, texts, label)
        lines.extend(found[0])
        rows.extend(found[1])

    measure("held-out")
    exact = reader.log_probabilities(texts[0], formats_of(reader, AUTO))
    own_lines: list[tuple[str, ...]] = []
    for name in args.own_formats:
        own = own_text(args.model, name, args.own, args.cache_dir)
        own_lines += quality(reader, {name: formats_of(reader, name)}, [own], "own text")[0]
    inject_outliers(decoder)
    changed = reader.log_probabilities(texts[0], formats_of(reader, AUTO)).exp() - exact.exp()
    measure("outliers")
    balance(reader, training)
    measure("balanced")
    if scaled := [name for name in args.formats if name in SCALED]:
        reader.model = load_decoder(args.model, dtype=torch.float32, device=CPU)
        inject_sizes(reader.model)
        measure("sizes", scaled)
    lines += own_lines
    rows.append(
        Row(
            "outliers: largest change of a dense probability",
            float(changed.abs().max()),
            1e-3,
            "at most",
        )
    )
    if args.needles:
        dense = recall(args.model, AUTO, corpus, tokenizer, args.needles, args.cache_dir)
        rows.append(Row("dense: hidden facts told", dense))
        for name in args.own_formats:
            told = recall(args.model, name, corpus, tokenizer, args.needles, args.cache_dir)
            rows.append(Row(f"{name}: hidden facts told", told))
    if args.exact_lengths:
        rows += exact_mode(args.model, args.exact_lengths, args.cache_dir)
    rows += capacity(args.formats, windows)
    native = [name for name in args.formats if name in AFFINE]
    rows += attention_times(ops, native, 8192, args.rounds)
    header = ("text", "format", "positions", "loss", "KL, nats", "same first choice")
    print(table(header, lines) + "\n")
    print(rows_table(rows))
    print(json_line("kv_formats", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
