"""Whether everything is right on a GPU: `make gpu-check`.

    python -m benchmarks.gpu_check [--only NAME ...] [--minutes 9] [--json FILE] [--dry-run]

- kernels: the tests of tests/kernels, which compare every kernel with its reference, on the GPU;
- logits: the bundled model's on the GPU against the CPU's, both in float32, and bfloat16's beside;
- engine-fp32: the text of requests served together must be, token for token, that of requests
  served one after another: with CUDA graphs and without, with drafts, prefix hits, chunks,
  preemption and swapping, greedy and seeded;
- engine-bf16: the same in bfloat16, where a matrix product may round differently beside other
  rows; how many texts part and how close the two tokens were is reported, not judged.

Every check runs in a process of its own, so that one that fails spoils no other, and is stopped
when the time is up. `--dry-run` does all of it on a CPU, with less of everything: it shows that the
checks work, and claims nothing about a GPU. Exits 1 when a check failed.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_device import Machine
from benchmarks.gpu_models import DEMO, PROJECT
from benchmarks.gpu_parts import parts_parser, run_parts, tell
from benchmarks.report import Row
from engine.build import build_worker
from engine.config import EngineConfig
from engine.llm import LLM
from kernels.ops import AttentionBatch
from kernels.torch_ops import TorchOps
from models.loader import load_decoder
from scheduler.request import Load, SamplingParams, SchedulerConfig
from worker.kv_pool import allocate_pool
from worker.worker import Worker

target, draft = DEMO / "target", DEMO / "draft"
Text = tuple[tuple[int, ...], tuple[float, ...]]  # tokens, and the margin of each over the next


@dataclass(frozen=True, slots=True)
class Served:
    """What came out of one engine."""

    texts: list[Text]
    arithmetic: str  # how it computes
    load: Load  # counters at the end


# What is compared with plain decoding, one request after another: options of the engine.
VARIANTS: dict[str, dict[str, Any]] = {
    "together": {"cuda_graphs": False},
    "CUDA graphs": {},
    "drafts of fixed length": {"drafters": ("suffix",), "fixed_draft_tokens": 3},
    "drafts of a model": {"drafters": ("model",), "draft_model": str(draft)},
    "the controller": {"drafters": ("suffix", "model"), "draft_model": str(draft)},
    "short chunks": {"max_step_tokens": 48, "max_num_seqs": 16},
    "no prefix cache": {"enable_prefix_cache": False},
    "preemption": {"num_pages": 40, "swap_bytes": 0, "policy": "aggressive", "watermark": 0.0},
    "swapping": {
        "num_pages": 40,
        "swap_bytes": 64 << 20,
        "policy": "aggressive",
        "watermark": 0.0,
    },
}
QUICK = ("CUDA graphs", "the controller", "preemption")


def kernels(on: Machine, quick: bool) -> Iterator[Row]:
    places = ["tests/kernels/sampling/test_accept.py"] if on.dry else ["tests/kernels"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *places]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    print(done.stdout[-3000:], done.stderr[-1000:], flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    yield Row("kernels against their references: passed", counts.get("passed", 0), 1)
    # An exit code without a count (nothing could be imported) is a failure as well.
    failed = counts.get("failed", 0) + counts.get("error", 0) or int(done.returncode != 0)
    yield Row("kernels against their references: failed", failed, 0, "at most")


def logits(on: Machine, quick: bool) -> Iterator[Row]:
    tokens = 40 if on.dry else 600
    wanted = prompt_logits("cpu", torch.float32, tokens)
    spread = float(wanted.std())
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, None)):
        found = prompt_logits(on.device, dtype, tokens)
        name = str(dtype).removeprefix("torch.")
        error = float((found - wanted).abs().max()) / spread
        difference = f"logits, {name}: largest difference from the CPU's, over their spread"
        yield Row(difference, error, limit, "at most")
        same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
        yield Row(f"logits, {name}: share of positions with the same best token", same)


def prompt_logits(device: str, dtype: torch.dtype, tokens: int) -> torch.Tensor:
    """Of a random text of the bundled model, by plain torch operations, in host memory."""
    place, page = torch.device(device), 16
    model = load_decoder(target, dtype=dtype, device=place, max_model_len=tokens)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.spec.vocab_size, (tokens,), generator=generator).to(place)
    pages = -(-tokens // page)
    at = torch.arange(tokens, device=place)
    batch = AttentionBatch(
        positions=at,
        token_rows=torch.zeros_like(at),
        query_starts=torch.tensor([0, tokens], dtype=torch.int32, device=place),
        kv_lengths=torch.tensor([tokens], dtype=torch.int32, device=place),
        page_table=torch.arange(1, pages + 1, dtype=torch.int32, device=place)[None],
        kv_slots=at + page,
        max_query=tokens,
        max_kv=tokens,
    )
    with torch.inference_mode():
        kv = allocate_pool(model.spec, pages + 1, page, dtype, place)
        return model.logits(model(ids, batch, kv, TorchOps())).float().cpu()


def engine_fp32(on: Machine, quick: bool) -> Iterator[Row]:
    yield from engine(on, "float32", quick, 0)


def engine_bf16(on: Machine, quick: bool) -> Iterator[Row]:
    yield from engine(on, "bfloat16", quick, None)


def engine(on: Machine, dtype: str, quick: bool, limit: float | None) -> Iterator[Row]:
    """Texts of all variants against those of one request after another, launch by launch."""
    count, tokens = (4, 12) if on.dry else (32, 64)
    common = {
        "model": str(target),
        "device": on.device,
        "dtype": dtype,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "drafters": (),
        # Rows that do not depend on how many there are: without it, a product of other shape may
        # round differently.
        "deterministic": dtype == "float32",
        "compile": False,
    }
    prompts = random_prompts(count)
    params = [
        SamplingParams(
            max_tokens=tokens,
            temperature=(0.0, 0.8, 1.0)[i % 3],
            top_p=0.9 if i % 3 == 1 else 1.0,
            seed=i,
            logprobs=2,
        )
        for i in range(count)
    ]
    alone = {"max_num_seqs": 1, "cuda_graphs": False, "enable_prefix_cache": False}
    wanted = serve(common | alone, prompts, params).texts
    variants = VARIANTS
    if quick:
        variants = {name: VARIANTS[name] for name in QUICK}
    for name, options in variants.items():
        served = serve(common | options, prompts, params)
        if not on.dry:  # with the few requests of a dry run it may not come to that
            yield Row(f"engine, {dtype}, {name}: at work", at_work(name, served), 1)
        parted = [divergence(a, b) for a, b in zip(wanted, served.texts, strict=True)]
        apart = sum(margin is not None for margin in parted)
        name = f"engine, {dtype}, {name}: texts that part, of {count}"
        yield Row(name, apart, limit, "at most")
        # Of greedy texts, whose choice is between the two most likely tokens.
        margins = [margin for margin in parted[::3] if margin is not None]
        if margins:
            yield Row(f"{name}: largest margin of the greedy ones", max(margins))


def random_prompts(count: int) -> list[list[int]]:
    """Of all lengths; many begin alike."""
    rng = random.Random(0)
    stems = [[rng.randrange(3, 4000) for _ in range(150)] for _ in range(2)]
    made = []
    for _ in range(count):
        own = [rng.randrange(3, 4000) for _ in range(rng.randrange(1, 60))]
        made.append(rng.choice(stems)[: rng.randrange(150)] + own)
    return made


def serve(
    options: dict[str, Any], prompts: list[list[int]], params: list[SamplingParams]
) -> Served:
    """What an engine with these options makes of them."""
    arithmetic: list[str] = []

    def build(
        config: EngineConfig, progress: Callable[[str], None]
    ) -> tuple[Worker, SchedulerConfig]:
        worker, limits = build_worker(config, progress)
        arithmetic.append(worker.facts.arithmetic)
        return worker, limits

    texts: list[Text] = []
    with LLM(**options, builder=build) as llm:
        for completion in llm.generate(prompts, params, ignore_eos=True):
            choice = completion.choices[0]
            margins = tuple(
                abs(entry.top[0][1] - entry.top[1][1]) if len(entry.top) > 1 else 0.0
                for entry in choice.logprobs
            )
            texts.append((choice.tokens, margins))
        return Served(texts, arithmetic[0], llm.load())


def at_work(name: str, served: Served) -> float:
    """How much of what a variant is named for has happened."""
    load = served.load
    if name == "CUDA graphs":
        return float("CUDA graphs" in served.arithmetic)
    if name == "preemption":
        return load.preemptions
    if name == "swapping":
        return load.pages_swapped_in
    return load.draft_tokens if "drafts" in name else 1.0


def divergence(wanted: Text, found: Text) -> float | None:
    """The margin between the two most likely tokens where two texts part; None if they are the
    same."""
    for i, (a, b) in enumerate(zip(wanted[0], found[0], strict=False)):
        if a != b:
            return wanted[1][i]
    return None if len(wanted[0]) == len(found[0]) else 0.0


PARTS: dict[str, Callable[[Machine, bool], Iterator[Row]]] = {
    "logits": logits,
    "engine-fp32": engine_fp32,
    "engine-bf16": engine_bf16,
    "kernels": kernels,
}


def parser() -> argparse.ArgumentParser:
    made = parts_parser("gpu_check", __doc__, PARTS)
    made.add_argument("--quick", action="store_true", help="fewer variants of the engine")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    on = Machine.choose(args.dry_run)
    if args.part:
        return tell(PARTS[args.part](on, args.quick))
    flags = ["--dry-run"] * args.dry_run + ["--quick"] * args.quick
    parts = args.only or list(PARTS)
    rows, well = run_parts("gpu_check", on, parts, flags, args.minutes, args.json)
    return 0 if well and all(row.met is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
