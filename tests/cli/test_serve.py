"""The command as a user runs it: real processes, real sockets, the scripted worker."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cli.config import PROJECT
from cli.main import main
from tests.engine.workers import model

TOKENIZER = PROJECT / "assets" / "demo" / "target"
# The scripted tokens are random: without ignore_eos one might end the text.
BODY = {
    "model": "demo",
    "prompt": [1, 2, 3],
    "max_tokens": 300,
    "ignore_eos": True,
    "seed": 5,
    "stream": True,
}


def command(name: str, *flags: str) -> list[str]:
    return [
        *(sys.executable, "-m", "tests.cli.scripted", "serve", "--model", name),
        *("--tokenizer", str(TOKENIZER), "--served-model-name", "demo", *flags),
    ]


class Server:
    def __init__(self, process: subprocess.Popen, base: str) -> None:
        self.process = process
        self.base = base

    def engine_pid(self) -> int:
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        (pid,) = "".join((task / "children").read_text() for task in tasks).split()
        return int(pid)

    def lines(self, body=BODY):
        with httpx.stream("POST", f"{self.base}/completions", json=body, timeout=30) as answer:
            yield from (line for line in answer.iter_lines() if line)

    def status(self, path: str) -> int:
        return httpx.get(f"{self.base.removesuffix('/v1')}{path}").status_code


@contextmanager
def serving(name: str = "scripted", *flags: str):
    process = subprocess.Popen(
        command(name, "--port", "0", *flags),
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        for line in process.stdout:
            if "base_url=" in line:
                yield Server(process, line.split('"')[1])
                break
        else:
            pytest.fail("the server ended before it was ready")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def failing(*arguments: str, name: str = "scripted") -> subprocess.CompletedProcess:
    return subprocess.run(
        command(name, *arguments), cwd=PROJECT, capture_output=True, text=True, timeout=60
    )


def wait_until(true, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_0():
    with serving(model(step_seconds=0.012), "--drain-seconds", "100") as server:
        lines = server.lines()
        next(lines)
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status("/ready") == 503)
        refused = httpx.post(f"{server.base}/completions", json={**BODY, "stream": False})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        rest = list(lines)
        assert rest[-1] == "data: [DONE]"
        assert server.process.wait(10) == 0
        assert not Path(f"/proc/{engine}").exists()


def test_drain_deadline_ends_a_stream_with_an_error_not_done():
    with serving(model(step_seconds=0.05), "--drain-seconds", "0.3") as server:
        lines = server.lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        rest = list(lines)
        assert server.process.wait(10) == 0
    assert any('"error"' in line for line in rest)
    assert "data: [DONE]" not in rest


def test_second_signal_does_not_wait():
    with serving(model(step_seconds=0.05)) as server:
        lines = server.lines()
        next(lines)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status("/ready") == 503)
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        assert time.monotonic() - started < 5


def test_a_stream_outlives_a_killed_engine():
    with serving(model(step_seconds=0.005)) as server:
        undisturbed = texts(server.lines())
        lines = server.lines()
        begun = [next(lines) for _ in range(5)]
        first = server.engine_pid()
        os.kill(first, signal.SIGKILL)
        rest = list(lines)
        assert texts([*begun, *rest]) == undisturbed
        assert rest.count("data: [DONE]") == 1
        assert not any('"error"' in line for line in rest)
        assert server.engine_pid() != first
        wait_until(lambda: server.status("/ready") == 200)


def texts(lines: Iterable[str]) -> str:
    """What a stream of completions says."""
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in json.loads(event)["choices"])


def test_an_engine_that_keeps_dying_ends_the_server_with_a_failure():
    with serving(model(kill_at=0)) as server:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                try:
                    body = {**BODY, "stream": False}  # it hangs on from engine to engine
                    httpx.post(f"{server.base}/completions", json=body, timeout=90)
                except httpx.HTTPError:
                    return

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            assert server.process.wait(90) == 1  # four starts
        finally:
            stop.set()
            asking.join()


@pytest.mark.parametrize(
    ("name", "flags", "sentence"),
    [
        (model(refuse="there is no folder x."), [], "there is no folder x."),
        (model(exit=3), [], "exit code 3"),
        ("scripted", ["--tokenizer", "/nowhere"], "/nowhere"),
        ("scripted", ["--host", "no.such.host.invalid"], "not an address to listen on"),
        ("scripted", ["--prot", "1"], "did you mean --port?"),
        ("scripted", ["--api-key-file", "/nowhere/keys"], "/nowhere/keys"),
        (
            "scripted",
            ["--tls-certificate", "/nowhere/c.pem", "--tls-key", "/nowhere/k.pem"],
            "/nowhere/c.pem and its key cannot be used",
        ),
    ],
)
def test_a_start_that_fails_is_one_sentence(name, flags, sentence):
    ended = failing("--port", "0", *flags, name=name)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("foresight: ")
    assert sentence in line


def test_chat_asks_the_server_and_says_when_there_is_none(capsys):
    with serving(model(vocab_size=100_000), "--seed", "1") as server:  # or it may end at once
        assert main(["chat", "hello", "--max-tokens", "24", "--url", server.base]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["chat", "hello", "--url", server.base]) == 1
    assert capsys.readouterr().err.startswith(f"foresight: no answer from {server.base}")


def test_port_in_use_is_one_sentence_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = failing("--port", str(port))
    assert ended.returncode == 1
    assert ended.stderr == (
        f"foresight: port {port} on 127.0.0.1 is in use; choose another with --port.\n"
    )
    assert ended.stdout == ""
