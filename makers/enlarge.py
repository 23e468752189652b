"""Enlarge a small Qwen3 checkpoint to any larger Qwen3 shape that computes the same function.

    python -m makers.enlarge assets/demo/target /data/target-8b --shape qwen3-8b
    python -m makers.enlarge assets/demo/draft /data/draft-0.6b --shape qwen3-0.6b
    python -m makers.enlarge assets/demo/target /data/custom --hidden 1024 --layers 12 --heads 8 \\
        --kv-heads 4 --intermediate 2048 --vocab 8192

The result costs what a real model of that shape costs, in any engine, and writes the small model's
text up to rounding. How it works, for a small width D and a large width D':

- The small model's channels come first in the residual stream, zeros after. RMSNorm over D'
  channels sees the mean square shrink by D/D', so norm weights are multiplied by sqrt(D/D') and
  `rms_norm_eps` by D/D'.
- Query heads move to the front of the groups of their KV head; a KV head is repeated where the
  large shape has fewer query heads per KV head. Unused heads and unused MLP channels are computed
  from random weights, and the output projections read them with zeros.
- Extra layers have zero output projections and otherwise random weights.
- One spare channel holds `CONSTANT` in every row of the input embedding, and the output head of the
  extra vocabulary reads only that, with weight -1: those logits lie far below all others.
- Input embedding and output head are separate tensors, whatever the small model has.

Weights that meet only zeros are random too (standard deviation 0.02), so that no library or chip
takes a shortcut on zeros. Memory stays below one shard and one tensor.
"""

from __future__ import annotations

import argparse
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

