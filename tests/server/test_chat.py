"""/v1/chat/completions: what is asked of the engine and what is answered."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scheduler.request import FinishReason
from tests.fakes_engine import FACTS, ScriptedEngine, fixed
from tests.server.helpers import (
    EOS,
    MODEL,
    REPLY,
    TEXT,
    TOKENIZER,
    chat,
    client_of,
    config,
    reply_engine,
    text_assets,
)

PATH = "/v1/chat/completions"


async def ask(engine: ScriptedEngine, *, text=TEXT, cfg=None, headers=None, **fields):
    async with client_of(engine, text, cfg) as client:
        answer = await client.post(PATH, json=chat(**fields), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


async def params_for(text=TEXT, cfg=None, **fields):
    """The engine's parameters for a request with these fields."""
    engine = reply_engine()
    await ask(engine, text=text, cfg=cfg, **fields)
    return engine.requests[0].params


async def test_a_plain_answer() -> None:
    engine = reply_engine(cached_tokens=16)
    answer = (await ask(engine)).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == MODEL
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    produced = len(TOKENIZER.encode(REPLY)) + 1  # the end token was generated too
    prompt = len(engine.requests[0].prompt)
    assert answer["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": produced,
        "total_tokens": prompt + produced,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


async def test_the_prompt_is_the_rendered_template() -> None:
    engine = reply_engine()
    await ask(engine, content="wörld")
    rendered = "<|im_start|>user\nwörld<|im_end|>\n<|im_start|>assistant\n"
    assert list(engine.requests[0].prompt) == TOKENIZER.encode(rendered)


async def test_text_parts_thoughts_and_template_variables() -> None:
    engine = reply_engine()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    async with client_of(engine) as client:
        answer = await client.post(
            PATH,
            json={
                "messages": [{"role": "custom", "content": parts, "unknown": 1}],
                "chat_template_kwargs": {"enable_thinking": True},
            },
        )
    assert answer.status_code == 200
    assert "x-ignored-params" not in answer.headers
    rendered = "<|im_start|>custom\na\nb<|im_end|>\n<|im_start|>assistant\n<think>"
    assert list(engine.requests[0].prompt) == TOKENIZER.encode(rendered)


async def test_reasoning_effort_none_turns_thinking_off() -> None:
    for effort, thinks in (("none", False), ("high", True)):
        engine = reply_engine()
        await ask(engine, reasoning_effort=effort)
        assert TOKENIZER.decode(engine.requests[0].prompt).endswith("<think>") == thinks


async def test_a_history_of_tool_calls_is_an_input_like_others() -> None:
    engine = reply_engine()
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    async with client_of(engine) as client:
        answer = await client.post(
            PATH,
            json={
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "c", "content": "3"},
                ]
            },
        )
    assert answer.status_code == 200


