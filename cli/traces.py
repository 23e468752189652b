"""Options that `foresight simulate` and `foresight plan` share, and reading what they name."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cli.errors import CommandError
from scheduler.outcome import Targets
from scheduler.profile import Profile, ProfileError
from scheduler.request import SchedulerConfig
from scheduler.trace import TraceError, TraceRequest, dump_trace, parse_trace
from scheduler.workloads import WORKLOADS


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("trace")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", metavar="FILE", help="JSONL, one request a line")
    source.add_argument("--workload", choices=WORKLOADS, help="a made trace instead")
    group.add_argument("--rate", type=float, default=10.0, help="of a made trace, requests/s")
    group.add_argument("--requests", type=int, default=2000, help="of a made trace")
    group.add_argument("--scale", type=float, default=1.0, help="of a made trace's lengths")
    group.add_argument("--seed", type=int, default=0, help="of a made trace, and of the policy")
    group.add_argument("--save-trace", metavar="FILE", help="write the trace here")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("targets")
    group.add_argument("--ttft", type=float, default=10.0, help="seconds to the first token")
    group.add_argument("--mtpot", type=float, default=1.5, help="seconds between two tokens")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Those that have one value; the commands add the rest."""
    group = parser.add_argument_group("server")
    group.add_argument("--kv-tokens", type=int, required=True, help="token positions in the pool")
    group.add_argument("--page-size", type=int, default=16, help="token positions")
    group.add_argument("--max-model-len", type=int, default=8192, help="positions of one sequence")
    group.add_argument("--max-queued-requests", type=int, default=2048)
    group.add_argument("--watermark", type=float, default=0.05, help="of the aggressive policy")
    group.add_argument(
        "--refuse-late", action="store_true",
        help="the server knows the TTFT target, too: it refuses whom it predicts to miss it",
    )  # fmt: skip


def read_trace(given: argparse.Namespace) -> list[TraceRequest]:
    """The trace that was named or described. Raises `CommandError`."""
    if given.trace is not None:
        try:
            with Path(given.trace).open(encoding="utf-8") as lines:
                trace = parse_trace(lines)
        except (OSError, UnicodeDecodeError, TraceError) as error:
            raise CommandError(f"{given.trace}: {_reason(error)}.") from error
    else:
        for name in ("rate", "requests", "scale"):
            if not 0 < getattr(given, name) < float("inf"):
                raise CommandError(f"--{name} must be a positive number.")
        if given.seed < 0:
            raise CommandError("--seed must not be negative.")
        make = WORKLOADS[given.workload].make
        trace = make(np.random.default_rng(given.seed), given.rate, given.requests, given.scale)
    if given.save_trace is not None:
        write(Path(given.save_trace), "".join(f"{line}\n" for line in dump_trace(trace)))
    return trace


def read_profile(path: str) -> Profile:
    """Raises `CommandError`."""
    try:
        return Profile.parse(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ProfileError) as error:
        raise CommandError(f"{path}: {_reason(error)}.") from error


def targets_of(given: argparse.Namespace) -> Targets:
    try:
        return Targets(given.ttft, given.mtpot)
    except ValueError as error:
        raise CommandError(f"{error}.") from error


def scheduler_config(given: argparse.Namespace, **limits: Any) -> SchedulerConfig:
    """Limits of one replica; its server knows the MTPOT target, and with --refuse-late that of the
    first token. Raises `CommandError`."""
    if given.page_size < 1 or given.kv_tokens < given.page_size:
        raise CommandError("--kv-tokens must hold at least one page of --page-size.")
    try:
        return SchedulerConfig(
            num_pages=given.kv_tokens // given.page_size + 1,
            page_size=given.page_size,
            max_model_len=given.max_model_len,
            max_queued_requests=given.max_queued_requests,
            ttft_target=given.ttft if given.refuse_late else None,
            mtpot_target=given.mtpot,
            **limits,
        )
    except ValueError as error:
        raise CommandError(f"{error}.") from error


def write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {_reason(error)}.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "this is no text"
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
