"""The bytes of a streamed answer, event by event."""

from __future__ import annotations

import asyncio
import json

import pytest

from engine.errors import RejectedError
from tests.fakes_engine import ScriptedEngine, fixed
from tests.server.helpers import (
    EOS,
    MODEL,
    REPLY,
    TOKENIZER,
    chat,
    client_of,
    completion,
    config,
    events,
    reply_engine,
    streamed_text,
)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


async def stream(engine: ScriptedEngine, path: str = CHAT, cfg=None, **fields):
    body = chat(**fields) if path == CHAT else completion(**fields)
    async with client_of(engine, cfg=cfg) as client:
        answer = await client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    return answer


async def test_headers() -> None:
    headers = (await stream(reply_engine())).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"]


async def test_chat_event_by_event() -> None:
    found = events((await stream(reply_engine("Hi"))).content)
    *chunks, done = found
    assert done == "[DONE]"
    first = chunks[0]
    assert first["choices"] == [
        {
            "index": 0,
            "delta": {"content": "", "role": "assistant"},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    for chunk in chunks:
        assert list(chunk) == ["id", "object", "created", "model", "choices"]
        assert {k: chunk[k] for k in ("id", "created", "model")} == {
            k: first[k] for k in ("id", "created", "model")
        }
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == MODEL
    *content, last = chunks[1:]
    assert all(set(c["choices"][0]["delta"]) == {"content"} for c in content)
    assert all(c["choices"][0]["delta"]["content"] for c in content)
    assert all(c["choices"][0]["finish_reason"] is None for c in content)
    assert last["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]


async def test_completion_event_by_event() -> None:
    *chunks, done = events((await stream(reply_engine("Hi"), COMPLETIONS, max_tokens=9)).content)
    assert done == "[DONE]"
    *content, last = chunks
    assert all(c["object"] == "text_completion" for c in chunks)
    assert all(c["choices"][0]["finish_reason"] is None for c in content)
    assert last["choices"][0]["finish_reason"] == "stop"
    assert last["choices"][0]["text"] == ""


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("group", [1, 2, 3, 50])
@pytest.mark.parametrize("stop", [None, ["STOP"], ["🎉,", "zz"], ["never"]])
async def test_joined_stream_equals_the_whole_answer(path: str, group: int, stop) -> None:
    fields = {"max_tokens": 100, "stop": stop}
    found = events((await stream(reply_engine(group=group), path, **fields)).content)
    async with client_of(reply_engine()) as client:
        body = chat(**fields) if path == CHAT else completion(**fields)
        choice = (await client.post(path, json=body)).json()["choices"][0]
    expected = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    assert streamed_text(found) == expected
    assert found[-2]["choices"][0]["stop_reason"] == choice["stop_reason"]


async def test_a_character_cut_off_by_the_limit() -> None:
    ids = TOKENIZER.encode("a🎉")
    found = events((await stream(ScriptedEngine(fixed(ids)), max_tokens=len(ids) - 1)).content)
    assert streamed_text(found) == "a\ufffd"


async def test_no_event_for_tokens_without_text() -> None:
    ids = TOKENIZER.encode("🎉")
    assert len(ids) > 1
    found = events((await stream(ScriptedEngine(fixed([*ids, EOS])))).content)
    assert len(found) == len(["role", "🎉", "finish", "[DONE]"])


async def test_choices_interleave_by_index_and_end_once() -> None:
    engine = ScriptedEngine(lambda request, c: [*TOKENIZER.encode(f"choice {c} " * (c + 1)), EOS])
    *chunks, _ = events((await stream(engine, n=3)).content)
    ended: set[int] = set()
    roles = []
    for chunk in chunks:
        (choice,) = chunk["choices"]
        assert choice["index"] not in ended
        if "role" in choice["delta"]:
            roles.append(choice["index"])
        if choice["finish_reason"] is not None:
            ended.add(choice["index"])
    assert roles == [0, 1, 2]
    assert ended == {0, 1, 2}
    for c in range(3):
        assert streamed_text(chunks, c) == f"choice {c} " * (c + 1)


async def test_usage_at_the_end() -> None:
    fields = {"stream_options": {"include_usage": True, "include_obfuscation": True}}
    *chunks, usage, _ = events((await stream(reply_engine(), **fields)).content)
    assert usage["choices"] == []
    produced = len(TOKENIZER.encode(REPLY)) + 1
    assert usage["usage"]["completion_tokens"] == produced
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_on_every_chunk() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, usage, _ = events((await stream(reply_engine(), stream_options=options)).content)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert chunks[-1]["usage"] == usage["usage"]


async def test_continuous_usage_alone_is_no_usage() -> None:
    options = {"continuous_usage_stats": True}
    found = events((await stream(reply_engine(), stream_options=options)).content)
    assert all("usage" not in chunk for chunk in found[:-1])


async def test_usage_after_a_stop_string_has_the_engines_cached_tokens() -> None:
    options = {"include_usage": True}
    engine = reply_engine(cached_tokens=16)
    found = events((await stream(engine, stop="STOP", stream_options=options)).content)
    assert found[-2]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "STOP"])
async def test_usage_tells_what_was_demoted(n: int, stop: str | None) -> None:
    options = {"include_usage": True}
    for demoted in (0, 48):
        engine = reply_engine(demoted=demoted)
        found = events((await stream(engine, n=n, stop=stop, stream_options=options)).content)
        assert found[-2]["usage"].get("kv_demoted_tokens") == (n * demoted or None)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stop", [None, "STOP"])
async def test_usage_tells_of_the_drafts_of_all_choices(n: int, stop: str | None) -> None:
    options = {"include_usage": True}
    engine = reply_engine(drafts=(7, 5))
    found = events((await stream(engine, n=n, stop=stop, stream_options=options)).content)
    assert found[-2]["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 5 * n,
        "rejected_prediction_tokens": 2 * n,
    }


@pytest.mark.parametrize("group", [1, 3])
async def test_logprobs_cover_the_text(group: int) -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "stop": "STOP"}
    found = events((await stream(reply_engine(group=group), **fields)).content)
    entries = [
        entry
        for chunk in found[:-1]
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert b"".join(bytes(e["bytes"]) for e in entries).decode() == REPLY.split("STOP")[0]


async def test_token_ids_are_all_streamed() -> None:
    options = {"include_usage": True}
    fields = {"return_token_ids": True, "stream_options": options}
    *chunks, usage, _ = events((await stream(reply_engine(), **fields)).content)
    ids = [t for chunk in chunks for t in chunk["choices"][0].get("token_ids", ())]
    assert ids == [*TOKENIZER.encode(REPLY), EOS]
    assert len(ids) == usage["usage"]["completion_tokens"]


async def test_timings_and_metadata_come_in_a_chunk_of_their_own() -> None:
    found = events((await stream(reply_engine(), timings=True, metadata={"a": "b"})).content)
    assert found[-2]["choices"] == []
    assert found[-2]["metadata"] == {"a": "b"}
    assert found[-2]["metrics"]["time_to_first_token_ms"] > 0


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"die_after": 3}, "service_unavailable"),
        ({"fail_after": 3}, "server_error"),
        ({"abort_after": 3}, "service_unavailable"),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_failure_is_an_error_event_and_never_a_clean_end(
    path: str, fault: dict[str, int], code: str
) -> None:
    answer = await stream(reply_engine(delay=0.001, **fault), path, max_tokens=99)
    last = events(answer.content)[-1]
    assert last["error"]["code"] == code
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert b"[DONE]" not in answer.content
    assert b'"finish_reason":"' not in answer.content


