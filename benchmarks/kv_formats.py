"""What KV formats cost and save: text, capacity, the speed of attention.

    python -m benchmarks.kv_formats
    python -m benchmarks.kv_formats --quick

Quality is that of the bundled target in fp32 arithmetic, so that all differences are the format's:
held-out text is read in chunks of 256 tokens, every position attends to stored pages, and the
distributions of the next token are compared with those of dense pages, by position. "outliers" is
the same model made to look like a large one: pairs of key dimensions that rotate slowly are scaled
by six to fifteen, others at random, queries by the inverse, and values' dimensions at random, with
the output projection undoing it; in exact arithmetic that changes nothing. "own text" are 4,000
tokens that the model sampled with the format in use, read again with both. Boundary layers are as
the server sets them.

Capacity is counted in bytes of pages for Qwen3-8B. Attention is timed on native kernels in bf16:
one sequence, in turns, medians.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import torch
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.report import Row, json_line, rows_table, table
from engine.llm import LLM
from kernels.cpu.build import start_build
from kernels.cpu.ops import NativeOps
from kernels.kv.format import page_bytes
from kernels.kv.presets import AUTO, PRESETS, layer_formats
from kernels.ops import AttentionBatch, AttentionLayer
from makers.demo_data import Corpus, Mixture
from makers.demo_recall import lookup, needles
from models.decoder import Decoder, DecoderLayer
from models.loader import load_decoder
from scheduler.request import SamplingParams
from worker.kv_pool import allocate_pool
from worker.runner import EagerRunner

PAGE, CHUNK, CPU = 16, 256, torch.device("cpu")
BUCKETS = (0, 256, 1024, 4096)  # positions
# Wanted: at most this rise of the loss, and at least this share of the same first choices.
LOSS = {"int8n": 0.001, "int4h": 0.01, "int4h64": 0.01, "k4v2h": 0.03}
SAME = {"int8n": 0.995}
CAPACITY = {"int8n": 1.9, "int4h": 3.3, "k4v2h": 3.8}
SLOWER = 2.5  # times the time of dense attention, at most
QWEN3_8B = {"layers": 36, "heads": 32, "kv_heads": 8, "head_dim": 128}


@dataclass(slots=True)
class Reader:
    """Reads text with one format."""

    decoder: Decoder
    ops: NativeOps
    formats: list[str]
    longest: int

    def logits(self, tokens: Sequence[int], kv_format: str) -> Tensor:
        """[len(tokens), vocab] fp32 log-probabilities of what follows each token."""
        spec = self.decoder.spec
        forms = layer_formats(kv_format, spec.num_layers, spec.num_kv_heads, PAGE, spec.head_dim)
        self.decoder.use_formats(forms)
        pages = -(-len(tokens) // PAGE)
        kv = allocate_pool(spec, pages + 1, PAGE, torch.float32, CPU, forms)
        runner = EagerRunner(self.decoder, self.ops)
        found = []
        for start in range(0, len(tokens), CHUNK):
            ids = torch.tensor(tokens[start : start + CHUNK])
            hidden = runner.forward(ids, one_row(start, len(ids), pages), kv)
            found.append(runner.logits(hidden).log_softmax(-1))
        return torch.cat(found)


def one_row(start: int, count: int, pages: int) -> AttentionBatch:
    """A step of one sequence on pages 1, 2, ..."""
    positions = torch.arange(start, start + count)
    return AttentionBatch(
        positions=positions,
        token_rows=torch.zeros(count, dtype=torch.int64),
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        kv_lengths=torch.tensor([start + count], dtype=torch.int32),
        page_table=torch.arange(1, pages + 1, dtype=torch.int32)[None],
        kv_slots=positions + PAGE,
        max_query=count,
        max_kv=start + count,
    )


def inject_outliers(decoder: Decoder, seed: int = 0) -> None:
    """Scales keys and values so that they look like a large model's; outputs stay the same."""
    spec, rng = decoder.spec, torch.Generator().manual_seed(seed)
    half = spec.head_dim // 2
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.attention
        assert attention.q_norm is not None
        assert attention.k_norm is not None
        pair = torch.exp(0.5 * torch.randn(half, generator=rng))
        slow = torch.randperm(half // 4, generator=rng)[:4] + half - half // 4
        pair[slow] = 6 + 9 * torch.rand(4, generator=rng)
        both = torch.cat([pair, pair])
        attention.k_norm.data *= both
        attention.q_norm.data /= both
        value = torch.exp(0.7 * torch.randn(spec.num_kv_heads, spec.head_dim, generator=rng))
        qkv, output = attention.qkv.weight.data, attention.output.weight.data
        qkv[-spec.num_kv_heads * spec.head_dim :] *= value.flatten()[:, None]
        group = spec.num_heads // spec.num_kv_heads
        output /= value.repeat_interleave(group, 0).flatten()


@dataclass(slots=True)
class Distance:
    """Of one format from dense pages, over tokens."""

    tokens: int = 0
    loss: float = 0.0  # sums over tokens
    dense_loss: float = 0.0
    same: int = 0
    divergence: float = 0.0

    def add(self, found: Tensor, dense: Tensor, following: Tensor) -> None:
        self.tokens += len(following)
        self.loss -= float(found.gather(1, following[:, None]).sum())
        self.dense_loss -= float(dense.gather(1, following[:, None]).sum())
        self.same += int((found.argmax(-1) == dense.argmax(-1)).sum())
        self.divergence += float((dense.exp() * (dense - found)).sum())

    @property
    def rise(self) -> float:
        """Of the loss, relative."""
        return self.loss / self.dense_loss - 1.0

    def cells(self) -> tuple[str, ...]:
        agreed = f"{self.same / self.tokens:.2%}"
        return (f"{self.rise:+.3%}", f"{self.divergence / self.tokens:.2g}", agreed)


def quality(
    reader: Reader, texts: Sequence[Sequence[int]], label: str
) -> tuple[list[tuple[str, ...]], list[Row]]:
    """Lines by format and position, and the rows that have a target."""
    found = {
        (name, bucket): Distance() for name in reader.formats for bucket in range(len(BUCKETS) - 1)
    }
    whole = {name: Distance() for name in reader.formats}
    for tokens in texts:
        following = torch.tensor(tokens[1:])
        dense = reader.logits(tokens, AUTO)[:-1]
        for name in reader.formats:
            other = reader.logits(tokens, name)[:-1]
            whole[name].add(other, dense, following)
            for bucket in range(len(BUCKETS) - 1):
                part = slice(BUCKETS[bucket], BUCKETS[bucket + 1])
                if BUCKETS[bucket] < len(following):
                    found[name, bucket].add(other[part], dense[part], following[part])
        print(f"{label}: {len(tokens)} tokens", file=sys.stderr, flush=True)
    lines, rows = [], []
    for name in reader.formats:
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


def held_out(corpus: Corpus, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Texts that the models were not trained on."""
    rng = Random("kv formats")
    made: list[list[int]] = []
    texts = [text for text in corpus.unseen_texts if len(text) > 2 * length]
    while len(made) < count:
        text = rng.choice(texts)
        start = rng.randrange(max(len(text) - 6 * length, 1))
        ids = tokenizer.encode(text[start : start + 6 * length]).ids[:length]
        if len(ids) == length:
            made.append(ids)
    return made


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


def capacity(formats: Sequence[str]) -> list[Row]:
    """Tokens in the bytes of one dense token."""
    layers, heads = QWEN3_8B["layers"], QWEN3_8B["kv_heads"]
    dim = QWEN3_8B["head_dim"]

    def size(name: str) -> int:
        forms = layer_formats(name, layers, heads, PAGE, dim)
        return sum(page_bytes(form, heads, PAGE, dim, torch.bfloat16) for form in forms)

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
    add("--formats", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    add("--texts", type=int, default=12, help="held-out texts to read")
    add("--length", type=int, default=2048, help="tokens of each")
    add("--own", type=int, default=4000, help="tokens of the text that the model writes itself")
    add("--own-formats", nargs="*", choices=list(PRESETS), default=["int8n", "int4h", "k4v2h"])
    add("--needles", type=int, default=20, help="questions about hidden facts; 0: none")
    add("--rounds", type=int, default=15, help="of timing")
    add("--cache-dir", help="where compiled kernels are kept")
    add("--quick", action="store_true", help="two texts of 512 tokens, nothing generated")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.quick:
        args.texts, args.length, args.own_formats, args.needles = 2, 512, [], 0
    ops = start_build(Path(args.cache_dir) if args.cache_dir else None).result()
    corpus = Corpus.load()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    texts = held_out(corpus, tokenizer, args.texts, args.length)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    decoder = load_decoder(args.model, dtype=torch.float32, device=CPU)
    reader = Reader(decoder, ops, args.formats, args.length)
    plain = quality(reader, texts, "held-out")
    exact = reader.logits(texts[0], AUTO)
    for name in args.own_formats:
        own = own_text(args.model, name, args.own, args.cache_dir)
        alone = replace(reader, formats=[name])
        found = quality(alone, [own], "own text")
        lines += found[0]
    inject_outliers(decoder)
    changed = float((reader.logits(texts[0], AUTO).exp() - exact.exp()).abs().max())
    outliers = quality(reader, texts, "outliers")
    lines = [*plain[0], *outliers[0], *lines]
    rows += [*plain[1], *outliers[1]]
    rows.append(Row("outliers: largest change of a dense probability", changed, 1e-3, "at most"))
    if args.needles:
        dense = recall(args.model, AUTO, corpus, tokenizer, args.needles, args.cache_dir)
        rows.append(Row("dense: hidden facts told", dense))
        for name in args.own_formats:
            told = recall(args.model, name, corpus, tokenizer, args.needles, args.cache_dir)
            rows.append(Row(f"{name}: hidden facts told", told, dense if name == "int4h" else None))
    rows += capacity(args.formats)
    rows += attention_times(ops, args.formats, 8192, args.rounds)
    header = ("text", "format", "positions", "loss", "KL, nats", "same first choice")
    print(table(header, lines) + "\n")
    print(rows_table(rows))
    print(json_line("kv_formats", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
