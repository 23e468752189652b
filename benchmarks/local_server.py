"""Starts `foresight serve` for benchmarks that need a server of their own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.freezing import ProcessTree

root = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class LocalServer:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_seconds: float  # from the start of the process to the first 200 of /ready

    @property
    def tree(self) -> ProcessTree:
        return ProcessTree(self.process.pid)

    def resident_megabytes(self) -> float:
        """Of the API process alone."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def native_seconds(self, patience: float) -> float | None:
        """Waits until new requests run on native kernels.

        Returns seconds from readiness: 0 when they were there at once, None when none will come.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            log = self.log.read_text(errors="replace")
            if re.search(r"native\S* arithmetic", log):
                return 0.0
            if found := re.search(r"native kernels in use after ([0-9.]+) s", log):
                return float(found[1])
            if "plain torch operations" in log:
                return None
            time.sleep(0.2)
        return None


@contextmanager
def local_server(
    *flags: str, cache: Path | None = None, patience: float = 300.0
) -> Iterator[LocalServer]:
    """`foresight serve FLAGS` on a free loopback port, until the block ends.

    `cache`: where compiled kernels are kept, instead of the user's cache. Raises `RuntimeError`
    when the server does not become ready.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = dict(os.environ) | ({} if cache is None else {"XDG_CACHE_HOME": str(cache)})
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve", *flags, "--port", str(port)],
            cwd=root,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            _wait_ready(process, port, started + patience)
            seconds = time.monotonic() - started
            yield LocalServer(f"http://127.0.0.1:{port}", process, Path(log.name), seconds)
        except RuntimeError as error:
            tail = Path(log.name).read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{error}\n{tail}") from error
        finally:
            _stop(process)


def _wait_ready(process: subprocess.Popen[bytes], port: int, deadline: float) -> None:
    """Asks /ready every 10 ms with next to no work of its own: the start is being timed."""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                if connection.recv(64).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            pass
        time.sleep(0.01)
    raise RuntimeError("the server was not ready in time")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def model_flags(model: Path, extra: Sequence[str] = ()) -> list[str]:
    """Flags that serve one checkpoint under the name the benchmarks use."""
    return ["--model", str(model), "--served-model-name", "m", *extra]
