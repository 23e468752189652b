"""Every field in the table does what the table says, and the table names every field we honour."""

from __future__ import annotations

from typing import Any

import pytest

from server.parameters import PARAMETERS, Endpoint, Handling, Parameter, known
from server.schema import ChatBody, CompletionBody
from tests.server.helpers import chat, client_of, completion, config, reply_engine

PATHS = {Endpoint.CHAT: "/v1/chat/completions", Endpoint.COMPLETIONS: "/v1/completions"}
MODELS = {Endpoint.CHAT: ChatBody, Endpoint.COMPLETIONS: CompletionBody}
UNUSUAL = {"x": [1, {"y": None}]}  # a value that no field takes as neutral

# A legal value for every honoured field, with the fields it needs.
LEGAL: dict[str, dict[str, Any]] = {
    "model": {"model": "org/tiny"},
    "messages": {},
    "prompt": {},
    "max_completion_tokens": {"max_completion_tokens": 3},
    "max_tokens": {"max_tokens": 3},
    "min_tokens": {"min_tokens": 1},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "n": {"n": 2},
    "stop": {"stop": ["a"]},
    "stop_token_ids": {"stop_token_ids": [3]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True},
    "ignore_eos": {"ignore_eos": True, "max_tokens": 5},
    "stream": {"stream": False},
    "stream_options": {"stream_options": {"include_usage": True}, "stream": True},
    "seed": {"seed": 5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "logit_bias": {"logit_bias": {"3": 1}},
    "allowed_token_ids": {"allowed_token_ids": [1]},
    "bad_words": {"bad_words": ["x"]},
    "top_logprobs": {"top_logprobs": 1, "logprobs": True},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True},
    "skip_special_tokens": {"skip_special_tokens": False},
    "add_special_tokens": {"add_special_tokens": True},
    "add_generation_prompt": {"add_generation_prompt": True},
    "continue_final_message": {"continue_final_message": True},
    "chat_template_kwargs": {"chat_template_kwargs": {"a": 1}},
    "documents": {"documents": [{"text": "x"}]},
    "reasoning_effort": {"reasoning_effort": "low"},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 5},
    "truncation_side": {"truncation_side": "left"},
    "return_token_ids": {"return_token_ids": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True},
    "priority": {"priority": 1},
    "request_id": {"request_id": "r"},
    "cache_salt": {"cache_salt": "s"},
    "metadata": {"metadata": {"a": "b"}},
    "timings": {"timings": True},
    "slo": {"slo": {"ttft": 1, "mtpot": 0.5}},
    "speculative": {"speculative": {"enabled": True, "max_draft_tokens": 2, "drafter": "suffix"}},
    "disable_spec_decode": {"disable_spec_decode": True},
    "best_of": {"best_of": 1},
}
CASES = [(endpoint, p) for endpoint in Endpoint for p in known(endpoint).values()]
IDS = [f"{endpoint}-{p.name}" for endpoint, p in CASES]


def body(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    return chat(**fields) if endpoint is Endpoint.CHAT else completion(**fields)


async def strictly(endpoint: Endpoint, fields: dict[str, Any]):
    async with client_of(reply_engine(), cfg=config(strict_params=True)) as client:
        return await client.post(PATHS[endpoint], json=body(endpoint, **fields))


def test_names_are_unique() -> None:
    for endpoint in Endpoint:
        assert len(known(endpoint)) == sum(endpoint in p.endpoints for p in PARAMETERS)


@pytest.mark.parametrize("endpoint", list(Endpoint))
def test_the_schema_has_exactly_the_honoured_fields(endpoint: Endpoint) -> None:
    honoured = {p.name for p in known(endpoint).values() if p.handling is Handling.HONOURED}
    assert set(MODELS[endpoint].model_fields) == honoured


@pytest.mark.parametrize(("endpoint", "parameter"), CASES, ids=IDS)
async def test_each_field(post, endpoint: Endpoint, parameter: Parameter) -> None:
    name = parameter.name
    if parameter.handling is Handling.HONOURED:
        logprobs = {"logprobs": True if endpoint is Endpoint.CHAT else 1}
        fields = logprobs if name == "logprobs" else LEGAL[name]
        answer = await post(PATHS[endpoint], json=body(endpoint, **fields))
        assert answer.status_code == 200, answer.text
        assert "x-ignored-params" not in answer.headers
        return
    answer = await post(PATHS[endpoint], json=body(endpoint, **{name: UNUSUAL}))
    if parameter.handling is Handling.REFUSED:
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", name)
        assert name in error["message"]
    else:
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ignored-params"] == name
    for neutral in (None, *parameter.neutral):
        answer = await post(PATHS[endpoint], json=body(endpoint, **{name: neutral}))
        assert answer.status_code == 200, (neutral, answer.text)
        assert "x-ignored-params" not in answer.headers


@pytest.mark.parametrize(
    ("endpoint", "name"),
    [
        (endpoint, name)
        for endpoint in Endpoint
        for name in MODELS[endpoint].model_fields
        if name not in ("messages", "prompt")
    ],
)
async def test_null_is_the_same_as_nothing(post, endpoint: Endpoint, name: str) -> None:
    answer = await post(PATHS[endpoint], json=body(endpoint, **{name: None}))
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_unknown_fields(post, endpoint: Endpoint) -> None:
    fields = {"shiny": 1, "né\r\nw: x": 2, "user": "u"}
    answer = await post(PATHS[endpoint], json=body(endpoint, **fields))
    assert answer.status_code == 200
    assert answer.headers["x-ignored-params"] == "shiny,nwx,user"
    strict = await strictly(endpoint, {"shiny": 1})
    assert strict.status_code == 400
    assert strict.json()["error"]["code"] == "unknown_parameter"
    assert strict.json()["error"]["param"] == "shiny"
    assert (await strictly(endpoint, {"user": "u"})).status_code == 200
