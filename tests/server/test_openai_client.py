"""The official client against a real server on a socket."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from engine.errors import RejectedError
from scheduler.request import FinishReason, Load, Speculation
from tests.fakes_engine import ScriptedEngine
from tests.server.helpers import EOS, MODEL, REPLY, TOKENIZER, reply_engine
from tests.server.live import serving, until

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def live() -> Iterator[tuple[ScriptedEngine, str]]:
    engine = reply_engine()
    with serving(engine) as url:
        yield engine, url


@pytest.fixture
def engine(live: tuple[ScriptedEngine, str]) -> ScriptedEngine:
    """The live engine as it was at first."""
    fresh = reply_engine()
    for name in ("script", "delay", "die_after", "stall_after", "reject", "load", "serving"):
        setattr(live[0], name, getattr(fresh, name))
    live[0].requests.clear()
    live[0].aborts.clear()
    return live[0]


@pytest.fixture
def client(live: tuple[ScriptedEngine, str]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live[1]}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_chat(engine, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, n=2, temperature=0
    )
    assert [c.message.content for c in answer.choices] == [REPLY, REPLY]
    assert [c.finish_reason for c in answer.choices] == ["stop", "stop"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    assert b"".join(bytes(e.bytes or []) for e in content).decode() == REPLY
    assert answer._request_id


@pytest.mark.parametrize("stop", [None, "STOP"])
def test_chat_stream(engine, client: openai.OpenAI, stop) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stream=True,
        stream_options={"include_usage": True},
        stop=stop,
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == (REPLY if stop is None else REPLY.split(stop)[0])
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert len({c.id for c in chunks}) == 1


def test_completions(engine, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], max_tokens=5, echo=True, logprobs=2, seed=3
    )
    assert [c.text[0] for c in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 6
    stream = client.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True)
    assert "".join(c.choices[0].text for c in stream) == answer.choices[0].text[1:]


@pytest.mark.parametrize("slo", [{"ttft": 1, "mtpot": 0.5}, {"ttft": 2.5}, {}, None])
def test_latency_targets_go_in_the_extra_body(engine, client: openai.OpenAI, slo) -> None:
    extra = {"slo": slo}
    client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=extra)
    client.completions.create(model=MODEL, prompt="a", extra_body=extra)
    wanted = slo or {}
    for request in engine.requests:
        assert request.ttft_target == wanted.get("ttft")
        assert request.mtpot_target == wanted.get("mtpot")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", extra_body={"slo": {"ttft": -1}})
    assert bad.value.param == "slo.ttft"


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({}, Speculation()),
        ({"speculative": {}}, Speculation()),
        ({"speculative": {"enabled": False}}, Speculation(enabled=False)),
        ({"speculative": None, "disable_spec_decode": True}, Speculation(enabled=False)),
        ({"speculative": {"max_draft_tokens": 0}}, Speculation(max_draft_tokens=0)),
        (
            {"speculative": {"max_draft_tokens": 3, "drafter": "suffix"}},
            Speculation(max_draft_tokens=3, drafter="suffix"),
        ),
    ],
)
def test_speculation_goes_in_the_extra_body(engine, client: openai.OpenAI, extra, wanted) -> None:
    answer = client.completions.create(model=MODEL, prompt="a", extra_body=extra)
    (request,) = engine.requests
    assert request.speculation == wanted
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert answer.usage.completion_tokens_details.accepted_prediction_tokens == 0
    wrong = {"speculative": {"drafter": "oracle"}}
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model=MODEL, prompt="a", extra_body=wrong)
    assert bad.value.param == "speculative.drafter"
    assert "there are suffix" in str(bad.value)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_right_classes(engine, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=5)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError, match="maximum context length") as long:
        client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x " * 3000}], stream=True
        )
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=MESSAGES)
    engine.reject = RejectedError("queue_full", "full", 1.0)
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    engine.reject = None
    engine.serving = False
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)


def test_the_client_waits_as_told_and_tries_again(engine, client: openai.OpenAI) -> None:
    engine.load = Load(waiting=10**6)
    retrying = client.with_options(max_retries=1)
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        engine.load = Load()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openai._base_client.time.sleep", sleep)
        answer = retrying.chat.completions.create(model=MODEL, messages=MESSAGES)
    assert answer.choices[0].message.content == REPLY
    assert len(slept) == 1
    assert 1.0 <= slept[0] <= 120


def test_a_failure_in_the_middle_is_an_error(engine, client: openai.OpenAI) -> None:
    engine.die_after = 3
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    with pytest.raises(openai.APIError) as error:
        for _ in stream:
            pass
    assert error.value.code == "service_unavailable"


def test_the_interpreter_may_leave_at_any_time(engine, client: openai.OpenAI) -> None:
    engine.delay = 0.01
    stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    next(stream)
    stream.close()
    assert client.chat.completions.create(model=MODEL, messages=MESSAGES).choices


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_leaving_frees_the_engine(live, engine, stream: bool, path: str) -> None:
    """Also while nothing is produced, as a queued request would."""
    engine.stall_after = 0
    body = {"messages": MESSAGES, "prompt": "x", "stream": stream}
    body.pop("prompt" if "chat" in path else "messages")
    async with httpx.AsyncClient(base_url=live[1]) as http:
        with pytest.raises(httpx.TimeoutException):
            await http.post(path, json=body, timeout=0.5)
    await until(lambda: engine.aborts)
    assert engine.aborts[0][2] is FinishReason.ABORT
    await until(lambda: engine.running == 0)


async def test_many_streams_at_once(live, engine) -> None:
    engine.script = lambda request, c: [*request.prompt[4:-6], EOS]
    async with openai.AsyncOpenAI(base_url=f"{live[1]}/v1", api_key="none") as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(
                model=MODEL, prompt=f"text number {i} " * 3, max_tokens=100, stream=True
            )
            return "".join([c.choices[0].text async for c in stream])

        import asyncio

        texts = await asyncio.gather(*(one(i) for i in range(32)))
    for i, text in enumerate(texts):
        ids = TOKENIZER.encode(f"text number {i} " * 3)
        assert text == TOKENIZER.decode(ids[4:-6])
