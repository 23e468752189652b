"""A streaming client for locust: one request event per answer, its first token and each token gap.

The events carry locust's usual fields, so its tables, CSV files and page show time to first token
(type `TTFT`) and inter-token time (type `inter-token`) beside the whole answers (type `POST`).
"""

from __future__ import annotations

import json
from time import perf_counter
from typing import Protocol

from geventhttpclient import HTTPClient

from benchmarks.streaming import Endpoint, EventCounter, Sample


class RequestEvent(Protocol):
    """Locust's request event; named here because importing locust patches the whole process."""

    def fire(self, **event: object) -> None: ...


class StreamingClient:
    """One user's connection."""

    def __init__(self, endpoint: Endpoint, fired: RequestEvent, timeout: float) -> None:
        """`fired`: locust's request event. `timeout`: seconds without a byte."""
        self._endpoint, self._fired = endpoint, fired
        self._http = HTTPClient(
            endpoint.host,
            endpoint.port,
            ssl=endpoint.tls,
            connection_timeout=timeout,
            network_timeout=timeout,
        )

    def send(self, path: str, body: dict[str, object], name: str) -> tuple[Sample, str]:
        """One streamed request under `name`; returns what was measured and the text.

        Failures are reported to locust and stand in `Sample.error`; nothing is raised.
        """
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        headers = {"Content-Type": "application/json"}
        if self._endpoint.api_key:
            headers["Authorization"] = f"Bearer {self._endpoint.api_key}"
        sample = Sample(perf_counter())
        text: list[str] = []
        try:
            response = self._http.post(
                self._endpoint.prefix + path, json.dumps(body).encode(), headers
            )
            if response.status_code != 200:
                problem = response.read().decode(errors="replace")
                sample.error = f"HTTP {response.status_code}: {problem[:200]}"
            else:
                counter = EventCounter(sample)
                while line := response.readline(b"\n"):
                    counter.feed(bytes(line), perf_counter())
                    text.append(delta_text(bytes(line)))
                if not counter.ended:
                    sample.error = sample.error or "the stream ended without [DONE]"
        except Exception as error:  # whatever the network did is the finding, not a crash
            sample.error = f"{type(error).__name__}: {error}"
            self._http.close()
        sample.finished = perf_counter()
        self._report(sample, name)
        return sample, "".join(text)

    def close(self) -> None:
        self._http.close()

    def _report(self, sample: Sample, name: str) -> None:
        def fire(kind: str, seconds: float, length: int = 0, error: str | None = None) -> None:
            self._fired.fire(
                request_type=kind,
                name=name,
                response_time=seconds * 1e3,
                response_length=length,
                exception=None if error is None else RuntimeError(error),
                context={},
            )

        fire("POST", sample.finished - sample.started, sample.tokens, sample.error)
        if sample.error is None and sample.first is not None:
            fire("TTFT", sample.first - sample.started)
            for gap in sample.gaps:
                fire("inter-token", gap)


def delta_text(line: bytes) -> str:
    """The text of one `data:` line of a chat or completion stream; empty for any other line."""
    if not line.startswith(b"data: {"):
        return ""
    choices = json.loads(line[6:]).get("choices") or [{}]
    return choices[0].get("text") or (choices[0].get("delta") or {}).get("content") or ""