async def test_a_fault_of_ours_is_an_error_event_without_details(monkeypatch) -> None:
    monkeypatch.setattr("server.choice.ChoiceText.push", lambda *_: 1 / 0)
    last = events((await stream(reply_engine())).content)[-1]
    assert last["error"]["code"] == "server_error"
    assert "division" not in json.dumps(last)


async def test_a_refusal_by_the_engine_is_still_a_status() -> None:
    engine = reply_engine(reject=RejectedError("queue_full", "full", 2.5))
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json=chat(stream=True))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["retry-after-ms"] == "2500"


async def test_invalid_streams_are_plain_errors() -> None:
    async with client_of(reply_engine()) as client:
        answer = await client.post(CHAT, json=chat("x " * 2000, stream=True))
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_silence_is_filled_with_comments() -> None:
    engine = reply_engine(stall_after=2)
    async with client_of(engine, cfg=config(keep_alive_seconds=0.02)) as client:
        waiting = asyncio.create_task(client.post(CHAT, json=chat(stream=True)))
        await asyncio.sleep(1.0)
        engine.die()
        content = (await waiting).content
    assert content.count(b"\n\n: keep-alive\n\n") >= 3
    assert events(content)[-1]["error"]


async def test_no_comments_while_tokens_flow() -> None:
    answer = await stream(reply_engine(delay=0.005), cfg=config(keep_alive_seconds=0.1))
    assert b": keep-alive" not in answer.content


async def test_echo_comes_first() -> None:
    found = events(
        (await stream(reply_engine("Hi"), COMPLETIONS, prompt="ab", echo=True, logprobs=1)).content
    )
    assert found[0]["choices"][0]["text"] == "ab"
    assert found[0]["choices"][0]["logprobs"]["token_logprobs"][0] is None
    assert streamed_text(found) == "abHi"
    offsets = [o for c in found[:-2] for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets[0] == 0
    assert offsets == sorted(offsets)
    assert len("ab") in offsets
