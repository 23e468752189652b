"""Rank 0 owns the other ranks of tensor parallelism: starts, watches and ends their processes.

A follower process (`engine/follower.py`) reads lines of JSON on its standard input, first its
`FollowerLaunch`, then the pool's size, then commands; the end of that input is the end of rank 0,
however it went, and the follower's own. Its reports come back on a pipe. When one of them ends
unasked, no step can succeed any more: `Ranks.lost` says so, rank 0 ends with these words and the
others with it, and the supervisor starts all of them again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
from concurrent.futures import Future, InvalidStateError
from queue import SimpleQueue
from typing import TypeVar

import msgspec

from engine.config import EngineConfig
from engine.errors import StartupError
from engine.launch import Failed, boot, cause_of_end
from models.parallel import Collective, Shard
from worker.device import Device
from worker.process_group import GroupError, join, listener
from worker.ranks import Command, RankLostError

log = logging.getLogger(__name__)

END_SECONDS = 5.0  # a follower that takes longer to end is killed


class FollowerLaunch(msgspec.Struct, frozen=True):
    """Everything a follower is told at its start."""

    config: EngineConfig
    rank: int
    threads: int
    port: int  # see worker.process_group.join
    report_fd: int


class Pool(msgspec.Struct, tag=True, frozen=True):
    """What all ranks have room for."""

    pages: int
    host_pages: int


class Started(msgspec.Struct, tag=True, frozen=True):
    """Imports are done: ready to join the group."""


class Room(msgspec.Struct, tag=True, frozen=True):
    """The weights are loaded, and so many pages fit beside them."""

    pages: int
    host_pages: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The pool is there: ready for commands."""


class Line(msgspec.Struct, tag=True, frozen=True):
    """A line for the log."""

    level: int
    text: str


RankReport = Started | Room | Ready | Line | Failed
R = TypeVar("R", Started, Room, Ready)

_decoder = msgspec.json.Decoder(RankReport)
_encoder = msgspec.json.Encoder()


def encode_line(message: FollowerLaunch | Pool | Command | RankReport) -> bytes:
    return _encoder.encode(message) + b"\n"


class _Process:
    """One follower. What it reports is found in `reports`, its end last: a sentence."""

    def __init__(self, config: EngineConfig, rank: int, threads: int, port: int) -> None:
        self.rank = rank
        self.reports: SimpleQueue[Started | Room | Ready | str] = SimpleQueue()
        self.ended: Future[str] = Future()
        self._failure: str | None = None
        read, write = os.pipe()
        self.popen = subprocess.Popen(
            boot("engine.follower"), stdin=subprocess.PIPE, pass_fds=(write,)
        )
        os.close(write)
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()
        launch = FollowerLaunch(config, rank, threads, port, write)
        with contextlib.suppress(BrokenPipeError):  # `_watch` will tell
            self.write(encode_line(launch))

    def write(self, line: bytes) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line)
        self.popen.stdin.flush()

    def _watch(self, descriptor: int) -> None:
        with open(descriptor, "rb") as lines:
            for line in lines:
                report = _decoder.decode(line)
                match report:
                    case Line(level, text):
                        log.log(level, "rank %d: %s", self.rank, text)
                    case Failed(message):
                        self._failure = message
                    case _:
                        self.reports.put(report)
        code = self.popen.wait()
        words = self._failure or f"its process ended unexpectedly ({cause_of_end(code)})"
        words = f"rank {self.rank}: {words}"
        self.reports.put(words)
        self.ended.set_result(words)


class Ranks:
    """The followers of this process, rank 0; see `worker.ranks.Followers`."""

    def __init__(self, config: EngineConfig, threads: int) -> None:
        """Starts them; `threads` each may use."""
        self.lost: Future[str] = Future()
        self._config = config
        self._size = config.device.tensor_parallel_size
        self._listener = listener()
        port: int = self._listener.getsockname()[1]
        self._port = port
        self._closing = False
        self._processes = [_Process(config, r, threads, port) for r in range(1, self._size)]
        for process in self._processes:
            process.ended.add_done_callback(self._ended)

    def join(self, device: Device) -> Collective:
        """Raises `StartupError`, as do the following."""
        self._await(Started)
        try:
            return join(
                Shard(0, self._size),
                device.torch_device,
                self._port,
                self._listener,
                ordered=self._config.device.deterministic,
            )
        except GroupError as error:
            raise StartupError(self._words(str(error))) from error

    def allocate(self, pages: int, host_pages: int) -> tuple[int, int]:
        """How many pages all have room for, given rank 0's; these the others have then."""
        rooms = [Room(pages, host_pages), *self._await(Room)]
        pool = Pool(min(room.pages for room in rooms), min(room.host_pages for room in rooms))
        with contextlib.suppress(RankLostError):  # told by what comes in place of `Ready`
            self._write(encode_line(pool))
        self._await(Ready)
        return pool.pages, pool.host_pages

    def tell(self, command: Command) -> None:
        self._write(encode_line(command))

    def close(self) -> None:
        self._closing = True
        self._listener.close()
        for process in self._processes:
            assert process.popen.stdin is not None
            with contextlib.suppress(OSError):
                process.popen.stdin.close()
        for process in self._processes:
            try:
                process.ended.result(END_SECONDS)
            except TimeoutError:
                process.popen.kill()
                process.ended.result()

    def _write(self, line: bytes) -> None:
        for process in self._processes:
            try:
                process.write(line)
            except (OSError, ValueError) as error:  # ended, or closed
                raise RankLostError(process.ended.result(END_SECONDS)) from error

    def _await(self, kind: type[R]) -> list[R]:
        """That report of every follower."""
        found: list[R] = []
        for process in self._processes:
            report = process.reports.get()
            if not isinstance(report, kind):
                raise StartupError(str(report))
            found.append(report)
        return found

    def _ended(self, ended: Future[str]) -> None:
        if not self._closing:
            with contextlib.suppress(InvalidStateError):  # the first is told
                self.lost.set_result(ended.result())

    def _words(self, otherwise: str) -> str:
        """Whose end is behind a failure, if it is one's."""
        try:
            return self.lost.result(1.0)
        except TimeoutError:
            return otherwise
