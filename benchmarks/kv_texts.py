"""What formats of keys and values are judged by: texts, and the forms of the bundled target."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from kernels.ops import Ops
from makers.demo_data import Corpus
from models.decoder import Decoder, DecoderLayer
from models.loader import load_decoder
from worker.kv_moments import balance
from worker.kv_quality import Reader

CPU = torch.device("cpu")
# Modules of the standard library that the models were not trained on (`MODULES` of
# makers/demo_facts.py): 167,000 tokens, where the held-out texts have 20,000.
UNREAD = ("turtle", "pydoc", "pickletools", "mailbox", "imaplib", "nntplib", "aifc")
VERSIONS = ("plain", "outliers", "balanced")


def held_out(corpus: Corpus, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Texts that the models were not trained on. They overlap: there are few long ones."""
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


def unread(tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """Pieces of the sources of `UNREAD`, no token of which is in two. Raises ValueError for more
    than there are."""
    made: list[list[int]] = []
    for name in UNREAD:
        found = find_spec(name)
        assert found is not None
        assert found.origin is not None
        ids = tokenizer.encode(Path(found.origin).read_text()).ids
        made += [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if len(made) < count:
        raise ValueError(f"there are only {len(made)} pieces of {length} tokens")
    return Random("unread").sample(made, count)


def training_texts(corpus: Corpus, tokenizer: Tokenizer) -> list[list[int]]:
    """What a user would calibrate with: not what formats are judged by."""
    some = Random("calibration").sample(corpus.texts, 6)
    return [tokenizer.encode(text[:6000]).ids[:1024] for text in some]


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


def versions(
    model: Path, ops: Ops, names: Sequence[str], calibration: Sequence[Sequence[int]]
) -> Iterator[tuple[str, Reader]]:
    """The model in fp32 as it is ("plain"), made to look like a large one ("outliers"), and that
    one after `foresight calibrate` has made its channels alike by the texts given ("balanced")."""
    for name in names:
        decoder = load_decoder(model, dtype=torch.float32, device=CPU)
        reader = Reader(decoder, ops, torch.float32, CPU)
        if name != "plain":
            inject_outliers(decoder)
        if name == "balanced":
            balance(reader, calibration)
        yield name, reader


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """With the options that all have who judge formats by the forms of one model."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--model", type=Path, default=Path("assets/demo/target"))
    made.add_argument("--versions", nargs="+", choices=VERSIONS, default=list(VERSIONS))
    made.add_argument("--cache-dir", type=Path, help="where compiled kernels are kept")
    return made
