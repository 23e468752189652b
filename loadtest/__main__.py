"""Runs one scenario headless against a running server and writes its report.

    python -m loadtest                                  the mixed scenario, 8 users, 60 seconds
    python -m loadtest --scenario chat --users 32 --time 120

Bounded: the run ends after `--time` seconds or `--max-requests` requests, whichever is first.
Exit status 1 when a request failed (see `--allow-errors`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest import report
from loadtest.results import read
from loadtest.scenario import load_all


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m loadtest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = out.add_argument
    add("--scenario", choices=sorted(load_all()), default="mixed", help="default: mixed")
    add("--host", default="http://127.0.0.1:8000", help="the server's base URL (loopback)")
    add("--users", type=int, default=8, help="simulated users (8)")
    add("--spawn-rate", type=float, default=4.0, help="users started a second (4)")
    add("--time", type=int, default=60, metavar="S", help="seconds (60)")
    add("--max-requests", type=int, default=10_000, help="requests (10000)")
    add("--model", default="", help="default: the first that /v1/models lists")
    add("--api-key", default="", help="sent as a bearer token")
    add("--out", type=Path, default=Path("loadtest/reports"), help="folder (loadtest/reports)")
    add("--allow-errors", action="store_true", help="exit 0 even when requests failed")
    return out


def command(args: argparse.Namespace, prefix: Path) -> list[str]:
    """The locust command line of one run."""
    out = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "locustfile.py")]
    out += ["--headless", "--only-summary", "--skip-log", "--exit-code-on-error", "0"]
    out += ["--host", args.host, "--users", str(args.users), "--spawn-rate", str(args.spawn_rate)]
    out += ["--run-time", f"{args.time}s", "--stop-timeout", "30"]
    out += ["--max-requests", str(args.max_requests), "--samples", f"{prefix}_samples.jsonl"]
    out += ["--csv", str(prefix), "--csv-full-history"]
    for option, value in (("--model", args.model), ("--api-key", args.api_key)):
        if value:
            out += [option, value]
    return [*out, args.scenario.capitalize()]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    prefix = args.out / args.scenario
    done = subprocess.run(command(args, prefix), check=False)
    if done.returncode != 0:
        return done.returncode
    for path in report.write(prefix, load_all()[args.scenario]):
        print(path)
    answers = read(prefix).answers
    errors = sum(answer.error is not None for answer in answers)
    print(f"{len(answers)} requests, {errors} failed")
    if not answers:
        return 1
    return 1 if errors and not args.allow_errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
