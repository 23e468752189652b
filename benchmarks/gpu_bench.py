"""What a GPU must show: `make gpu-bench`.

    python -m benchmarks.gpu_bench [--only TABLE ...] [--minutes 9] [--vllm-site DIR] [--json FILE]
                                   [--work-dir DIR] [--dry-run]

- rates: what the device does at most: copy and read bandwidth, bf16 matrix products;
- decode: a decode step of the 8B shape with 1k of context over what its bytes take at the copy
  bandwidth measured in the same process, and the longest time a step leaves the GPU idle;
- prefill: a prompt of 8k tokens over the matrix rate measured in the same process;
- attention: attention over compressed pages beside dense ones at 32k of context, 16 rows, as the
  difference between steps of long and of short context; eight layers of the 8B shape, so that
  dense pages fit on any GPU;
- speculation: the bundled pair enlarged to Qwen3-8B and Qwen3-0.6B, with the draft model and with
  drafts of known acceptance that cost nothing, over plain decoding;
- weights: decode steps with quantized weights, if this build has them;
- moe: decode steps of Qwen3-30B-A3B's shape;
- peers: tokens per second beside vLLM (`--vllm-site`: the folder it is installed in) and the
  transformers library's continuous batching, on the same random weights of Llama-3.1-8B's shape.

Every table runs in a process of its own and is stopped when the time is up; models are made here,
in `--work-dir` or where there is room. `--dry-run` does all of it on a CPU with tiny models: it
shows that the tables work, and claims nothing. Exits 1 when a table failed to run; a target that
was missed says so in its line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_device import Machine, Rates, measure_rates, roomy_folder
from benchmarks.gpu_models import (
    PROJECT,
    Models,
    kv_numbers,
    parameters_read,
    prefill_operations,
)
from benchmarks.gpu_parts import Note, parts_parser, run_parts, tell
from benchmarks.gpu_peers import parse_points, prompts_for
from benchmarks.gpu_steps import engine, limits_for
from benchmarks.report import Row
from engine.config import ModelConfig
from engine.llm import LLM
from models.loader import read_spec
from scheduler.request import SamplingParams
from worker.drafters import registry
from worker.drafters.base import Ask, Guess

Found = Iterator[Row | Note]
BF16 = 2  # bytes
ROOM = 20_000_000_000  # bytes for the models that are written


@dataclass(frozen=True, slots=True)
class Setting:
    on: Machine
    models: Models
    vllm_site: Path | None

    def of(self, full: Any, dry: Any) -> Any:
        """A size: for real, and for a dry run."""
        return dry if self.on.dry else full

    def judged(self, metric: str, value: float, target: float, sense: Any = "at least") -> Row:
        """A row with a target; without one in a dry run, which claims nothing."""
        return Row(metric, value, None if self.on.dry else target, sense)


def rates(at: Setting) -> Found:
    yield from _rates(measure_rates(at.on))


def _rates(found: Rates) -> Iterator[Row]:
    yield Row("copy bandwidth, read and written, GB/s", found.copy / 1e9)
    yield Row("read bandwidth, GB/s", found.read / 1e9)
    yield Row("bf16 matrix product, TFLOP/s", found.matmul / 1e12)


def decode(at: Setting) -> Found:
    model = at.models.random("qwen3-8b")
    spec, limit = read_spec(model), measure_rates(at.on)
    yield from _rates(limit)
    context, steps = at.of(1024, 40), at.of(40, 3)
    batches = at.of((1, 8, 16, 32, 64), (1, 4))
    size = at.of(BF16, 4)
    with engine(at.on, model, **limits_for(max(batches), context)) as made:
        for rows in batches:
            times = made.decode(rows, context, steps)
            moved = size * (parameters_read(spec) + rows * context * kv_numbers(spec))
            name = f"decode, 8B bf16, {rows} rows, {context} of context"
            yield Row(f"{name}: step, ms", times.seconds * 1e3)
            yield Row(f"{name}: from result to result, ms", times.wall * 1e3)
            share = moved / limit.copy / times.seconds
            least = 0.80 if rows == 1 else 0.85
            yield at.judged(f"{name}: roofline / step", share, least)
            idle = f"{name}: longest idle time a step, µs"
            yield at.judged(idle, times.idle * 1e6, 50, "at most")


def prefill(at: Setting) -> Found:
    model, tokens = at.models.random("qwen3-8b"), at.of(8192, 96)
    limit = measure_rates(at.on)
    options = limits_for(1, tokens) | {"max_step_tokens": tokens}
    with engine(at.on, model, **options) as made:
        seconds = made.prefill(tokens)
    done = prefill_operations(read_spec(model), tokens) / seconds
    name = f"prefill, 8B bf16, {tokens} tokens"
    yield Row(f"{name}: ms", seconds * 1e3)
    yield Row(f"{name}: TFLOP/s", done / 1e12)
    yield at.judged(f"{name}: over the matrix rate", done / limit.matmul, 0.60)


def attention(at: Setting) -> Found:
    model = at.models.random("qwen3-8b", num_hidden_layers=at.of(8, 2))
    rows, long, short = at.of((16, 32_000, 16), (2, 96, 16))
    steps = at.of(20, 3)
    targets = {"int8n": 1.6, "int4h": 2.2}
    dense = 0.0
    for form in ("auto", *targets):
        with engine(at.on, model, kv_format=form, **limits_for(rows, long)) as made:
            step = made.decode(rows, long, steps).seconds
            seconds = step - made.decode(rows, short, steps).seconds
        name = f"attention, {form}, {rows} rows, {long} of context"
        yield Row(f"{name}: ms a layer", seconds * 1e3 / at.of(8, 2))
        yield Row(f"{name}: step of 8 layers, ms", step * 1e3)
        if form == "auto":
            dense = seconds
        else:
            yield at.judged(f"{name}: dense / it", dense / seconds, targets[form])


def speculation(at: Setting) -> Found:
    target, draft = at.models.pair(at.on.device)
    batches, tokens = at.of((1, 8, 64, 256), (1, 2)), at.of(96, 12)
    count = max(batches)
    common = {
        "model": str(target),
        "device": at.on.device,
        "max_num_seqs": count,
        "max_model_len": 512,
        "num_pages": count * 32 + 1,
        "swap_bytes": 0,
        "compile": False,
    }

    def run(llm: LLM, rows: int) -> tuple[float, list[tuple[int, ...]]]:
        """Tokens a second, best of two, and the texts."""
        params = SamplingParams(max_tokens=tokens, temperature=0.0)
        best, texts, asked = 0.0, [], prompts(llm)[:rows]
        for _ in range(2):
            started = time.perf_counter()
            done = llm.generate(asked, params, ignore_eos=True)
            texts = [completion.choices[0].tokens for completion in done]
            best = max(best, sum(map(len, texts)) / (time.perf_counter() - started))
        return best, texts

    def prompts(llm: LLM) -> list[tuple[int, ...]]:
        asked = [f"{ask.format(f=name)}" for name in NAMES for ask in ASKED]
        return [
            llm.tokenize_chat([{"role": "user", "content": asked[i % len(asked)]}])
            for i in range(count)
        ]

    plain: dict[int, float] = {}
    texts: dict[int, list[tuple[int, ...]]] = {}
    with LLM(**common, drafters=()) as llm:
        known = prompts(llm)
        for rows in batches:
            plain[rows], texts[rows] = run(llm, rows)
            yield Row(f"speculation, plain, {rows} rows: tok/s", plain[rows])
    at.on.free()

    def compared(name: str, llm: LLM, least_at_one: float | None) -> Found:
        for rows in batches:
            rate, found = run(llm, rows)
            least = least_at_one if rows == 1 and least_at_one else 0.98
            over = f"speculation, {name}, {rows} rows: over plain"
            yield at.judged(over, rate / plain[rows], least)
            apart = sum(a != b for a, b in zip(found, texts[rows], strict=True))
            yield Row(f"speculation, {name}, {rows} rows: texts that part from plain", apart)

    # The draft model alone: what looks texts up would know the second run's from the first.
    with LLM(**common, drafters=("model",), draft_model=str(draft)) as llm:
        yield from compared("enlarged pair", llm, 2.2)
    at.on.free()
    whole = [prompt + text for prompt, text in zip(known, texts[count], strict=True)]
    for chance in at.of((0.6, 0.8, 0.95), (0.8,)):
        # In place of the drafter that looks up the text itself.
        registry.MODEL_FREE["lookup"] = partial(KnownDrafter, whole, chance)
        with LLM(**common, drafters=("lookup",)) as llm:
            yield from compared(f"free drafts right with {chance}", llm, None)
        at.on.free()


class KnownDrafter:
    """Knows the texts, and is right with a known chance at every position, for no cost."""

    name = "lookup"

    def __init__(self, texts: Sequence[tuple[int, ...]], chance: float) -> None:
        self._texts, self._chance = texts, chance
        self._random = random.Random(0)
        self._of_slot: dict[int, tuple[int, ...]] = {}

    def admit(self, slot: int, group: bytes) -> None:
        self._of_slot.pop(slot, None)

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float) -> list[Guess]:
        return [self._guess(ask) for ask in asks]

    def _guess(self, ask: Ask) -> Guess:
        text, length = self._of_slot.get(ask.slot), len(ask.tokens)
        if text is None or list(text[:length]) != ask.tokens:
            text = next((t for t in self._texts if list(t[:length]) == ask.tokens), ())
            self._of_slot[ask.slot] = text
        right = text[length : length + ask.most]
        tokens = [t if self._random.random() < self._chance else t + 1 for t in right]
        return Guess(tokens, [self._chance] * len(tokens))

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        pass


def weights(at: Setting) -> Found:
    option = {field.name: field for field in dataclasses.fields(ModelConfig)}.get("quantization")
    if option is None:
        yield Note("weights: skipped, this build has no --quantization")
        return
    model, context, steps = at.models.random("qwen3-8b"), at.of(1024, 40), at.of(40, 3)
    plain = 0.0
    for form in (option.default, *(c for c in option.metadata["choices"] if c != option.default)):
        name = f"weights, {form}, 1 row, {context} of context"
        try:
            with engine(at.on, model, quantization=form, **limits_for(1, context)) as made:
                seconds = made.decode(1, context, steps).seconds
        except Exception as error:  # some forms need a checkpoint that was quantized
            yield Note(f"{name}: not measured: {error}")
            continue
        yield Row(f"{name}: step, ms", seconds * 1e3)
        if form == option.default:
            plain = seconds
            continue
        least = next((t for bits, t in (("8", 1.6), ("4", 2.4)) if bits in str(form)), None)
        over, ratio = f"{name}: bf16 / it", plain / seconds
        yield Row(over, ratio) if least is None else at.judged(over, ratio, least)


def moe(at: Setting) -> Found:
    model, context, steps = at.models.random("qwen3-30b-a3b"), at.of(1024, 40), at.of(20, 3)
    batches = at.of((1, 8, 32), (1, 4))
    with engine(at.on, model, **limits_for(max(batches), context)) as made:
        for rows in batches:
            times = made.decode(rows, context, steps)
            name = f"moe, 30B-A3B bf16, {rows} rows, {context} of context"
            yield Row(f"{name}: step, ms", times.seconds * 1e3)
            yield Row(f"{name}: longest idle time a step, µs", times.idle * 1e6)


def peers(at: Setting) -> Found:
    model = at.models.random("llama-3.1-8b")
    points = at.of("1:512:128,32:512:128,256:512:128", "1:16:4,4:16:4")
    theirs: dict[tuple[str, str], float] = {}
    if at.on.dry:
        yield Note("peers: other engines are not started in a dry run")
    elif at.vllm_site is None:
        yield Note("peers: vLLM skipped, --vllm-site does not say where it is")
    else:
        theirs |= _peer("vllm", model, points, at.vllm_site)
    if not at.on.dry:
        theirs |= _peer("transformers", model, points.rsplit(",", 1)[0], None)
    parsed = parse_points(points)
    length = max(prompt + output for _, prompt, output in parsed)
    most = max(requests for requests, _, _ in parsed)
    vocab = read_spec(model).vocab_size
    options = limits_for(most, length) | {"enable_prefix_cache": False}
    with engine(at.on, model, max_step_tokens=at.of(8192, 256), **options) as made:
        made.serve(prompts_for(2, 8, vocab), 4)
        for requests, prompt, output in parsed:
            rate = requests * output / made.serve(prompts_for(requests, prompt, vocab), output)
            point = f"{requests}:{prompt}:{output}"
            name = f"peers, {requests} requests of {prompt} + {output} tokens"
            yield Row(f"{name}: tok/s", rate)
            for (peer, where), other in theirs.items():
                if where == point:
                    yield Row(f"{name}: {peer}, tok/s", other)
                    over, ratio = f"{name}: over {peer}", rate / other
                    judged = peer.startswith("vllm")
                    yield at.judged(over, ratio, 1.0) if judged else Row(over, ratio)


def _peer(name: str, model: Path, points: str, site: Path | None) -> dict[tuple[str, str], float]:
    """Tokens per second by engine and point; nothing, and its output, when it does not run."""
    command = [sys.executable, "-m", "benchmarks.gpu_peers", name]
    path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [*command, "--model", str(model), "--points", points],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        print(done.stdout[-2000:], done.stderr[-4000:], flush=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    return {(line["engine"], line["point"]): line["tokens_per_s"] for line in lines}


NAMES = (
    *("json.dumps", "os.path.join", "re.sub", "itertools.chain", "random.shuffle", "math.isclose"),
    *("shutil.copyfile", "textwrap.dedent", "heapq.heappush", "bisect.insort", "zlib.crc32"),
    *("statistics.median", "time.sleep", "glob.glob", "copy.deepcopy", "struct.pack"),
)
ASKED = ("What does {f} do?", "Explain {f}.", "What is {f} for?", "Describe {f} in one sentence.")
PARTS: dict[str, Callable[[Setting], Found]] = {
    "rates": rates,
    "decode": decode,
    "prefill": prefill,
    "attention": attention,
    "speculation": speculation,
    "weights": weights,
    "moe": moe,
    "peers": peers,
}


def parser() -> argparse.ArgumentParser:
    made = parts_parser("gpu_bench", __doc__, PARTS)
    made.add_argument("--vllm-site", type=Path, help="folder that vLLM is installed in")
    made.add_argument(
        "--work-dir", type=Path, help="folder for models; default: memory, else temporary files"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    on = Machine.choose(args.dry_run)
    if args.part:
        setting = Setting(on, Models(args.work_dir, on.dry), args.vllm_site)
        return tell(PARTS[args.part](setting))
    parts = args.only or list(PARTS)
    room = ROOM if not on.dry and "speculation" in parts else 10_000_000
    place = roomy_folder(room, args.work_dir)
    with tempfile.TemporaryDirectory(dir=place, prefix="gpu-bench-") as folder:
        flags = ["--work-dir", folder, *["--dry-run"] * on.dry]
        if args.vllm_site:
            flags += ["--vllm-site", str(args.vllm_site)]
        _, well = run_parts("gpu_bench", on, parts, flags, args.minutes, args.json)
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
