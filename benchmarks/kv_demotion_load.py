"""What demotion saves where memory runs out: one load, by what is done then.

    python -m benchmarks.kv_demotion_load
    python -m benchmarks.kv_demotion_load --policies aggressive --requests 16

In one process and without HTTP, the bundled target continues pieces of library modules at
temperature 1, all sent at once, in pools of the same bytes: `int8n` that pauses requests, `int8n`
that demotes pages first (`--kv-demote`), and `int4h`. "ample" is `int8n` with room for everybody;
how texts differ is told from its texts, which have the same seeds. All cases take turns, each round
with other texts. Nothing is drafted. Before the first round every case has answered in few tokens,
so that the `past-future` policy, which forecasts by what it has seen, is mistaken as it is when
answers suddenly get longer; `aggressive` lets in whoever fits now.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer

from benchmarks.kv_texts import unread
from benchmarks.report import Row, json_line, table
from engine.build import build_worker
from engine.llm import LLM, Choice
from scheduler.request import SamplingParams

PROMPT = 128  # tokens
SHORT = 32  # tokens of the answers before the first round
RARE = frozenset([1])  # never said, but a length is known beforehand if nothing can end a text
AMPLE = "ample"
CASES: dict[str, dict[str, Any]] = {
    AMPLE: {"kv_format": "int8n"},
    "int8n": {"kv_format": "int8n"},
    "int8n, demoting": {"kv_format": "int8n", "kv_demote": True},
    "int4h": {"kv_format": "int4h"},
}
COUNTERS = ("preemptions", "recomputed_tokens", "pages_demoted")
HEADER = ("policy", "pages", "tok/s", "pauses", "recomputed", "pages demoted", "texts demoted")
TEXTS = ("of", "texts that differ", "of these the same, median")


@dataclass(slots=True)
class Told:
    """One case, over rounds."""

    rates: list[float] = field(default_factory=list)  # output tokens per second
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    texts: list[Choice] = field(default_factory=list)

    def ask(self, llm: LLM, prompts: Sequence[Sequence[int]], each: list[SamplingParams]) -> None:
        before, started = llm.load(), time.monotonic()
        done = llm.generate(prompts, each, ignore_eos=True)
        seconds, after = time.monotonic() - started, llm.load()
        choices = [completion.choices[0] for completion in done]
        self.rates.append(sum(len(choice.tokens) for choice in choices) / seconds)
        for name in COUNTERS:
            self.counters[name] += getattr(after, name) - getattr(before, name)
        self.texts += choices


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two texts begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def judge(policy: str, told: dict[str, Told]) -> tuple[list[tuple[str, ...]], list[Row]]:
    lines, rows = [], []
    for name, case in told.items():
        pairs = [(a.tokens, b.tokens) for a, b in zip(case.texts, told[AMPLE].texts, strict=True)]
        other = [(a, b) for a, b in pairs if a != b]
        same = [shared(a, b) / len(a) for a, b in other]
        demoted = sum(choice.kv_demoted_tokens > 0 for choice in case.texts)
        rate = median(case.rates)
        lines.append(
            (
                policy,
                name,
                f"{rate:.0f}",
                *(f"{case.counters[counter]:,}" for counter in COUNTERS),
                str(demoted),
                str(len(pairs)),
                str(len(other)),
                f"{median(same):.0%}" if same else "",
            )
        )
        title = f"{policy}, {name}"
        rows += [
            Row(f"{title}: output tok/s", rate, interval=(min(case.rates), max(case.rates))),
            *(Row(f"{title}: {counter}", case.counters[counter]) for counter in COUNTERS),
            Row(f"{title}: texts with demoted tokens", demoted),
            Row(f"{title}: texts that differ", len(other)),
        ]
    pausing, demoting = told["int8n"].rates, told["int8n, demoting"].rates
    ratios = [b / a for a, b in zip(pausing, demoting, strict=True)]
    interval = (min(ratios), max(ratios))
    rows.append(Row(f"{policy}: demoting over pausing", median(ratios), interval=interval))
    return lines, rows


def measure(args: argparse.Namespace, policy: str) -> dict[str, Told]:
    rng, told = Random(policy), {name: Told() for name in CASES}
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    prompts = unread(tokenizer, (args.rounds + 1) * args.requests, PROMPT)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        llms = {
            name: stack.enter_context(
                LLM(
                    str(args.model),
                    builder=partial(build_worker, patient=True),
                    dtype=args.dtype,
                    cache_dir=args.cache_dir,
                    kv_bytes=(8 if name == AMPLE else 1) * args.kv_bytes,
                    max_num_seqs=args.seqs,
                    max_model_len=PROMPT + args.longest,
                    policy=policy,
                    drafters=(),
                    length_history=str(folder / f"{number}.json"),
                    **options,
                )
            )
            for number, (name, options) in enumerate(CASES.items())
        }
        for llm in llms.values():
            ends = frozenset(range(0, llm.facts.vocab_size, 2))  # every second token
            short = SamplingParams(args.longest, min_tokens=SHORT, stop_token_ids=ends)
            llm.generate(prompts[: args.requests], short)
        for number in range(1, args.rounds + 1):
            some = prompts[number * args.requests : (number + 1) * args.requests]
            each = [
                SamplingParams(
                    max_tokens=rng.randint(args.longest // 2, args.longest),
                    temperature=1.0,
                    seed=rng.getrandbits(32),
                    stop_token_ids=RARE,
                )
                for _ in some
            ]
            for name in rng.sample(list(llms), len(llms)):
                told[name].ask(llms[name], some, each)
            print(f"{policy}: round {number}", file=sys.stderr, flush=True)
    return told


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.kv_demotion_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", type=Path, default=Path("assets/demo/target"))
    add("--policies", nargs="+", default=["past-future", "aggressive"])
    add("--requests", type=int, default=32, help="in each round")
    add("--seqs", type=int, default=24, help="that run at the same time")
    add("--longest", type=int, default=896, help="answer, in tokens; the shortest is half of it")
    add("--kv-bytes", type=int, default=32 << 20, help="of every pool but the ample one")
    add("--rounds", type=int, default=2)
    add("--dtype", default="bfloat16")
    add("--cache-dir", help="where compiled kernels are kept")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    lines: list[tuple[str, ...]] = []
    rows: list[Row] = []
    for policy in args.policies:
        found = judge(policy, measure(args, policy))
        lines += found[0]
        rows += found[1]
    print(table((*HEADER, *TEXTS), lines))
    print(json_line("kv_demotion_load", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
