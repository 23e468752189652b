"""A light HTTP client for streamed completions: one keep-alive connection per stream.

The client shares the machine with the server under test, so it does as little as it can per token:
it parses the chunked framing and the event borders, stamps each event that carries text, and
decodes JSON only in the few events that carry none (finish, usage, error).
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from dataclasses import dataclass, field
from time import perf_counter
from typing import cast
from urllib.parse import urlsplit

# An event that carries text: `"text":"` or `"content":"` with something in it.
_has_text = re.compile(rb'"(?:text|content)":\s*"[^"]').search
_has_facts = re.compile(rb'"(?:usage|error)":\s*\{').search


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens. `prefix` is what stands before `/v1`, without a trailing slash."""

    host: str
    port: int
    tls: bool
    prefix: str
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> Endpoint:
        """Takes a base URL with or without the `/v1`. Raises `ValueError` on anything else."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http(s) base URL: {url}")
        tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), tls, prefix, api_key)

    @property
    def url(self) -> str:
        """The base URL without `/v1`."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}{self.prefix}"

    def post(self, path: str, body: object) -> bytes:
        """The bytes of one POST request."""
        payload = json.dumps(body, separators=(",", ":")).encode()
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"POST {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{key}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        return head.encode("latin-1") + payload


@dataclass(slots=True)
class Sample:
    """What one request brought. Times are `perf_counter` seconds."""

    started: float
    first: float | None = None  # the first event with text
    last: float | None = None  # the latest event with text
    finished: float = 0.0
    gaps: list[float] = field(default_factory=list)  # between consecutive events with text
    events: int = 0  # events with text
    output_tokens: int | None = None  # from the server's usage
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Output tokens: the server's count, or the events with text where it gave none."""
        return self.events if self.output_tokens is None else self.output_tokens


