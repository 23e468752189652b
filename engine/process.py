"""The engine process: `python -m engine.process`, started and watched by `engine.supervisor`."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import FrameType
from typing import Protocol

import msgspec

from engine.config import EngineConfig
from engine.core import EngineCore, StepWorker
from engine.errors import StartupError, WorkerLostError
from engine.launch import Failed, Launch, Phase, Report, Up, encode_report
from engine.logs import configure_logging
from engine.messages import EngineFacts
from engine.scheduling import build_scheduler, keep_history
from engine.transport import ZmqEngineTransport
from scheduler.request import SchedulerConfig

log = logging.getLogger(__name__)

# The loop and the worker share the interpreter. At the default of 5 ms a step could wait that long
# for the loop's bookkeeping, or an answer for the worker's.
SWITCH_INTERVAL = 0.0005
# Logprobs a step computes at most per token; the API process has its own, lower limit.
MAX_LOGPROBS = 128


class WorkerFacts(Protocol):
    """What a worker says about itself; `worker.worker.WorkerFacts` does."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def device(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def drafters(self) -> tuple[str, ...]: ...
    @property
    def beside(self) -> float: ...


class BuiltWorker(StepWorker, Protocol):
    @property
    def facts(self) -> WorkerFacts: ...

    @property
    def lost(self) -> Future[str]:
        """Resolves, in a sentence, when steps cannot succeed any more."""
        ...


Builder = Callable[[EngineConfig, Callable[[str], None]], tuple[BuiltWorker, SchedulerConfig]]


class Reporter:
    """Writes reports to the supervisor's pipe."""

    def __init__(self, descriptor: int, started: float) -> None:
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor
        self._started = started

    def phase(self, name: str) -> None:
        self._write(Phase(name, time.monotonic() - self._started))

    def up(self) -> None:
        self._write(Up(time.monotonic() - self._started))

    def failed(self, message: str) -> None:
        self._write(Failed(message))

    def _write(self, report: Report) -> None:
        # Without a reader the supervisor is gone, and the lifeline ends this process.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._descriptor, encode_report(report))


def load_builder(path: str) -> Builder:
    """`module:function` -> the function."""
    module, _, name = path.partition(":")
    builder: Builder = getattr(importlib.import_module(module), name)
    return builder


def facts_of(worker: BuiltWorker, config: SchedulerConfig) -> EngineFacts:
    facts = worker.facts
    return EngineFacts(
        max_model_len=config.max_model_len,
        vocab_size=facts.vocab_size,
        num_pages=facts.num_pages,
        page_size=facts.page_size,
        max_num_seqs=config.max_num_seqs,
        max_logprobs=min(MAX_LOGPROBS, facts.vocab_size),
        device=facts.device,
        dtype=facts.dtype,
        drafters=facts.drafters,
    )


def serve(launch: Launch, reporter: Reporter) -> int:
    """Builds the worker and runs the loop. Returns the exit code."""
    try:
        worker, scheduler_config = load_builder(launch.builder)(launch.config, reporter.phase)
        scheduler = build_scheduler(launch.config, scheduler_config, worker.facts.beside)
        transport = ZmqEngineTransport(launch.address)
    except StartupError as error:
        reporter.failed(str(error))
        return 1
    except Exception as error:
        log.exception("the engine failed to start")
        reporter.failed(f"the engine failed to start: {type(error).__name__}: {error}")
        return 1
    core = EngineCore(scheduler, worker, transport, facts_of(worker, scheduler_config))

    def terminate(signum: int, frame: FrameType | None) -> None:
        core.drain(launch.drain_seconds)
        transport.wake()

    signal.signal(signal.SIGTERM, terminate)
    worker.lost.add_done_callback(lambda lost: core.fail(WorkerLostError(lost.result())))
    # What lives now lives on: later collections need not look at it.
    gc.collect()
    gc.freeze()
    reporter.up()
    try:
        core.run()
    except Exception as error:
        log.exception("the engine met a fault")
        lost = worker.lost.result() if worker.lost.done() else None
        message = f"the engine met a fault: {lost or f'{type(error).__name__}: {error}'}"
        core.announce_death(message)
        transport.close()
        reporter.failed(message)
        return 1
    finally:
        keep_history(launch.config, scheduler)
    transport.close()
    worker.close()
    return 0


def watch_lifeline(address: str) -> None:
    """Ends this process when standard input does: the supervisor is gone, however it went."""
    while os.read(0, 4096):
        pass
    socket = Path(address.removeprefix("ipc://"))
    socket.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the supervisor's folder, unless others still use it
        socket.parent.rmdir()
    os._exit(1)


def main() -> None:
    started = time.monotonic()
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=Launch)
    threading.Thread(target=watch_lifeline, args=(launch.address,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's to answer
    sys.setswitchinterval(SWITCH_INTERVAL)
    configure_logging(launch.log_level, launch.log_json)
    code = serve(launch, Reporter(launch.report_fd, started))
    # Not sys.exit: a worker thread stuck in a step would be waited for.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