CONSTANT = 1e-4  # too small to disturb a norm
# The final norm's weight on the spare channel: even where the residual stream has a mean square of
# 10^4, the extra logits lie below -100.
PUSH = 1e8
STD = 0.02
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Size:
    """The dimensions that are enlarged; head size and RoPE stay."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int


SHAPES = {
    "150m": Size(768, 12, 12, 4, 2048, 32_000),
    "600m": Size(1024, 36, 16, 8, 3072, 32_000),
    "qwen3-0.6b": Size(1024, 28, 16, 8, 3072, 151_936),
    "qwen3-1.7b": Size(2048, 28, 16, 8, 6144, 151_936),
    "qwen3-4b": Size(2560, 36, 32, 8, 9728, 151_936),
    "qwen3-8b": Size(4096, 36, 32, 8, 12_288, 151_936),
    "qwen3-14b": Size(5120, 40, 40, 8, 17_408, 151_936),
    "qwen3-32b": Size(5120, 64, 64, 8, 25_600, 151_936),
}


def size_of(config: dict[str, Any]) -> Size:
    """The dimensions of a Hugging Face config."""
    return Size(
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["intermediate_size"],
        config["vocab_size"],
    )


def place_heads(small: Size, large: Size) -> tuple[list[int], list[int]]:
    """Where the small heads go: the query slot of each small query head, and the small KV head held
    by each used large KV head (from the first on)."""
    group, wide = small.heads // small.kv_heads, large.heads // large.kv_heads
    copies = -(-group // wide)
    holders = [kv for kv in range(small.kv_heads) for _ in range(copies)]
    slots = []
    for head in range(small.heads):
        kv, index = divmod(head, group)
        slots.append((kv * copies + index // wide) * wide + index % wide)
    return slots, holders


def check(small: Size, large: Size) -> None:
    """Refuse shapes that cannot hold the small model, in one sentence each."""
    if large.heads % large.kv_heads:
        raise SystemExit(f"{large.heads} query heads do not divide into {large.kv_heads} KV heads.")
    if large.hidden <= small.hidden:
        raise SystemExit(f"The hidden size must exceed {small.hidden}: one channel is spare.")
    needed = len(place_heads(small, large)[1])
    if large.kv_heads < needed:
        raise SystemExit(f"This many query heads per KV head need {needed} KV heads or more.")
    for name in ("layers", "intermediate", "vocab"):
        if getattr(large, name) < getattr(small, name):
            raise SystemExit(f"{name} must be at least {getattr(small, name)}.")


class Source:
    """Lazy reading of a small checkpoint: one file or shards with an index."""

    def __init__(self, folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        self.handles = [safe_open(folder / name, "pt") for name in files]
        # A safetensors handle is no mapping: it has keys() and cannot be iterated.
        self.where = {k: handle for handle in self.handles for k in handle.keys()}  # noqa: SIM118

    def __call__(self, name: str) -> Tensor:
        """One tensor in float32."""
        return self.where[name].get_tensor(name).float()

    def __contains__(self, name: str) -> bool:
        return name in self.where


class Enlarger:
    """The large model's tensors, made one at a time."""

    def __init__(
        self,
        source: Source,
        config: dict[str, Any],
        large: Size,
        seed: int,
        dtype: torch.dtype,
        device: str = "cpu",
    ) -> None:
        self.source, self.large, self.seed, self.dtype = source, large, seed, dtype
        self.device = device
        self.small = size_of(config)
        self.head_dim: int = config["head_dim"]
        self.shrink = (self.small.hidden / large.hidden) ** 0.5
        self.slots, self.holders = place_heads(self.small, large)

    def random(self, name: str, rows: int, cols: int) -> Tensor:
        """Ordinary random weights [rows, cols]; they depend on the seed, the name and the kind of
        device alone. They are drawn on the device, which for large shapes takes a GPU no time, and
        live in host memory."""
        generator = torch.Generator(self.device)
        generator.manual_seed(self.seed * 2**32 + zlib.crc32(name.encode()))
        return (
            torch.randn(rows, cols, generator=generator, dtype=torch.float32, device=self.device)
            .mul_(STD)
            .to(self.dtype)
            .cpu()
        )

    def reading(self, name: str, rows: Tensor, target: Tensor, total: int) -> Tensor:
        """A projection [total, D'] from the residual stream: small `rows` [n, D] at rows `target`.

        The other rows stay random, as does what meets only zeros; the used rows must not see the
        spare channel.
        """
        out = self.random(name, total, self.large.hidden)
        out[target, : self.small.hidden] = rows.to(self.dtype)
        out[:, self.small.hidden] = 0
        return out

    def writing(self, cols: Tensor, target: Tensor, total: int) -> Tensor:
        """A projection [D', total] into the residual stream: small `cols` [D, n] at `target`."""
        out = torch.zeros(self.large.hidden, total, dtype=self.dtype)
        out[: self.small.hidden, target] = cols.to(self.dtype)
        return out

    def norm(self, weight: Tensor | None) -> Tensor:
        """A norm's weight over D' channels."""
        out = torch.full((self.large.hidden,), self.shrink)
        if weight is not None:
            out[: self.small.hidden] = weight * self.shrink
        return out.to(self.dtype)

    def channels(self, heads: list[int]) -> Tensor:
        """The channel numbers of whole heads."""
        return torch.cat([torch.arange(h * self.head_dim, (h + 1) * self.head_dim) for h in heads])

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """The tensors of one layer."""
        small, large, dim = self.small, self.large, self.head_dim
        prefix = f"model.layers.{index}."
        real = index < small.layers
        widths = {"q": large.heads * dim, "k": large.kv_heads * dim, "v": large.kv_heads * dim}
        used = {"q": self.slots, "k": list(range(len(self.holders)))}
        for letter, width in widths.items():
            name = f"{prefix}self_attn.{letter}_proj.weight"
            if not real:
                yield name, self.random(name, width, large.hidden)
                continue
            rows = self.source(name)
            if letter != "q":
                rows = rows[self.channels(self.holders)]
            target = self.channels(used["q" if letter == "q" else "k"])
            yield name, self.reading(name, rows, target, width)
        for letter in "qk":
            name = f"{prefix}self_attn.{letter}_norm.weight"
            weight = self.source(name) if real else torch.ones(dim)
            yield name, weight.to(self.dtype)
        nothing = torch.zeros(small.hidden, 0), torch.zeros(0, dtype=torch.long)
        name = f"{prefix}self_attn.o_proj.weight"
        cols = (self.source(name), self.channels(self.slots)) if real else nothing
        yield name, self.writing(*cols, large.heads * dim)
        for kind in ("gate", "up"):
            name = f"{prefix}mlp.{kind}_proj.weight"
            if real:
                target = torch.arange(small.intermediate)
                yield name, self.reading(name, self.source(name), target, large.intermediate)
            else:
                yield name, self.random(name, large.intermediate, large.hidden)
        name = f"{prefix}mlp.down_proj.weight"
        cols = (self.source(name), torch.arange(small.intermediate)) if real else nothing
        yield name, self.writing(*cols, large.intermediate)
        for kind in ("input_layernorm", "post_attention_layernorm"):
            name = f"{prefix}{kind}.weight"
            yield name, self.norm(self.source(name) if real else None)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the large model."""
        small, large = self.small, self.large
        name = "model.embed_tokens.weight"
        embed = self.source(name)
        table = torch.zeros(large.vocab, large.hidden, dtype=self.dtype)
        table[: small.vocab, : small.hidden] = embed.to(self.dtype)
        table[:, small.hidden] = CONSTANT
        yield name, table
        for index in range(large.layers):
            yield from self.layer(index)
        final = self.norm(self.source("model.norm.weight"))
        final[small.hidden] = PUSH
        yield "model.norm.weight", final
        head = torch.zeros(large.vocab, large.hidden, dtype=self.dtype)
        old = self.source("lm_head.weight") if "lm_head.weight" in self.source else embed
        head[: small.vocab, : small.hidden] = old.to(self.dtype)
        head[small.vocab :, small.hidden] = -1
        yield "lm_head.weight", head


def write_shards(
    tensors: Iterator[tuple[str, Tensor]], out: Path, shard_bytes: int, tell: Callable[[str], None]
) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index where they exceed one."""
    shards: list[dict[str, str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal held, size
        path = out / f"part-{len(shards)}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        shards.append(dict.fromkeys(held, path.name))
        tell(f"{total / 1e9:.2f} GB")
        held, size = {}, 0

    for name, tensor in tensors:
        count = tensor.numel() * tensor.element_size()
        if held and size + count > shard_bytes:
            flush()
        held[name] = tensor
        size += count
        total += count
    flush()
    if len(shards) == 1:
        (out / "part-0.safetensors").rename(out / "model.safetensors")
        return
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        final = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"part-{i}.safetensors").rename(out / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def enlarge(
    src: Path,
    out: Path,
    large: Size,
    *,
    seed: int = 0,
    dtype: str = "bfloat16",
    shard_bytes: int = 2_000_000_000,
    tell: Callable[[str], None] = lambda text: None,
    device: str = "cpu",
) -> None:
    """Write the enlarged checkpoint of `src` into the new or empty folder `out`. `device` draws the
    weights that do nothing."""
    config = json.loads((src / "config.json").read_text())
    if config.get("model_type") != "qwen3":
        raise SystemExit(f"{src} is not a Qwen3 checkpoint.")
    small = size_of(config)
    check(small, large)
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"{out} is not empty.")
    out.mkdir(parents=True, exist_ok=True)
    maker = Enlarger(Source(src), config, large, seed, DTYPES[dtype], device)
    write_shards(maker.tensors(), out, shard_bytes, tell)
    config |= {
        "hidden_size": large.hidden,
        "num_hidden_layers": large.layers,
        "max_window_layers": large.layers,
        "num_attention_heads": large.heads,
        "num_key_value_heads": large.kv_heads,
        "intermediate_size": large.intermediate,
        "vocab_size": large.vocab,
        "rms_norm_eps": config["rms_norm_eps"] * small.hidden / large.hidden,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
    }
    config.pop("layer_types", None)  # one entry per small layer; full attention is the default
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in COPIED:
        if (src / name).exists():
            shutil.copyfile(src / name, out / name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("src", type=Path, help="the small checkpoint")
    parser.add_argument("out", type=Path, help="folder of the large one (new or empty)")
    parser.add_argument("--shape", choices=SHAPES, help="a known shape")
    for name in Size.__dataclass_fields__:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"override {name}")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights that do nothing")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--shard-gb", type=float, default=2.0)
    args = parser.parse_args()
    base = (
        SHAPES[args.shape]
        if args.shape
        else size_of(json.loads((args.src / "config.json").read_text()))
    )
    given = {n: getattr(args, n) for n in Size.__dataclass_fields__ if getattr(args, n) is not None}
    enlarge(
        args.src,
        args.out,
        replace(base, **given),
        seed=args.seed,
        dtype=args.dtype,
        shard_bytes=int(args.shard_gb * 1e9),
        tell=lambda text: print(text, flush=True),
    )


if __name__ == "__main__":
    main()