class BodyReader:
    """Decodes one HTTP/1.1 response at a time: bytes in, body bytes out.

    Handles chunked bodies, bodies with a length and bodies that end with the connection.
    """

    def __init__(self) -> None:
        self.status = 0
        self.complete = False
        self._buffer = bytearray()
        self._head_seen = False
        self._left = 0  # body bytes still missing of this chunk, or of the body
        self._chunked = False
        self._until_close = False

    def feed(self, data: bytes) -> bytes:
        """Returns the body bytes that `data` completed. Raises `ValueError` on a broken frame."""
        self._buffer += data
        if not self._head_seen and not self._read_head():
            return b""
        if self._until_close:
            return self._take(len(self._buffer))
        if not self._chunked:
            body = self._take(min(self._left, len(self._buffer)))
            self._left -= len(body)
            self.complete = self._left == 0
            return body
        return self._read_chunks()

    def _take(self, count: int) -> bytes:
        body = bytes(self._buffer[:count])
        del self._buffer[:count]
        return body

    def _read_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).decode("latin-1").split("\r\n")
        del self._buffer[: end + 4]
        self.status = int(lines[0].split(" ", 2)[1])
        headers = {
            name.strip().lower(): value.strip().lower()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self._chunked = "chunked" in headers.get("transfer-encoding", "")
        self._until_close = not self._chunked and "content-length" not in headers
        self._left = 0 if self._chunked else int(headers.get("content-length", 0))
        self._head_seen = True
        return True

    def _read_chunks(self) -> bytes:
        """Complete chunks only: a server writes each event whole, so little ever waits here."""
        out: list[bytes] = []
        buffer, start = self._buffer, 0
        while (line_end := buffer.find(b"\r\n", start)) >= 0:
            size = int(bytes(buffer[start:line_end]).split(b";", 1)[0], 16)
            body_end = line_end + 2 + size
            if len(buffer) < body_end + 2:
                break
            start = body_end + 2
            if size == 0:
                self.complete = True
                break
            out.append(bytes(buffer[line_end + 2 : body_end]))
        del buffer[:start]
        return b"".join(out)


class EventCounter:
    """Reads a stream of server-sent events into a `Sample`."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample
        self.ended = False  # `[DONE]` was seen
        self._tail = b""

    def feed(self, body: bytes, now: float) -> None:
        """`now`: when these bytes arrived, `perf_counter` seconds."""
        body = self._tail + body
        if b"\r" in body:  # together with the tail: a line end may arrive in two reads
            body = body.replace(b"\r\n", b"\n")
        *events, self._tail = body.split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event, now)

    def _event(self, event: bytes, now: float) -> None:
        sample = self.sample
        if _has_text(event):
            if sample.last is None:
                sample.first = now
            else:
                sample.gaps.append(now - sample.last)
            sample.last = now
            sample.events += 1
        elif event[5:].lstrip().startswith(b"[DONE]"):
            self.ended = True
        elif _has_facts(event):
            facts = json.loads(event[5:])
            if facts.get("error"):
                sample.error = str(facts["error"].get("message", facts["error"]))
            if usage := facts.get("usage"):
                sample.output_tokens = usage["completion_tokens"]
                sample.prompt_tokens = usage["prompt_tokens"]
                details = usage.get("prompt_tokens_details") or {}
                sample.cached_tokens = details.get("cached_tokens")


class _Exchange(asyncio.Protocol):
    """One connection; one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.WriteTransport | None = None
        self._sample: Sample | None = None
        self._done: asyncio.Future[Sample] | None = None
        self._reader = BodyReader()
        self._events: EventCounter | None = None
        self._problem = bytearray()  # the body of an answer other than 200

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is one in fact only

    def request(self, data: bytes) -> asyncio.Future[Sample]:
        assert self.transport is not None
        self._sample = Sample(perf_counter())
        self._done = asyncio.get_running_loop().create_future()
        self._reader, self._events = BodyReader(), EventCounter(self._sample)
        self._problem.clear()
        self.transport.write(data)
        return self._done

    def data_received(self, data: bytes) -> None:
        now = perf_counter()
        if self._sample is None or self._events is None:
            return
        try:
            body = self._reader.feed(data)
            if self._reader.status == 200:
                self._events.feed(body, now)
            else:
                self._problem += body
        except (ValueError, KeyError, TypeError) as error:
            self._sample.error = f"broken response: {error}"
            self._settle(now)
            return
        if self._reader.complete:
            self._settle(now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        if self._sample is not None:
            if not (self._events and self._events.ended):
                self._sample.error = self._sample.error or f"connection lost: {exc or 'closed'}"
            self._settle(perf_counter())

    def _settle(self, now: float) -> None:
        assert self._sample is not None
        assert self._done is not None
        assert self._events is not None
        sample, done = self._sample, self._done
        sample.finished = now
        if self._reader.status != 200:
            text = self._problem.decode(errors="replace")[:300]
            sample.error = sample.error or f"HTTP {self._reader.status}: {text}"
        elif not self._events.ended:
            sample.error = sample.error or "the stream ended without [DONE]"
        self._sample = None
        if not done.done():
            done.set_result(sample)


class Connection:
    """A keep-alive connection that reopens when the server closed it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._exchange: _Exchange | None = None

    async def open(self) -> None:
        """Connects now, so that the handshake is no part of a measurement."""
        await self._connected()

    async def send(self, data: bytes, timeout: float) -> Sample:
        """One request and its whole answer. Failures are in `Sample.error`, never raised."""
        started = perf_counter()
        try:
            exchange = await self._connected()
            return await asyncio.wait_for(exchange.request(data), timeout)
        except (OSError, TimeoutError) as error:
            self.close()
            reason = f"no complete answer in {timeout:g} s" if not str(error) else str(error)
            return Sample(started, finished=perf_counter(), error=reason)

    def close(self) -> None:
        if self._exchange is not None and self._exchange.transport is not None:
            self._exchange.transport.abort()
        self._exchange = None

    async def _connected(self) -> _Exchange:
        if self._exchange is None or self._exchange.transport is None:
            end = self._endpoint
            _, self._exchange = await asyncio.get_running_loop().create_connection(
                _Exchange, end.host, end.port, ssl=ssl.create_default_context() if end.tls else None
            )
        return self._exchange
