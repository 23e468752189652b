"""The API side owns the engine process: starts it, watches it, starts it again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.config import EngineConfig
from engine.errors import EngineGoneError, StartupError
from engine.launch import (
    DEFAULT_BUILDER,
    Failed,
    Launch,
    Phase,
    Up,
    boot,
    cause_of_end,
    decode_report,
)
from engine.transport import ClientTransport, ZmqClientTransport

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a dying engine is started again. Times in seconds."""

    fast_death: float = 30.0  # an engine that served less than this died fast
    # So many in a row: give up. More than one request can cause, see `stream.MAX_RESUMPTIONS`.
    max_fast_deaths: int = 4
    first_backoff: float = 0.25  # doubles with every fast death in a row


class EngineProcess:
    """One engine process from spawn to exit.

    `up` resolves when it serves, or fails with `StartupError`; `exited` resolves with a sentence
    when it is gone. Two daemon threads watch, so that the process can be started before there is
    an event loop: starting it is the longest part of starting a server.
    """

    def __init__(
        self,
        address: str,
        config: EngineConfig,
        builder: str,
        drain_seconds: float,
        log_level: str,
        log_json: bool,
        on_phase: Callable[[Phase], None],
    ) -> None:
        self.address = address
        self.up: Future[Up] = Future()
        self.exited: Future[str] = Future()
        self._on_phase = on_phase
        self._last_words = ""
        report_read, report_write = os.pipe()
        launch = Launch(address, config, builder, report_write, drain_seconds, log_level, log_json)
        self._popen = subprocess.Popen(
            boot("engine.process"),
            stdin=subprocess.PIPE,
            pass_fds=(report_write,),
            process_group=0,  # out of reach of the terminal's Ctrl-C
        )
        os.close(report_write)
        assert self._popen.stdin is not None
        self._popen.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._popen.stdin.flush()
        self._reader = threading.Thread(target=self._read, args=(report_read,), daemon=True)
        self._reader.start()
        threading.Thread(target=self._reap, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def terminate(self) -> None:
        """Asks it to drain and exit."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()

    def _read(self, descriptor: int) -> None:
        with open(descriptor, "rb") as reports:
            for line in reports:
                report = decode_report(line)
                match report:
                    case Phase():
                        self._on_phase(report)
                    case Up():
                        self.up.set_result(report)
                    case Failed(message):
                        self._last_words = message

    def _reap(self) -> None:
        code = self._popen.wait()
        self._reader.join(timeout=1.0)  # what it said last may still be in the pipe
        assert self._popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._popen.stdin.close()
        words = self._last_words or f"the engine process ended unexpectedly ({cause_of_end(code)})"
        self.exited.set_result(words)
        if not self.up.done():
            self.up.set_exception(StartupError(words))


class Supervisor:
    """An `EngineLink` that starts an engine process of its own and replaces it when it dies.

    Every process binds a fresh address: nothing sent to a dead engine can reach its successor.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        builder: str = DEFAULT_BUILDER,
        drain_seconds: float = 30.0,
        log_level: str = "info",
        log_json: bool = True,
        on_phase: Callable[[Phase], None] = lambda phase: None,
        policy: RestartPolicy = RestartPolicy(),
    ) -> None:
        self._config = config
        self._builder = builder
        self._drain_seconds = drain_seconds
        self._log_level = log_level
        self._log_json = log_json
        self._on_phase = on_phase
        self._policy = policy
        self._folder = Path(tempfile.mkdtemp(prefix="foresight-"))  # mode 0700
        # A process has the priority of the thread that starts it, and the thread of the event loop
        # may have lowered its own (`cli/api.py`).
        self._starter = ThreadPoolExecutor(1, "starter")
        self._process: EngineProcess | None = None
        self._spawned = 0
        self._up_since: float | None = None  # of the current process
        self._served = False  # some process came up once
        self._fast_deaths = 0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def spawn(self) -> None:
        """Starts the first process. Needs no event loop: call it before anything slow."""
        self._spawned += 1
        self._up_since = None
        self._process = self._starter.submit(
            EngineProcess,
            f"ipc://{self._folder}/engine-{self._spawned}.sock",
            self._config,
            self._builder,
            self._drain_seconds,
            self._log_level,
            self._log_json,
            self._on_phase,
        ).result()

    async def connect(self, lost: asyncio.Future[str]) -> ClientTransport:
        """A transport to the next engine that serves; `lost` resolves when that one is gone.

        Raises `StartupError` when the very first does not come up, `EngineGoneError` after too
        many fast deaths in a row.
        """
        if self._process is None:
            self.spawn()
        while True:
            process = self._process
            assert process is not None
            if self._served and process.exited.done():
                await self._replace(process)
                continue
            try:
                await asyncio.wrap_future(process.up)
            except StartupError:
                if not self._served:
                    raise
                continue
            self._served = True
            self._up_since = time.monotonic()
            _resolve(lost, process.exited)
            return ZmqClientTransport(process.address)

    async def _replace(self, dead: EngineProcess) -> None:
        policy = self._policy
        served = 0.0 if self._up_since is None else time.monotonic() - self._up_since
        self._fast_deaths = self._fast_deaths + 1 if served < policy.fast_death else 0
        if self._fast_deaths >= policy.max_fast_deaths:
            raise EngineGoneError(
                f"the engine died {self._fast_deaths} times in a row: {dead.exited.result()}"
            )
        await asyncio.sleep(policy.first_backoff * 2 ** max(self._fast_deaths - 1, 0))
        log.warning("starting the engine again")
        self.spawn()

    async def close(self, grace: float = 5.0) -> None:
        """Ends the process, by force after `grace` seconds, and removes its address."""
        process = self._process
        if process is not None:
            exited = asyncio.wrap_future(process.exited)
            if process.up.done():
                process.terminate()
            else:
                process.kill()  # still loading: nothing to finish
            try:
                await asyncio.wait_for(asyncio.shield(exited), grace)
            except TimeoutError:
                process.kill()
                await exited
        self._starter.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)


def _resolve(target: asyncio.Future[str], source: Future[str]) -> None:
    """Resolves `target` on its event loop once `source` is."""
    loop = target.get_loop()

    def set_result(words: str) -> None:
        if not target.done():
            target.set_result(words)

    def forward(done: Future[str]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended
            loop.call_soon_threadsafe(set_result, done.result())

    source.add_done_callback(forward)
