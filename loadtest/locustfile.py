"""The scenarios as locust users: `Chat`, `Completion` and `Mixed`.

With locust's page:  locust -f loadtest/locustfile.py Mixed
Headless:            locust -f loadtest/locustfile.py --headless -u 8 -t 60s Mixed
With a report:       python -m loadtest --scenario mixed

Loopback is the default host. A run ends by itself after `--max-requests` requests; every run that
`python -m loadtest` starts also has a time limit.
"""

from __future__ import annotations

import json
import random
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import IO

from gevent import spawn_later  # type: ignore[import-untyped]
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.stats import CSV_STATS_INTERVAL_SEC

from benchmarks.streaming import Endpoint, Sample
from benchmarks.workload import served_model, text_pieces
from loadtest.client import StreamingClient
from loadtest.scenario import Kind, Scenario, load_all

scenarios = load_all()
documentation = tuple(
    islice(text_pieces(), 24)
)  # now: rendering it in a run would stall every user

questions = (
    "What does {} do?",
    "Can you explain {} to me?",
    "How do I use {}?",
    "Please tell me what {} is for.",
)
topics = (
    "os.path.join",
    "os.listdir",
    "json.dumps",
    "json.loads",
    "re.findall",
    "random.choice",
    "shutil.copy",
    "math.gcd",
    "textwrap.wrap",
    "itertools.chain",
    "functools.reduce",
    "heapq.heappush",
    "string.capwords",
    "time.sleep",
    "statistics.median",
    "bisect.insort",
    "collections.Counter",
    "csv.reader",
    "glob.glob",
    "copy.deepcopy",
)


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="", help="the model's name; default: the first that /v1/models lists")
    add("--api-key", default="", is_secret=True, help="sent as a bearer token")
    add("--max-requests", type=int, default=10_000, help="end the run after so many requests")
    add("--samples", default="", help="write one JSON line per request to this file")
    add("--answer-timeout", type=float, default=120.0, help="seconds without a byte")


class Recorder:
    """Counts requests and writes one JSON line for each; ends the run at the limit."""

    def __init__(self, environment: Environment, options: Namespace) -> None:
        self._environment = environment
        self._left = options.max_requests
        self._users = 0
        self._file: IO[str] | None = None
        if options.samples:
            self._file = Path(options.samples).open("w")  # noqa: SIM115 (open for the whole run)

    def new_user(self) -> int:
        """A number for each user: it seeds what the user asks."""
        self._users += 1
        return self._users

    def record(self, scenario: str, kind: str, sample: Sample) -> None:
        """Raises `StopUser` once the run has made all its requests."""
        if self._file is not None:
            line = {
                "scenario": scenario,
                "kind": kind,
                "ended": time.time(),
                "total_ms": round((sample.finished - sample.started) * 1e3, 3),
                "ttft_ms": None
                if sample.first is None
                else round((sample.first - sample.started) * 1e3, 3),
                "gaps_ms": [round(gap * 1e3, 3) for gap in sample.gaps],
                "output_tokens": sample.tokens,
                "prompt_tokens": sample.prompt_tokens,
                "cached_tokens": sample.cached_tokens,
                "error": sample.error,
            }
            self._file.write(json.dumps(line) + "\n")
        self._left -= 1
        if self._left == 0 and self._environment.runner is not None:
            # Not now: locust writes its CSV files once a second, and quitting waits for the users.
            spawn_later(1.5 * CSV_STATS_INTERVAL_SEC, self._environment.runner.quit)
        if self._left <= 0:
            raise StopUser

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@cache
def recorder(environment: Environment) -> Recorder:
    """One per run."""
    assert environment.parsed_options is not None
    out = Recorder(environment, environment.parsed_options)
    environment.events.quitting.add_listener(lambda environment, **_: out.close())
    return out


@cache
def model_name(endpoint: Endpoint, asked: str) -> str:
    return asked or served_model(endpoint)


class ScenarioUser(User):
    """A user who repeats what its scenario says."""

    abstract = True
    host = "http://127.0.0.1:8000"
    scenario: Scenario

    def on_start(self) -> None:
        options = self.environment.parsed_options
        end = Endpoint.parse(self.host, options.api_key or None)
        self.recorder = recorder(self.environment)
        self.model = model_name(end, options.model)
        self.random = random.Random(self.recorder.new_user())
        self.client = StreamingClient(end, self.environment.events.request, options.answer_timeout)

    def on_stop(self) -> None:
        self.client.close()

    def wait_time(self) -> float:
        mean = self.scenario.think_seconds
        return self.random.expovariate(1 / mean) if mean > 0 else 0.0

    @task
    def one(self) -> None:
        kinds = self.scenario.kinds
        kind = self.random.choices(kinds, [kind.weight for kind in kinds])[0]
        for path, body in self._requests(kind):
            sample, text = self.client.send(path, body | {"model": self.model}, kind.name)
            self.recorder.record(self.scenario.name, kind.name, sample)
            if sample.error is not None:
                return
            if "messages" in body:  # the next turn of the conversation sees this answer
                body["messages"].append({"role": "assistant", "content": text})

    def _requests(self, kind: Kind) -> Iterator[tuple[str, dict]]:
        """One completion, or the turns of one conversation."""
        if kind.endpoint == "completion":
            length = self.random.randint(*kind.prompt_chars)
            yield (
                "/v1/completions",
                {
                    "prompt": self._excerpt(length),
                    "max_tokens": self.random.randint(*kind.output_tokens),
                },
            )
            return
        messages: list[dict[str, str]] = []
        for _ in range(kind.turns):
            question = self.random.choice(questions).format(self.random.choice(topics))
            messages.append({"role": "user", "content": question})
            yield (
                "/v1/chat/completions",
                {
                    "messages": messages,
                    "max_tokens": self.random.randint(*kind.output_tokens),
                },
            )

    def _excerpt(self, length: int) -> str:
        """Documentation text that starts anywhere."""
        pieces, out = documentation, ""
        at = self.random.randrange(len(pieces))
        start = self.random.randrange(len(pieces[at]))
        while len(out) < length:
            out += pieces[at][start:]
            at, start = (at + 1) % len(pieces), 0
        return out[:length]


class Chat(ScenarioUser):
    scenario = scenarios["chat"]


class Completion(ScenarioUser):
    scenario = scenarios["completion"]


class Mixed(ScenarioUser):
    scenario = scenarios["mixed"]
