"""The benchmark's HTTP client: framing, event counting, and every way a request can fail."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.streaming import BodyReader, Connection, Endpoint, EventCounter, Sample
from tests.benchmarks.scripted_server import Script, scripted_server


def chunked(pieces: list[bytes]) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in pieces)
    return head + body + b"0\r\n\r\n"


@pytest.mark.parametrize("seed", range(20))
def test_chunked_body_survives_any_split(seed: int) -> None:
    rng = random.Random(seed)
    pieces = [rng.randbytes(rng.randint(1, 40)) for _ in range(12)]
    wire = chunked(pieces)
    reader, out = BodyReader(), b""
    while wire:
        cut = rng.randint(1, 25)
        assert not reader.complete
        out += reader.feed(wire[:cut])
        wire = wire[cut:]
    assert reader.complete
    assert out == b"".join(pieces)


def test_body_with_a_length_and_with_none() -> None:
    reader = BodyReader()
    assert reader.feed(b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nab") == b"ab"
    assert not reader.complete
    assert reader.feed(b"cd") == b"cd"
    assert reader.complete
    assert reader.status == 404
    reader = BodyReader()
    assert reader.feed(b"HTTP/1.1 200 OK\r\n\r\nab") == b"ab"
    assert not reader.complete


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def test_events_with_text_are_counted_and_no_others() -> None:
    stream = b"".join(
        [
            event({"choices": [{"delta": {"role": "assistant", "content": ""}}]}),
            event({"choices": [{"delta": {"content": 'an "error": {'}}]}),
            b": keep-alive\n\n",
            event({"choices": [{"delta": {"content": "b"}}]}),
            event({"choices": [{"delta": {}, "finish_reason": "length"}]}),
            event({"choices": [], "usage": {"completion_tokens": 5, "prompt_tokens": 7}}),
            b"data: [DONE]\n\n",
        ]
    )
    for newline in (b"\n", b"\r\n"):
        sample = Sample(0.0)
        counter = EventCounter(sample)
        wire = stream.replace(b"\n", newline)
        counter.feed(wire[:250], 1.0)
        counter.feed(wire[250:], 3.0)
        assert sample.events == 2
        assert sample.tokens == 5
        assert sample.prompt_tokens == 7
        assert sample.error is None
        assert counter.ended
    assert sample.first is not None


def test_crlf_cut_between_its_two_bytes() -> None:
    sample = Sample(0.0)
    counter = EventCounter(sample)
    wire = event({"choices": [{"text": "a"}]}).replace(b"\n", b"\r\n") * 2
    for i in range(len(wire)):
        counter.feed(wire[i : i + 1], float(i))
    assert sample.events == 2


async def test_a_connection_serves_many_requests() -> None:
    with scripted_server(Script(pause=0.002)) as url:
        end = Endpoint.parse(url + "/v1")
        connection = Connection(end)
        for count in (3, 5):
            request = end.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": count})
            sample = await connection.send(request, 10)
            assert sample.error is None
            assert (sample.tokens, sample.events, len(sample.gaps)) == (count, count, count - 1)
            assert sample.prompt_tokens == 3
            assert sample.first is not None
            assert 0.002 <= sample.first - sample.started <= sample.finished - sample.started
            assert sample.last is not None
            assert sum(sample.gaps) == pytest.approx(sample.last - sample.first)
            assert sum(sample.gaps) > 0
        connection.close()


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        (Script(fail_after=2), "scripted fault"),
        (Script(cut_after=2), "connection lost"),
        (Script(status=503), "HTTP 503"),
        (Script(pause=0.5), "no complete answer"),
    ],
)
async def test_failures_are_reported_and_the_next_request_works(
    script: Script, problem: str
) -> None:
    with scripted_server(script) as url:
        end = Endpoint.parse(url)
        connection = Connection(end)
        request = end.post("/v1/completions", {"prompt": [1], "max_tokens": 4})
        sample = await connection.send(request, 0.3)
        assert problem in (sample.error or "")
        script.fail_after = script.cut_after = None
        script.status, script.pause = 200, 0.0
        assert (await connection.send(request, 10)).error is None
        connection.close()


async def test_nobody_listens() -> None:
    sample = await Connection(Endpoint.parse("127.0.0.1:9")).send(b"", 1)
    assert sample.error


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a:8000", ("a", 8000, False, "")),
        ("http://a:8000/v1/", ("a", 8000, False, "")),
        ("https://a/x/v1", ("a", 443, True, "/x")),
        ("a:1", ("a", 1, False, "")),
    ],
)
def test_base_urls(url: str, expected: tuple[str, int, bool, str]) -> None:
    end = Endpoint.parse(url)
    assert (end.host, end.port, end.tls, end.prefix) == expected


def test_a_bad_base_url_is_refused() -> None:
    with pytest.raises(ValueError, match="base URL"):
        Endpoint.parse("ftp://a")
