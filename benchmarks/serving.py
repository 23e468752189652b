"""Throughput and latency of an OpenAI-compatible server under streamed load.

One server:

    python -m benchmarks.serving --base-url http://127.0.0.1:8000

A comparison in one run, the first named server against each other one, interleaved so that both
see the same machine:

    python -m benchmarks.serving --compare foresight=http://127.0.0.1:8000 \\
                                 --compare vllm=http://127.0.0.1:8001

The load is a closed loop: each stream sends its next request when the last one ended. Every
request has its own prompt of exactly `--prompt-tokens` tokens (ordinary text, distinct, so that a
prefix cache finds nothing unless `--shared-prefix` asks for it), temperature 0, and produces
exactly `--output-tokens` tokens (`ignore_eos`). Before each measured level one round warms up.

Reported, each the median over the repeats: output tokens per second (the server's own usage
counts, over the wall time from the first request to the last answer), time to first token (first
event with text) and inter-token time (between consecutive events with text; a server that bundles
tokens shows it under tokens/event), errors, and the share of a core this client itself used.

With --compare, servers take turns in alternating order and each ratio is the median over the
pairs, printed with a distribution-free 95 % interval; use at least seven repeats for a ratio near
one. Idle servers can still burn a core: `--freeze NAME=PID` stops that server's process tree
while another one is measured.

Ends with one JSON line. Exit status 1 when any request failed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import uvloop

from benchmarks.closed_loop import Load, Results, Server, figures, measure_all, ratio_rows
from benchmarks.freezing import ProcessTree
from benchmarks.report import Row, json_line, rows_table, table
from benchmarks.streaming import Endpoint
from benchmarks.workload import PromptPool, served_model, tokenized_text


def prepare(
    name: str,
    url: str,
    args: argparse.Namespace,
    process: ProcessTree | None,
    requests: int,
) -> Server:
    """Waits for the server and takes its model name and tokenized text."""
    endpoint = Endpoint.parse(url, args.api_key)
    deadline = time.monotonic() + args.wait
    while True:
        try:
            model = args.model or served_model(endpoint)
            # Room for every prompt to start at an offset of its own.
            size = requests + args.prompt_tokens + 1024
            tokens = tokenized_text(endpoint, model, size)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} at {endpoint.url} does not answer: {error}") from error
            time.sleep(0.5)
    pool = PromptPool(tokens, args.prompt_tokens, args.shared_prefix, args.seed)
    return Server(name, endpoint, model, pool, process)


def named(values: Sequence[str], option: str) -> dict[str, str]:
    """`NAME=VALUE` options as a dict, in order."""
    out: dict[str, str] = {}
    for value in values:
        name, separator, rest = value.partition("=")
        if not separator or not name or not rest:
            raise SystemExit(f"{option} takes NAME=VALUE, not {value!r}")
        out[name] = rest
    return out


def integers(text: str) -> list[int]:
    """`1,8,32` as numbers, each at least one."""
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("numbers must be positive")
    return numbers


def levels_with_targets(text: str) -> dict[int, float]:
    """`1:1.25,8:1.25` as {streams: ratio}."""
    pairs = (part.split(":") for part in text.split(",") if part)
    return {int(level): float(ratio) for level, ratio in pairs}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = out.add_argument
    add("--base-url", metavar="URL", help="the server, with or without /v1")
    add(
        "--compare",
        metavar="NAME=URL",
        action="append",
        default=[],
        help="a server of a comparison; repeat it, the first one is compared with the others",
    )
    add(
        "--freeze",
        metavar="NAME=PID",
        action="append",
        default=[],
        help="stop this server's process tree while another one is measured (same machine only)",
    )
    add("--model", help="the model's name (default: the first that /v1/models lists)")
    add("--api-key", help="sent as a bearer token")
    add("--streams", type=integers, default=[1, 8, 32], metavar="N,…", help="default 1,8,32")
    add("--prompt-tokens", type=int, default=128, metavar="N", help="default 128")
    add("--output-tokens", type=int, default=64, metavar="N", help="default 64")
    add("--rounds", type=int, default=4, metavar="N", help="requests per stream and repeat (4)")
    add("--repeats", type=int, default=7, metavar="N", help="measured repeats per level (7)")
    add("--shared-prefix", type=int, default=0, metavar="N", help="leading tokens all share (0)")
    add("--chat", action="store_true", help="use /v1/chat/completions instead of completions")
    add(
        "--targets",
        type=levels_with_targets,
        default={},
        metavar="N:R,…",
        help="ratios of output tok/s to reach with --compare, by streams, as 1:1.25,8:1.25,32:1.1",
    )
    add("--timeout", type=float, default=300, metavar="S", help="seconds a request may take (300)")
    add("--wait", type=float, default=0, metavar="S", help="seconds to wait for the servers (0)")
    add("--seed", type=int, default=0, help="of the choice of prompts (0)")
    add("--quick", action="store_true", help="2 rounds, 3 repeats: a look, not a result")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints tables and the JSON line. Returns the exit status."""
    out = parser()
    args = out.parse_args(argv)
    urls = named(args.compare, "--compare")
    if bool(urls) == bool(args.base_url):
        out.error("give either --base-url or --compare")
    if len(urls) == 1:
        out.error("--compare needs at least two servers")
    urls = urls or {"server": args.base_url}
    pids = named(args.freeze, "--freeze")
    if not pids.keys() <= urls.keys():
        out.error("--freeze names a server that --compare does not")
    if args.quick:
        args.rounds, args.repeats = min(args.rounds, 2), min(args.repeats, 3)

    trees = {name: ProcessTree(int(pid)) for name, pid in pids.items()}
    requests = sum(args.streams) * args.rounds * (args.repeats + 1)
    load = Load(args.chat, args.output_tokens, args.rounds, args.timeout)
    try:
        servers = [
            prepare(name, url, args, trees.get(name), requests) for name, url in urls.items()
        ]
        results = uvloop.run(measure_all(servers, args.streams, load, args.repeats))
    finally:
        for tree in trees.values():
            tree.resume()
    return show(results, list(urls), args)


def show(results: Results, names: Sequence[str], args: argparse.Namespace) -> int:
    """Prints the tables and the JSON line. Returns the exit status."""
    by_level = {key: figures(measures) for key, measures in results.items()}
    columns = list(next(iter(by_level.values())))
    lines = [
        (name, str(level), *(f"{values[column]:.4g}" for column in columns))
        for (name, level), values in by_level.items()
    ]
    print(table(("server", "streams", *columns), lines))
    rows = [
        Row(f"{column}, {name}, {level} streams", value)
        for (name, level), values in by_level.items()
        for column, value in values.items()
    ]
    ratios = [
        row
        for other in names[1:]
        for level in args.streams
        for row in ratio_rows(results, names[0], other, level, args.targets.get(level))
    ]
    if ratios:
        print("\n" + rows_table(ratios))
    failures = [error for measures in results.values() for m in measures for error in m.errors]
    for error in sorted(set(failures))[:10]:
        print(f"error ({failures.count(error)} times): {error}", file=sys.stderr)
    print(json_line("serving", ratios + rows))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