async def test_continue_final_message() -> None:
    engine = reply_engine()
    async with client_of(engine) as client:
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So"}]
        body = {"messages": messages, "continue_final_message": True}
        assert (await client.post(PATH, json=body)).status_code == 200
    text = TOKENIZER.decode(engine.requests[0].prompt, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nSo")


async def test_choices_are_independent_and_the_prompt_counts_once() -> None:
    engine = ScriptedEngine(lambda request, c: [*TOKENIZER.encode(f"choice {c}"), EOS])
    answer = (await ask(engine, n=3)).json()
    assert [c["message"]["content"] for c in answer["choices"]] == [f"choice {c}" for c in range(3)]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == len(engine.requests[0].prompt)
    assert answer["usage"]["completion_tokens"] == sum(
        len(TOKENIZER.encode(f"choice {c}")) + 1 for c in range(3)
    )


async def test_a_stop_string_ends_the_choice_and_tells_the_engine() -> None:
    engine = reply_engine()
    answer = (await ask(engine, stop=["STOP"])).json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == REPLY.split("STOP")[0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "STOP"
    kept = answer["usage"]["completion_tokens"]
    request = engine.requests[0]
    assert engine.aborts == [(request.id, 0, FinishReason.STOP, kept)]
    shown = TOKENIZER.decode(TOKENIZER.encode(REPLY)[:kept])
    assert "STOP" in shown
    assert "STOP" not in TOKENIZER.decode(TOKENIZER.encode(REPLY)[: kept - 1])


async def test_a_stop_string_inside_the_last_allowed_token_is_a_stop() -> None:
    engine = reply_engine("abcSTOP")
    limit = len(TOKENIZER.encode("abcSTOP"))
    choice = (await ask(engine, stop="STOP", max_tokens=limit)).json()["choices"][0]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "abc")


async def test_stop_strings_wait_for_min_tokens_and_may_be_kept() -> None:
    engine = reply_engine("x STOP y STOP z")
    fields = {"stop": "STOP", "include_stop_str_in_output": True, "min_tokens": 9}
    choice = (await ask(engine, **fields)).json()["choices"][0]
    assert choice["message"]["content"] == "x STOP y STOP"


async def test_a_clients_stop_token_is_named_an_end_token_is_not() -> None:
    (comma,) = TOKENIZER.encode(",")
    choice = (await ask(reply_engine(), stop_token_ids=[comma])).json()["choices"][0]
    assert choice["message"]["content"] == REPLY.split(",")[0]
    assert choice["stop_reason"] == comma
    choice = (await ask(reply_engine())).json()["choices"][0]
    assert choice["stop_reason"] is None


async def test_a_stop_string_that_names_a_special_token() -> None:
    """Its text is never part of the output, so only the token can be looked for."""
    ids = [*TOKENIZER.encode("a"), TOKENIZER.token_id("<|im_start|>"), *TOKENIZER.encode("b"), EOS]
    choice = (await ask(ScriptedEngine(fixed(ids)), stop="<|im_start|>")).json()["choices"][0]
    assert choice["message"]["content"] == "a"
    assert choice["stop_reason"] == "<|im_start|>"
    engine = ScriptedEngine(fixed([*TOKENIZER.encode("a"), EOS]))
    choice = (await ask(engine, stop="<|im_end|>", ignore_eos=True)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("a", "stop")


async def test_length() -> None:
    answer = (await ask(reply_engine(), max_completion_tokens=3, max_tokens=99)).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


async def test_max_tokens_is_clamped_to_the_context_and_defaults_to_it() -> None:
    for fields in ({}, {"max_tokens": 10**6}):
        engine = reply_engine()
        await ask(engine, **fields)
        (request,) = engine.requests
        assert request.params.max_tokens == FACTS.max_model_len - len(request.prompt)


async def test_logprobs() -> None:
    answer = (await ask(reply_engine(), logprobs=True, top_logprobs=2)).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(e["bytes"]) for e in content).decode() == REPLY
    assert all(len(e["top_logprobs"]) == 2 for e in content)
    assert content[0]["top_logprobs"][0]["token"] == content[0]["token"]
    bare = (await ask(reply_engine(), logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert all(e["top_logprobs"] == [] for e in bare)


async def test_logprobs_end_where_a_stop_string_cuts_the_text() -> None:
    answer = (await ask(reply_engine(), logprobs=True, stop="STOP")).json()
    choice = answer["choices"][0]
    joined = b"".join(bytes(e["bytes"]) for e in choice["logprobs"]["content"]).decode()
    assert joined == choice["message"]["content"]


async def test_minus_infinity_is_a_number() -> None:
    engine = reply_engine()
    engine._scored = lambda token, top: replace(  # type: ignore[method-assign]
        ScriptedEngine._scored(engine, token, top), logprob=float("-inf")
    )
    content = (await ask(engine, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["logprob"] == -9999.0


async def test_prompt_logprobs() -> None:
    engine = reply_engine()
    answer = (await ask(engine, prompt_logprobs=1, n=2)).json()
    scores = answer["prompt_logprobs"]
    prompt = engine.requests[0].prompt
    assert len(scores) == len(prompt)
    assert scores[0] is None
    assert scores[1][str(prompt[1])]["rank"] == 1
    assert scores[1][str(prompt[1])]["decoded_token"] == TOKENIZER.token_label(prompt[1])


async def test_token_ids_are_all_that_usage_counts() -> None:
    engine = reply_engine()
    answer = (await ask(engine, return_token_ids=True)).json()
    ids = answer["choices"][0]["token_ids"]
    assert ids == [*TOKENIZER.encode(REPLY), EOS]
    assert len(ids) == answer["usage"]["completion_tokens"]
    assert answer["prompt_token_ids"] == list(engine.requests[0].prompt)
    stopped = (await ask(reply_engine(), return_token_ids=True, stop="STOP")).json()
    assert len(stopped["choices"][0]["token_ids"]) == stopped["usage"]["completion_tokens"]


async def test_tokens_named_by_id() -> None:
    fields = {"logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    entry = (await ask(reply_engine(), **fields)).json()["choices"][0]["logprobs"]["content"][0]
    assert entry["token"] == f"token_id:{TOKENIZER.encode(REPLY)[0]}"


async def test_special_tokens_on_demand() -> None:
    (start,) = (TOKENIZER.token_id("<|im_start|>"),)
    engine = ScriptedEngine(fixed([start, *TOKENIZER.encode("a"), EOS]))
    assert (await ask(engine)).json()["choices"][0]["message"]["content"] == "a"
    answer = (await ask(engine, skip_special_tokens=False)).json()
    assert answer["choices"][0]["message"]["content"] == "<|im_start|>a"


async def test_timings_and_metadata_are_returned_on_demand() -> None:
    answer = (await ask(reply_engine(), timings=True, metadata={"a": "b"})).json()
    assert answer["metadata"] == {"a": "b"}
    assert answer["metrics"]["time_to_first_token_ms"] > 0
    assert answer["metrics"]["queue_time_ms"] == 0
    assert "metrics" not in (await ask(reply_engine())).json()


async def test_sampling_fields_reach_the_engine() -> None:
    params = await params_for(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_p=0.1,
        seed=-1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.1,
        logit_bias={"5": -100, "3": 2},
        allowed_token_ids=[9, 4, 9],
        bad_words=["stop"],
        min_tokens=2,
        logprobs=True,
        top_logprobs=5,
    )
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 0, 0.1)
    assert params.seed == 2**64 - 1
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.repetition_penalty == 1.1
    assert params.logit_bias == ((3, 2), (5, -100))
    assert params.allowed_token_ids == (4, 9)
    assert params.bad_words == (
        tuple(TOKENIZER.encode("stop")),
        tuple(TOKENIZER.encode(" stop")),
    )
    assert params.min_tokens == 2
    assert params.logprobs == 5
    assert params.stop_token_ids == {EOS}


async def test_ignore_eos_keeps_the_clients_stop_tokens() -> None:
    params = await params_for(ignore_eos=True, stop_token_ids=[7])
    assert params.stop_token_ids == {7}


async def test_defaults_come_from_request_server_checkpoint_openai_in_this_order() -> None:
    text = text_assets(temperature=0.6, top_p=0.95, top_k=20)
    server = config(default_temperature=0.7)
    plain = await params_for()
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    params = await params_for(text=text)
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.95, 20)
    assert (await params_for(text=text, cfg=server)).temperature == 0.7
    assert (await params_for(text=text, cfg=server, temperature=0)).temperature == 0
    assert (await params_for(text=text, cfg=server, temperature=None)).temperature == 0.7
    without = config()
    model = replace(without.engine.model, generation_config=False)
    without = replace(without, engine=replace(without.engine, model=model))
    params = await params_for(text=text, cfg=without)
    assert (params.temperature, params.stop_token_ids) == (1.0, frozenset({EOS}))


async def test_seeds_are_drawn_reproducibly_from_the_configured_one() -> None:
    first, again = [(await params_for(cfg=config(seed=3))).seed for _ in range(2)]
    assert first == again
    assert (await params_for(cfg=config(seed=4))).seed != first


async def test_priority_deadline_tenant_and_salt() -> None:
    engine = reply_engine()
    await ask(engine, priority=3)
    await ask(engine, priority=3, headers={"X-Vllm-Priority": "-2"})
    await ask(engine, headers={"x-request-timeout-ms": "1500"}, cache_salt="a")
    await ask(engine, cfg=config(request_timeout_seconds=9), cache_salt="b")
    await ask(engine, cfg=config(queue_timeout_seconds=4))
    plain, header, timed, server, queued = engine.requests
    assert (plain.priority, header.priority) == (3, -2)
    assert plain.deadline is None
    assert timed.deadline is not None
    assert timed.deadline - timed.arrival == pytest.approx(1.5)
    assert server.deadline is not None
    assert server.deadline - server.arrival == pytest.approx(9)
    assert plain.queue_deadline is None
    assert queued.queue_deadline is not None
    assert queued.queue_deadline - queued.arrival == pytest.approx(4)
    assert plain.cache_salt == b""
    assert len({plain.cache_salt, timed.cache_salt, server.cache_salt}) == 3


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-5, None)), ("right", slice(0, 5))])
async def test_truncation(side: str, kept: slice) -> None:
    whole, engine = reply_engine(), reply_engine()
    await ask(whole)
    await ask(engine, truncate_prompt_tokens=5, truncation_side=side)
    assert engine.requests[0].prompt == whole.requests[0].prompt[kept]


async def test_truncation_to_what_fits() -> None:
    engine = reply_engine()
    await ask(engine, content="many words " * 400, truncate_prompt_tokens=-1, max_tokens=20)
    assert len(engine.requests[0].prompt) == FACTS.max_model_len - 20


async def test_request_ids() -> None:
    answer = await ask(reply_engine(), headers={"x-request-id": "mine-1"}, request_id="other")
    assert answer.headers["x-request-id"] == "mine-1"
    answer = await ask(reply_engine(), request_id="from-body")
    assert answer.headers["x-request-id"] == "from-body"
    answer = await ask(reply_engine(), headers={"x-request-id": "bad id\t"})
    assert answer.headers["x-request-id"] != "bad id\t"
    assert int(answer.headers["openai-processing-ms"]) >= 0


async def test_the_model_may_be_left_out() -> None:
    engine = reply_engine()
    async with client_of(engine) as client:
        body = chat()
        del body["model"]
        assert (await client.post(PATH, json=body)).json()["model"] == MODEL
