"""How fast the HTTP front end alone can stream: no model, one core, a client that only counts.

`python -m benchmarks.frontend` starts the real app in a process of its own, on a core of its own,
around an engine that hands every open stream one token per turn of the event loop. Each token is
decoded, checked against stop strings, encoded as JSON and sent as one server-sent event. The
client, in this process, reads bytes and never parses them. Tokens per second of wall time need a
free core; processor time per token, the engine stand-in included, does not. Also measured: the
API process's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Row, json_line, median_interval, rows_table
from engine.config import Config, EngineConfig, ModelConfig
from engine.messages import EngineFacts, Step
from engine.stream import RequestStream
from scheduler.request import Finish, FinishReason, Load, Output, Request

TARGET_TOKENS_PER_SECOND = 15_000
TARGET_MICROSECONDS = 60
TARGET_MEGABYTES = 250
FACTS = EngineFacts(
    max_model_len=8192,
    vocab_size=4096,
    num_pages=1024,
    page_size=16,
    max_num_seqs=256,
    max_logprobs=20,
    device="none",
    dtype="none",
)


@dataclass(slots=True)
class _Running:
    """One stream and how far it is."""

    stream: RequestStream
    request: Request
    made: int = 0


class TickingEngine:
    """Gives every stream its next token in each turn of the event loop, as fast as they are taken.

    A stream's tokens walk through a fixed text, so that decoding and escaping do real work.
    """

    def __init__(self, text: list[int]) -> None:
        self.facts: EngineFacts | None = FACTS
        self.load = Load(pages_total=FACTS.num_pages)
        self.healthy = self.serving = True
        self.on_step: Callable[[Step], None] = lambda step: None
        self.on_resume: Callable[[Request], None] = lambda request: None
        self._text = text
        self._running: dict[str, _Running] = {}

    def submit(self, request: Request) -> RequestStream:
        stream = RequestStream(request, lambda: self.abort(request.id))
        if not self._running:
            asyncio.get_running_loop().call_soon(self._tick)
        self._running[request.id] = _Running(stream, request)
        return stream

    def abort(
        self,
        request_id: str,
        choice: int | None = None,
        reason: FinishReason = FinishReason.ABORT,
        tokens_kept: int | None = None,
    ) -> None:
        self._running.pop(request_id, None)

    async def drain(self, seconds: float) -> None:
        """Nothing to wait for."""

    def _tick(self) -> None:
        """One step: a token for each stream, as one message of a real engine would bring it."""
        for name, running in list(self._running.items()):
            token = self._text[running.made % len(self._text)]
            running.made += 1
            finish = None
            if running.made == running.request.params.max_tokens:
                finish = Finish(
                    FinishReason.LENGTH,
                    prompt_tokens=len(running.request.prompt),
                    completion_tokens=running.made,
                )
                del self._running[name]
            running.stream.put(Output(name, 0, (token,), finish=finish))
        if self._running:
            asyncio.get_running_loop().call_soon(self._tick)


def serve(listener: socket.socket, checkpoint: Path, core: int | None) -> None:
    """The server process."""
    if core is not None:
        os.sched_setaffinity(0, {core})
    import uvicorn

    from server.app import create_app
    from text.assets import load_text

    text = load_text(checkpoint)
    sample = 'The quick brown fox — said "hello", then\n\tjumped over 3 lazy dogs. '
    engine = TickingEngine(text.tokenizer.encode(sample * 20, add_special_tokens=False))
    config = Config(engine=EngineConfig(model=ModelConfig(served_model_name=("m",))))
    app = create_app(engine, text, config)
    settings = uvicorn.Config(
        app, http="httptools", loop="uvloop", access_log=False, log_config=None
    )
    uvicorn.Server(settings).run(sockets=[listener])


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load: how many streams at a time, how many tokens each, which extra fields."""

    name: str
    streams: int
    tokens: int
    fields: Mapping[str, object]


def run_load(port: int, load: Scenario) -> tuple[float, int]:
    """All streams at once. Returns seconds from first to last byte, and the number of events.
    Raises `RuntimeError` when a stream does not end as it should."""
    body = json.dumps(
        {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": load.tokens,
            "ignore_eos": True,
            **load.fields,
        }
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    message = head + b"content-length: %d\r\n\r\n" % len(body) + body
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for _ in range(load.streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(message)
        connection.setblocking(False)
        tails[connection] = b""
        selector.register(connection, selectors.EVENT_READ)
    first, events, open_ = 0.0, 0, load.streams
    while open_:
        for key, _ in selector.select():
            connection = key.fileobj  # type: ignore[assignment]
            data = connection.recv(1 << 18)
            if not data:
                raise RuntimeError("the server closed a stream")
            first = first or time.perf_counter()
            events += data.count(b"data: ")
            tails[connection] = (tails[connection] + data)[-40:]
            if b"[DONE]" in tails[connection]:
                selector.unregister(connection)
                open_ -= 1
    seconds = time.perf_counter() - first
    for connection in tails:
        connection.close()
    return seconds, events


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def wait_ready(port: int) -> None:
    for _ in range(600):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
                probe.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                if b" 200 " in probe.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server did not start")


def measure_one(port: int, pid: int, load: Scenario, repeats: int, *, gated: bool) -> list[Row]:
    """Tokens per second, processor time per token, events per token."""
    made = load.streams * load.tokens
    _, events = run_load(port, load)  # also warms up
    rates, costs = [], []
    for _ in range(repeats):
        before = cpu_seconds(pid)
        seconds, _ = run_load(port, load)
        costs.append((cpu_seconds(pid) - before) / made * 1e6)
        rates.append(made / seconds)
    rate, low, high = median_interval(rates)
    target = TARGET_TOKENS_PER_SECOND if gated else None
    rows = [Row(f"{load.name}: tokens/s", rate, target, interval=(low, high))]
    cost, low, high = median_interval(costs)
    target = TARGET_MICROSECONDS if gated else None
    name = f"{load.name}: µs of processor time per token"
    rows.append(Row(name, cost, target, "at most", (low, high)))
    rows.append(Row(f"{load.name}: events per token", events / made))
    return rows


def measure(checkpoint: Path, repeats: int, tokens: int) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve, args=(listener, checkpoint, cores[0]), daemon=True)
    server.start()
    assert server.pid is not None
    if len(cores) > 1:
        os.sched_setaffinity(0, set(cores[1:]))
    rows: list[Row] = []
    try:
        wait_ready(port)
        stops = {"stop": ["zq", "</s>", "the qz", "j!"]}
        for load in (
            Scenario("64 streams", 64, tokens, {}),
            Scenario("64 streams, 4 stop strings", 64, tokens, stops),
            Scenario("64 streams, logprobs", 64, tokens // 2, {"logprobs": True}),
            Scenario("1 stream", 1, tokens * 8, {}),
        ):
            rows += measure_one(port, server.pid, load, repeats, gated=not load.fields)
        megabytes = resident_megabytes(server.pid)
        rows.append(Row("API process memory, MB", megabytes, TARGET_MEGABYTES, "at most"))
        return rows
    finally:
        os.sched_setaffinity(0, set(cores))
        server.terminate()
        server.join(5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    parser.add_argument("--model", type=Path, default=Path("assets/demo/target"))
    options = parser.parse_args()
    repeats, tokens = (3, 200) if options.quick else (9, 500)
    rows = measure(options.model, repeats, tokens)
    print(rows_table(rows))
    print(json_line("frontend", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
