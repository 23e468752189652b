"""Wrong requests: a 400 that names the field, before any work, never a 500 and never a 200."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from tests.fakes_engine import FACTS
from tests.server.helpers import TOKENIZER, chat, client_of, completion, config, reply_engine
from text.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
OUT = FACTS.vocab_size

# field, wrong values: for both endpoints
COMMON: list[tuple[str, list[Any]]] = [
    ("model", [5, [], {}, True]),
    ("max_tokens", [0, -1, 1.5, "5", True, 2**31, 2**70, []]),
    ("min_tokens", [-1, 1.5, "5", True, 2**31]),
    ("temperature", [-0.1, 2.1, "1", True, [], {}]),
    ("top_p", [0, 1.1, -1, "1", True]),
    ("top_k", [-2, 1.5, "3", True, 2**31]),
    ("min_p", [-0.1, 1.1, "0", True]),
    ("n", [0, -1, 129, 1.0, "2", True, 2**70]),
    ("stop", ["", ["a", ""], ["a"] * 5, 5, [5], {"a": 1}, "x" * 2000, [["a"]], True]),
    ("stop_token_ids", [[OUT], [-1], ["3"], [1.5], [True], 3, "3", [2**70]]),
    ("include_stop_str_in_output", ["yes", 1, []]),
    ("ignore_eos", ["yes", 1]),
    ("stream", ["yes", 1]),
    ("seed", [1.5, "1", True, 2**63, -(2**63) - 1, 2**70]),
    ("frequency_penalty", [2.1, -2.1, "0", True]),
    ("presence_penalty", [2.1, -2.1, "0", True]),
    ("repetition_penalty", [0, -1, "1", True, 1e6]),
    (
        "logit_bias",
        [
            {str(OUT): 1},
            {"-1": 1},
            {"a": 1},
            {"": 1},
            {"1.5": 1},
            {"²": 1},
            {"9" * 30: 1},
            [],
            5,
        ],
    ),
    ("allowed_token_ids", [[], [OUT], [-1], ["3"], 5]),
    ("bad_words", [[""], ["  "], "word", [5], ["x"] * 129, ["x" * 2000]]),
    ("prompt_logprobs", [-2, 21, -1, 1.5, True]),
    ("skip_special_tokens", ["no", 0]),
    ("add_special_tokens", ["no", 0]),
    ("truncate_prompt_tokens", [0, -2, 1.5, "5"]),
    ("truncation_side", ["middle", 1]),
    ("return_token_ids", ["yes", 1]),
    ("return_tokens_as_token_ids", ["yes", 1]),
    ("priority", [2**31, 0.5, "high", True]),
    ("request_id", [5, "x" * 200]),
    ("cache_salt", ["", 5, "x" * 200]),
    (
        "metadata",
        [{"a": 1}, {"k" * 65: "v"}, {"k": "v" * 513}, "x", {str(i): "" for i in range(17)}],
    ),
    ("timings", ["yes", 1]),
    ("slo", [5, "fast", [], {"ttft": 0}, {"ttft": -1}, {"mtpot": "1"}, {"mtpot": True}]),
    ("speculative", [5, "off", [], {"enabled": 1}, {"max_draft_tokens": -1}, {"drafter": 7}]),
    ("speculative", [{"drafter": "oracle"}, {"drafter": "model"}, {"length": 3}]),
    ("disable_spec_decode", ["no", 1]),
    ("slo", [{"mtpot": []}, {"tpot": 1}, {"ttft": 1, "x": None}]),
]
OF_CHAT: list[tuple[str, list[Any]]] = [
    ("messages", [None, [], "hi", [5], [None], {}, [[]]]),
    ("max_completion_tokens", [0, -1, 1.5, True]),
    ("logprobs", [5, "yes"]),
    ("add_generation_prompt", [1, "yes"]),
    ("continue_final_message", [1, "yes"]),
    ("chat_template_kwargs", [[], "x", 5]),
    ("documents", [{}, ["x"], 5]),
    ("reasoning_effort", ["extreme", 5]),
]
OF_COMPLETIONS: list[tuple[str, list[Any]]] = [
    ("prompt", [None, "", [], [[]], [""], 5, {}, True, [True], [OUT], [-1], [[OUT]], ["a", ""]]),
    ("prompt", [[1, "a"], [[1], ["a"]], [1.5], ["a", 5], ["a"] * 1025, [2**70]]),
    ("logprobs", [-1, 21, True, "5"]),
    ("echo", [1, "yes"]),
    ("best_of", [2, 0, "1"]),
]
CASES = [
    (path, field, value)
    for path, table in ((CHAT, COMMON + OF_CHAT), (COMPLETIONS, COMMON + OF_COMPLETIONS))
    for field, values in table
    for value in values
]


def body_for(path: str, **fields: Any) -> dict[str, Any]:
    return chat(**fields) if path == CHAT else completion(**fields)


@pytest.mark.parametrize("stream", [False, True])
async def test_every_wrong_value_is_named(post, engine, stream: bool) -> None:
    for path, field, value in CASES:
        fields = {field: value} if field == "stream" else {field: value, "stream": stream}
        answer = await post(path, json=body_for(path, **fields))
        where = (path, field, str(value)[:80], answer.text[:300])
        assert answer.status_code == 400, where
        error = answer.json()["error"]
        assert set(error) >= {"message", "type", "param", "code"}, where
        assert error["type"] == "invalid_request_error", where
        assert error["param"].split(".")[0].split("[")[0] == field, where
    assert engine.requests == []


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (
            CHAT,
            {"stream_options": {"include_usage": 1}, "stream": True},
            "stream_options.include_usage",
        ),
        (CHAT, {"slo": {"ttft": 0}}, "slo.ttft"),
        (COMPLETIONS, {"slo": {"ttft": 1, "mtpot": "1"}}, "slo.mtpot"),
        (COMPLETIONS, {"slo": {"tpot": 1}}, "slo.tpot"),
        (CHAT, {"speculative": {"drafter": "oracle"}}, "speculative.drafter"),
        (CHAT, {"speculative": {"max_draft_tokens": 1.5}}, "speculative.max_draft_tokens"),
        (
            COMPLETIONS,
            {"speculative": {"enabled": True}, "disable_spec_decode": True},
            "speculative",
        ),
        (CHAT, {"top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (CHAT, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        (
            CHAT,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (COMPLETIONS, {"max_tokens": 0}, "max_tokens"),
        (COMPLETIONS, {"best_of": 3, "n": 2}, "best_of"),
        (COMPLETIONS, {"prompt": ["x"] * 100, "n": 11}, "n"),
        (CHAT, {"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"tool_choice": {"type": "function"}}, "tool_choice"),
    ],
)
async def test_fields_that_do_not_go_together(post, path: str, fields, param: str) -> None:
    answer = await post(path, json=body_for(path, **fields))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"content": "x"}, "messages[0].role"),
        ({"role": "", "content": "x"}, "messages[0].role"),
        ({"role": 5, "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages[0].content[0]",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[0].content[0]"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": 5}}]},
            "messages[0].tool_calls[0].function",
        ),
    ],
)
async def test_messages(post, message: dict[str, Any], param: str) -> None:
    answer = await post(CHAT, json={"messages": [message]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b"5",
        b"\xff\xfe",
        b'{"a": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"a":' * 2000,
        b"[" * 100_000,
    ],
    ids=str,
)
async def test_bodies_that_are_no_json_object(post, path: str, data: bytes) -> None:
    answer = await post(path, content=data, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


async def test_nesting(post) -> None:
    def nested(depth: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(depth):
            value = [value]
        return chat(chat_template_kwargs={"x": value})

    limit = config().server.max_json_depth - 2  # the body and chat_template_kwargs
    assert (await post(CHAT, json=nested(limit))).status_code == 200
    answer = await post(CHAT, json=nested(limit + 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    flat = chat(chat_template_kwargs={"x": "[{" * 1000})
    assert (await post(CHAT, json=flat)).status_code == 200


async def test_of_duplicate_keys_the_last_wins(post) -> None:
    data = json.dumps(chat())[:-1].encode() + b', "max_tokens": 0, "max_tokens": 3}'
    answer = await post(CHAT, content=data, headers={"content-type": "application/json"})
    assert answer.json()["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
async def test_content_types(post, kind: str) -> None:
    answer = await post(CHAT, content=json.dumps(chat()), headers={"content-type": kind})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_content_type"
    fine = {"content-type": "Application/JSON; charset=utf-8"}
    answer = await post(CHAT, content=json.dumps(chat()), headers=fine)
    assert answer.status_code == 200


@pytest.mark.parametrize("announced", [True, False])
async def test_bodies_that_are_too_large(announced: bool) -> None:
    async def chunks():
        for _ in range(10):
            yield b" " * 200

    async with client_of(reply_engine(), cfg=config(max_body_bytes=1000)) as client:
        content = b" " * 2000 if announced else chunks()
        answer = await client.post(
            CHAT, content=content, headers={"content-type": "application/json"}
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat("word " * 600)),
        (CHAT, chat("word " * 600, max_tokens=7)),
        (COMPLETIONS, completion("word " * 600)),
        (COMPLETIONS, completion([5] * 600)),
        (COMPLETIONS, completion([5] * FACTS.max_model_len)),
        (COMPLETIONS, completion("x" * 100_000)),
        (CHAT, chat("x" * 100_000)),
    ],
)
async def test_prompts_over_the_context(post, path: str, body: dict[str, Any]) -> None:
    answer = await post(path, json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert f"maximum context length is {FACTS.max_model_len} tokens" in error["message"]
    assert "However, you requested" in error["message"]
    assert error["n_ctx"] == FACTS.max_model_len
    assert error["n_prompt_tokens"] >= FACTS.max_model_len


async def test_hopeless_text_is_refused_without_tokenizing_it(post, monkeypatch) -> None:
    monkeypatch.setattr("text.tokenizer.Tokenizer.encode", lambda *_, **__: 1 / 0)
    for path, body in ((CHAT, chat("x" * 10**6)), (COMPLETIONS, completion("x" * 10**6))):
        answer = await post(path, json=body)
        assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_the_longest_prompt_that_fits(post) -> None:
    body = completion([5] * (FACTS.max_model_len - 1), max_tokens=100)
    answer = await post(COMPLETIONS, json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
async def test_unknown_models(post, path: str) -> None:
    body = {**chat(), "prompt": "x", "tokens": [1], "model": "other"}
    if path == "/tokenize":
        del body["messages"]
    answer = await post(path, json=body)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-priority", "high"),
        ("x-vllm-priority", str(2**40)),
        ("x-request-timeout-ms", "0"),
        ("x-request-timeout-ms", "-5"),
        ("x-request-timeout-ms", "soon"),
        ("x-request-timeout-ms", "9" * 5000),
        ("x-priority", "9" * 5000),
    ],
)
async def test_headers(post, name: str, value: str) -> None:
    answer = await post(CHAT, json=chat(), headers={name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "a", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": 5},
        {"prompt": "a", "add_special_tokens": 1},
        {"messages": []},
    ],
)
async def test_tokenize(post, body: dict[str, Any]) -> None:
    assert (await post("/tokenize", json=body)).status_code == 400


@pytest.mark.parametrize(
    "tokens", [None, "a", [OUT], [-1], [1.5], [True], 5], ids=lambda value: str(value)
)
async def test_detokenize(post, tokens: Any) -> None:
    assert (await post("/detokenize", json={"tokens": tokens})).status_code == 400


async def test_tokens_the_model_was_not_built_for() -> None:
    """Tokenizers have added tokens beyond the embedding; they must not reach the engine."""
    start = TOKENIZER.token_id("<|im_start|>")
    assert start is not None
    engine = reply_engine("a", facts=msgspec.structs.replace(FACTS, vocab_size=start))
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json=chat())
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages"
        answer = await client.post(COMPLETIONS, json=completion("x", max_tokens=1))
        assert answer.status_code == 200
    assert engine.requests[0].params.stop_token_ids == frozenset()


async def test_large_fields_are_checked_once_not_for_each_prompt(post, monkeypatch) -> None:
    """1024 prompts must not multiply the work that one field causes on the event loop."""
    calls = 0
    encode = Tokenizer.encode

    def counted(self, text: str, **options: Any) -> list[int]:
        nonlocal calls
        calls += text == "bad"
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    bias = {str(i): 1 for i in range(OUT)}
    body = completion([[5]] * 200, bad_words=["bad"], logit_bias=bias, max_tokens=1)
    assert (await post(COMPLETIONS, json=body)).status_code == 200
    assert calls == 1
    many = {"0" * i + "1": 1 for i in range(5000)}
    answer = await post(COMPLETIONS, json=completion(logit_bias=many))
    assert answer.json()["error"]["param"] == "logit_bias"


async def test_equal_prompts_of_a_request_draw_seeds_of_their_own(post, engine) -> None:
    await post(COMPLETIONS, json=completion(["a", "a"]))
    await post(COMPLETIONS, json=completion(["a", "a"], seed=3))
    first, second, *seeded = [request.params.seed for request in engine.requests]
    assert first != second
    assert seeded == [3, 3]
