"""How long a server takes to start, and what its API process occupies.

    python -m benchmarks.startup

Starts `foresight serve` with the bundled model again and again and times it from the start of the
process, imports included, to the first 200 of /ready. One more start, with an empty cache, times
the background build of the native kernels. The memory is the API process's after a few requests.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.closed_loop import Load, Server, measure
from benchmarks.local_server import LocalServer, local_server, model_flags
from benchmarks.report import Row, json_line, median_interval, rows_table
from benchmarks.streaming import Endpoint
from benchmarks.workload import PromptPool, tokenized_text

ready_target = 5.0  # seconds
memory_target = 250.0  # MB


def exercise(server: LocalServer) -> None:
    """Some streams, so that what is loaded lazily is loaded."""
    endpoint = Endpoint.parse(server.url)
    pool = PromptPool(tokenized_text(endpoint, "m", 1000), 64, 0, 0)
    tested = Server("server", endpoint, "m", pool, None)
    uvloop.run(measure(tested, 8, Load(False, 32, 2, 120)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, default=Path("assets/demo/target"))
    parser.add_argument("--repeats", type=int, default=7, help="starts (7)")
    parser.add_argument("--quick", action="store_true", help="3 starts")
    args = parser.parse_args(argv)
    repeats = 3 if args.quick else args.repeats
    flags = model_flags(args.model)
    with tempfile.TemporaryDirectory() as cache:
        with local_server(*flags, cache=Path(cache)) as server:
            first, built = server.ready_seconds, server.native_seconds(300)
            exercise(server)
            memory = server.resident_megabytes()
        times = []
        for _ in range(repeats):  # the cache is filled now
            with local_server(*flags, cache=Path(cache)) as server:
                times.append(server.ready_seconds)
    ready, low, high = median_interval(times)
    rows = [
        Row("ready, s", ready, ready_target, "at most", (low, high)),
        Row("ready with an empty cache, s", first, ready_target, "at most"),
        Row("native kernels in use after, s", float("nan") if built is None else built),
        Row("API process memory, MB", memory, memory_target, "at most"),
    ]
    print(rows_table(rows))
    print(json_line("startup", rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
