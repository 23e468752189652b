"""`foresight serve` as its users start it, for tests."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Running:
    """A served bundled model."""

    process: subprocess.Popen[bytes]
    url: str  # without a slash at the end

    def engine_pid(self) -> int:
        """The engine process: the child of the API process that runs `engine.process`."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        children = " ".join((task / "children").read_text() for task in tasks)
        for child in children.split():
            if b"engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
        raise AssertionError("no engine process")

    def wait_ready(self, seconds: float = 60.0) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            assert self.process.poll() is None, "the server ended"
            try:
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError("not ready in time")

    def gauge(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        found = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        assert found, f"no metric {name}"
        return float(found[1])


@contextmanager
def serve(log: Path, *flags: str) -> Iterator[Running]:
    """Starts the server on a free port and waits until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cli", "serve", "--config", "configs/demo.yaml"]
    command += ["--port", str(port), "--device", "cpu", *flags]
    # Shared by all servers of a test run: kernels are compiled once.
    environment = os.environ | {"XDG_CACHE_HOME": str(REPOSITORY / ".pytest_cache")}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
    try:
        running = Running(process, f"http://127.0.0.1:{port}")
        running.wait_ready()
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(40)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
