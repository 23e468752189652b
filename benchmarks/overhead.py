"""What the whole server costs over its engine: HTTP, two processes, text, against `LLM` in-process.

    python -m benchmarks.overhead

The same checkpoint, options and prompts: once through `foresight serve` with a closed loop of
streams, once through the offline `LLM` in a process of its own with as many slots, which is given
its next prompt when one is done. They take turns, and whichever is not measured is stopped. Two
ratios: output tokens per second with all streams busy, and the time to the first token of a lone
request, server less engine.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import re
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from statistics import median

import uvloop

from benchmarks.closed_loop import Load, Server, measure
from benchmarks.freezing import ProcessTree
from benchmarks.local_server import local_server, model_flags
from benchmarks.report import Row, json_line, median_interval, percentile, rows_table
from benchmarks.streaming import Endpoint
from benchmarks.workload import PromptPool, tokenized_text

rate_target = 0.85
ttft_target = 3.0  # ms
native_patience = 120.0  # seconds for the native kernels


class Listener(logging.Handler):
    """Knows from the engine's log whether the native kernels are in use, or never will be."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.settled = threading.Event()
        for name in ("engine.build", "engine.llm"):
            logging.getLogger(name).addHandler(self)
            logging.getLogger(name).setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        if re.search(
            r"native\S* arithmetic|native kernels in use|plain torch", record.getMessage()
        ):
            self.settled.set()


def engine_process(pipe: Pipe, model: str, slots: int) -> None:
    """Answers (prompts, output tokens) with (tokens per second, milliseconds per prompt)."""
    from engine import llm as offline
    from engine.llm import LLM
    from scheduler.request import SamplingParams

    offline.WINDOW = 1  # a closed loop too: no request waits in the queue for another's slot
    listener = Listener()
    with LLM(model, max_num_seqs=slots) as llm:
        listener.settled.wait(native_patience)  # both sides are measured with native kernels
        pipe.send("ready")
        while (work := pipe.recv()) is not None:
            prompts, tokens = work
            params = SamplingParams(max_tokens=tokens, temperature=0)
            started = time.perf_counter()
            done = llm.generate(prompts, params, ignore_eos=True)
            seconds = time.perf_counter() - started
            made = sum(len(completion.choices[0].tokens) for completion in done)
            pipe.send((made / seconds, seconds / len(prompts) * 1e3))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, default=Path("assets/demo/target"))
    add("--streams", type=int, default=32)
    add("--prompt-tokens", type=int, default=128)
    add("--output-tokens", type=int, default=64)
    add("--rounds", type=int, default=4, help="requests per stream and repeat (4)")
    add("--repeats", type=int, default=9, help="interleaved pairs (9)")
    add("--quick", action="store_true", help="2 rounds, 3 repeats: a look, not a result")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.repeats = 2, 3
    rows = run(args)
    print(rows_table(rows))
    print(json_line("overhead", rows))
    return 0


def run(args: argparse.Namespace) -> list[Row]:
    flags = model_flags(args.model, ["--max-num-seqs", str(args.streams)])
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with local_server(*flags) as running:
        running.native_seconds(native_patience)
        arguments = (theirs, str(args.model), args.streams)
        process = context.Process(target=engine_process, args=arguments, daemon=True)
        process.start()
        assert process.pid is not None
        ours.recv()
        endpoint = Endpoint.parse(running.url)
        lone = 20  # requests, one after another, for the first token
        needed = (args.streams * args.rounds + lone) * (args.repeats + 1)
        size = needed + args.prompt_tokens + 1024
        pool = PromptPool(tokenized_text(endpoint, "m", size), args.prompt_tokens, 0, 0)
        server = Server("server", endpoint, "m", pool, running.tree)
        try:
            return compare(server, ours, ProcessTree(process.pid), args, lone)
        finally:
            running.tree.resume()
            process.terminate()
            process.join(10)


def compare(
    server: Server, engine: Pipe, engine_tree: ProcessTree, args: argparse.Namespace, lone: int
) -> list[Row]:
    assert server.process is not None
    busy = Load(False, args.output_tokens, args.rounds, 300)
    first = Load(False, 1, lone, 300)
    rates: list[float] = []
    delays: list[float] = []
    server_rates: list[float] = []
    engine_rates: list[float] = []
    for repeat in range(-1, args.repeats):  # -1 warms up
        mark = server.prompts.mark()
        engine_tree.stop()
        whole = uvloop.run(measure(server, args.streams, busy))
        alone = uvloop.run(measure(server, 1, first))
        if errors := whole.errors + alone.errors:
            raise SystemExit(f"a request failed: {errors[0]}")
        server.process.stop()
        engine_tree.resume()
        server.prompts.back_to(mark)  # the same prompts for both
        engine.send((server.prompts.take(args.streams * args.rounds), args.output_tokens))
        rate, _ = engine.recv()
        own = []
        for prompt in server.prompts.take(lone):
            engine.send(([prompt], 1))
            own.append(engine.recv()[1])
        server.process.resume()
        if repeat >= 0:
            server_rates.append(whole.output_rate)
            engine_rates.append(rate)
            rates.append(whole.output_rate / rate)
            delays.append(percentile(alone.ttft, 0.5) - median(own))
    ratio, low, high = median_interval(rates)
    delay, early, late = median_interval(delays)
    return [
        Row(
            f"output tok/s, server / engine, {args.streams} streams",
            ratio,
            rate_target,
            interval=(low, high),
        ),
        Row("TTFT when idle, server - engine, ms", delay, ttft_target, "at most", (early, late)),
        Row("output tok/s, server", median(server_rates)),
        Row("output tok/s, engine in-process", median(engine_rates)),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
