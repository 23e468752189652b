"""What passes between the supervisor and its engine process outside the message transport.

`Launch` is the first line the engine reads on its standard input, which then stays open: its end
means that the supervisor is gone. Reports come back as JSON lines on a pipe of their own, so that
they outlive the process and no library's output gets among them.
"""

from __future__ import annotations

import signal
import sys

import msgspec

from engine.config import EngineConfig

DEFAULT_BUILDER = "engine.build:build_worker"


class Launch(msgspec.Struct, frozen=True):
    """Everything an engine process is told."""

    address: str  # ipc://... to bind
    config: EngineConfig
    builder: str  # "module:function", see engine.process.Builder
    report_fd: int
    drain_seconds: float  # on SIGTERM
    log_level: str = "info"
    log_json: bool = True


class Phase(msgspec.Struct, tag=True, frozen=True):
    """A phase of the start has ended, `seconds` after the process began."""

    name: str
    seconds: float


class Up(msgspec.Struct, tag=True, frozen=True):
    """Bound, loaded and serving."""

    seconds: float


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The start failed, or the running engine met a fault. One sentence for a person."""

    message: str


Report = Phase | Up | Failed

_decoder = msgspec.json.Decoder(Report)

# `python -m MODULE`, but found wherever this process found its own.
_BOOT = (
    "import sys, json, importlib; sys.path[:] = json.loads(sys.argv[1]); "
    "importlib.import_module(sys.argv[2]).main()"
)


def boot(module: str) -> list[str]:
    """The command that runs a module's `main` in a process of its own."""
    return [sys.executable, "-c", _BOOT, msgspec.json.encode(sys.path).decode(), module]


def cause_of_end(code: int) -> str:
    """A process's return code, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def encode_report(report: Report) -> bytes:
    return msgspec.json.encode(report) + b"\n"


def decode_report(line: bytes) -> Report:
    return _decoder.decode(line)
