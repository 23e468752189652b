"""The engine process is killed under load: every client reads what it would have read anyway.

The bundled model in fp32 with batch-invariant kernels, speculation on as by default.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from cli.api import YIELDING
from tests.e2e.serving import Running, serve

FLAGS = ("--deterministic", "--dtype", "float32", "--no-compile", "--log-format", "json")
pytestmark = pytest.mark.timeout(400)  # the first test waits for all that is compared

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
LENGTH = 96  # tokens: all streams have to be under way before one of them ends
LONG = {"model": "demo", "max_tokens": LENGTH, "ignore_eos": True}
NOISY = LONG | {"temperature": 1.0, "seed": 11}
PENALTIES = {"repetition_penalty": 1.2, "presence_penalty": 0.6, "frequency_penalty": 0.2}
CODE = {"prompt": "import os\n\ndef "}

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "greedy": (COMPLETIONS, LONG | CODE | {"temperature": 0}),
    "greedy with penalties": (CHAT, LONG | PENALTIES | {"messages": QUESTION, "temperature": 0}),
    "seeded with penalties": (
        CHAT,
        NOISY | PENALTIES | {"messages": QUESTION, "min_tokens": LENGTH - 3},
    ),
    "several choices": (COMPLETIONS, NOISY | CODE | {"n": 2, "top_p": 0.9}),
    "choices of which some end early": (
        COMPLETIONS,
        NOISY | CODE | {"n": 3, "stop": ["return"], "min_tokens": 3},
    ),
    "log-probabilities, of the prompt too": (
        COMPLETIONS,
        NOISY | CODE | {"logprobs": 2, "echo": True},
    ),
    "several prompts": (COMPLETIONS, NOISY | {"prompt": ["import re\n", "class A:"]}),
    "not streamed": (
        COMPLETIONS,
        NOISY | CODE | {"stream": False, "logprobs": 1, "prompt_logprobs": 1},
    ),
}


@dataclass
class Told:
    """What a client was told, however it was cut into events."""

    text: dict[int, str] = field(default_factory=dict)
    tokens: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[float | None]] = field(default_factory=dict)
    prompt_logprobs: list[Any] = field(default_factory=list)
    finish: list[tuple[int, str]] = field(default_factory=list)
    usage: tuple[int, int] | None = None
    events: int = 0
    ends: list[str] = field(default_factory=list)  # [DONE] and errors

    def take(self, body: dict[str, Any]) -> None:
        self.events += 1
        if "error" in body:
            self.ends.append(json.dumps(body))
        for choice in body.get("choices", ()):
            index = choice["index"]
            text = choice["text"] if "text" in choice else choice["delta"].get("content")
            self.text[index] = self.text.get(index, "") + (text or "")
            if scores := choice.get("logprobs"):
                self.tokens.setdefault(index, []).extend(scores["tokens"])
                self.logprobs.setdefault(index, []).extend(scores["token_logprobs"])
            if choice.get("prompt_logprobs"):
                self.prompt_logprobs.append(choice["prompt_logprobs"])
            if choice.get("finish_reason"):
                self.finish.append((index, choice["finish_reason"]))
        if usage := body.get("usage"):
            self.usage = usage["prompt_tokens"], usage["completion_tokens"]


async def ask(http: httpx.AsyncClient, path: str, body: dict[str, Any], told: Told) -> None:
    if not body.get("stream", True):
        answer = await http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        told.take(answer.json())
        return
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with http.stream("POST", path, json=streamed) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for data in events(answer):
            if data == "[DONE]":
                told.ends.append(data)
            else:
                told.take(json.loads(data))


async def events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


async def ask_all(url: str, accident: Callable[[], None] | None = None) -> dict[str, Told]:
    """Every request at once. The accident happens when all streams have begun and none has ended,
    but for single choices."""
    told = {name: Told() for name in REQUESTS}
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        asking = [
            asyncio.create_task(ask(http, path, body, told[name]))
            for name, (path, body) in REQUESTS.items()
        ]
        if accident is not None:
            streams = [t for name, t in told.items() if REQUESTS[name][1].get("stream", True)]
            async with asyncio.timeout(60):
                while min(t.events for t in streams) < 4:
                    await asyncio.sleep(0.005)
            assert not any(task.done() for task in asking), "too late for an accident"
            accident()
        await asyncio.gather(*asking)
    return told


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume") / "log"


@pytest.fixture(scope="module")
def server(log: Path) -> Iterator[Running]:
    with serve(log, *FLAGS) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(server: Running) -> dict[str, Told]:
    return asyncio.run(ask_all(server.url))


@pytest.fixture(scope="module")
def disturbed(server: Running, undisturbed: dict[str, Told]) -> dict[str, Told]:
    """The same requests, and the engine killed while it works on them."""
    before = server.engine_pid()
    found = asyncio.run(ask_all(server.url, lambda: os.kill(before, signal.SIGKILL)))
    assert server.engine_pid() != before
    return found


@pytest.mark.parametrize("name", REQUESTS)
def test_every_client_reads_what_it_would_have_read(
    name: str, undisturbed: dict[str, Told], disturbed: dict[str, Told]
) -> None:
    expected, found = undisturbed[name], disturbed[name]
    assert found.text == expected.text
    assert all(found.text.values())
    assert sorted(found.finish) == sorted(expected.finish)
    assert found.ends == expected.ends == (["[DONE]"] if name != "not streamed" else [])
    assert found.usage == expected.usage
    assert found.usage is not None
    assert found.tokens == expected.tokens
    assert found.logprobs.keys() == expected.logprobs.keys()
    for index, values in expected.logprobs.items():
        assert found.logprobs[index] == pytest.approx(values, abs=1e-4)
    assert len(found.prompt_logprobs) == len(expected.prompt_logprobs)


def test_the_load_was_what_it_is_meant_to_be(undisturbed: dict[str, Told]) -> None:
    reasons = {reason for _, reason in undisturbed["choices of which some end early"].finish}
    assert "stop" in reasons
    scored = undisturbed["log-probabilities, of the prompt too"]
    assert len(scored.tokens[0]) > LENGTH
    assert len(undisturbed["not streamed"].prompt_logprobs) == 1
    for told in (scored, undisturbed["greedy"], undisturbed["not streamed"]):
        assert told.finish == [(0, "length")]
        assert told.usage is not None
        assert told.usage[1] == LENGTH


def test_the_front_end_gives_way_to_whichever_engine_computes(
    server: Running, disturbed: dict[str, Told]
) -> None:
    assert disturbed
    server.wait_ready()
    ordinary = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, server.engine_pid()) == ordinary
    if sys.platform == "linux":
        yielding = min(ordinary + YIELDING, 19)
        assert os.getpriority(os.PRIO_PROCESS, server.process.pid) == yielding


def test_the_accident_is_counted_and_nothing_is_left_behind(
    server: Running, disturbed: dict[str, Told], log: Path
) -> None:
    assert disturbed
    server.wait_ready()
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert server.gauge("foresight_requests_resumed_total") == len(REQUESTS) + 1  # two prompts
    assert server.gauge("foresight_num_requests_running") == 0
    assert server.gauge("foresight_num_requests_waiting") == 0
    assert server.gauge("foresight_kv_cache_usage_perc") == 0
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    resumptions = [line["resumptions"] for line in lines if "resumptions" in line]
    assert resumptions == [0] * len(REQUESTS) + [1] * len(REQUESTS)
