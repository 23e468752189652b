"""/v1/completions: prompts of every shape, echo and scoring."""

from __future__ import annotations

import pytest

from tests.fakes_engine import ScriptedEngine, logprob
from tests.server.helpers import (
    EOS,
    REPLY,
    TOKENIZER,
    client_of,
    completion,
    events,
    reply_engine,
    streamed_text,
)

PATH = "/v1/completions"
IDS = TOKENIZER.encode("hello world")


async def ask(engine: ScriptedEngine, prompt="hi", **fields):
    async with client_of(engine) as client:
        answer = await client.post(PATH, json=completion(prompt, **fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def echo_prompt() -> ScriptedEngine:
    """Each choice repeats its prompt and names itself."""
    return ScriptedEngine(
        lambda request, c: [*request.prompt, *TOKENIZER.encode(f"/{c}"), EOS], delay=0.001
    )


async def test_a_plain_answer_has_sixteen_tokens_by_default() -> None:
    engine = reply_engine()
    answer = await ask(engine)
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"][0]["text"] == TOKENIZER.decode(TOKENIZER.encode(REPLY)[:16])
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 16
    assert engine.requests[0].prompt == tuple(TOKENIZER.encode("hi"))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("hello", ["hello"]),
        (["hello", "world"], ["hello", "world"]),
        (IDS, ["hello world"]),
        ([IDS, TOKENIZER.encode("x")], ["hello world", "x"]),
        (["a", TOKENIZER.encode("b")], ["a", "b"]),
    ],
)
async def test_prompt_shapes(prompt, texts: list[str], stream: bool) -> None:
    """Choice c of prompt p has index p * n + c."""
    async with client_of(echo_prompt()) as client:
        body = completion(prompt, n=2, max_tokens=50, stream=stream)
        answer = await client.post(PATH, json=body)
    expected = [f"{text}/{c}" for text in texts for c in range(2)]
    if stream:
        found = events(answer.content)
        assert [streamed_text(found, i) for i in range(len(expected))] == expected
        return
    choices = answer.json()["choices"]
    assert [c["text"] for c in choices] == expected
    assert [c["index"] for c in choices] == list(range(len(expected)))
    assert answer.json()["usage"]["prompt_tokens"] == sum(
        len(TOKENIZER.encode(text)) for text in texts
    )


async def test_the_same_prompt_twice() -> None:
    answer = await ask(echo_prompt(), ["a", "a"])
    assert [c["text"] for c in answer["choices"]] == ["a/0", "a/0"]


async def test_an_evaluation_harness_scores_a_continuation() -> None:
    """The call shape of lm-eval's loglikelihood: one token beyond the echoed prompt."""
    fields = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    answer = await ask(reply_engine(), [IDS, IDS[:2]], **fields)
    for choice, ids in zip(answer["choices"], (IDS, IDS[:2]), strict=True):
        scores = choice["logprobs"]
        assert {len(values) for values in scores.values()} == {len(ids) + 1}
        assert scores["token_logprobs"][0] is None
        assert scores["top_logprobs"][0] is None
        assert scores["token_logprobs"][1:-1] == [logprob(token) for token in ids[1:]]
        for token, top in zip(scores["tokens"][1:-1], scores["top_logprobs"][1:-1], strict=True):
            assert max(top, key=top.__getitem__) == token  # greedy, by this engine's scores


async def test_offsets_point_into_the_shown_text() -> None:
    prompt = "🎉é🎉 x"
    answer = await ask(reply_engine("é!"), prompt, echo=True, logprobs=0)
    text, scores = answer["choices"][0]["text"], answer["choices"][0]["logprobs"]
    for token, offset in zip(scores["tokens"], scores["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token), (token, offset)


async def test_zero_tokens_with_echo_only_score() -> None:
    answer = await ask(reply_engine(), IDS, max_tokens=0, logprobs=0, echo=True)
    (choice,) = answer["choices"]
    assert choice["text"] == "hello world"
    assert len(choice["logprobs"]["tokens"]) == len(IDS)
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    only_end = ScriptedEngine(lambda request, c: [EOS])
    assert (await ask(only_end, IDS, max_tokens=0, echo=True))["choices"][0][
        "finish_reason"
    ] == "length"


async def test_logprobs_have_one_shape() -> None:
    scores = (await ask(reply_engine(), logprobs=3, max_tokens=50))["choices"][0]["logprobs"]
    assert "".join(scores["tokens"][:3]) == REPLY[: scores["text_offset"][3]]
    assert all(len(top) == 3 for top in scores["top_logprobs"])
    lonely = [t for t in scores["tokens"] if t.startswith("bytes:")]
    assert lonely  # parts of 🎉 are told apart by their bytes


async def test_prompt_logprobs_and_token_ids() -> None:
    answer = await ask(reply_engine(), IDS, prompt_logprobs=2, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["prompt_token_ids"] == IDS
    assert choice["prompt_logprobs"][0] is None
    assert len(choice["prompt_logprobs"]) == len(IDS)


async def test_echo_of_text_is_the_text_itself() -> None:
    assert (await ask(reply_engine("!"), "  a\u00a0b", echo=True))["choices"][0][
        "text"
    ] == "  a\u00a0b!"


async def test_best_of_equal_to_n() -> None:
    assert len((await ask(reply_engine(), n=2, best_of=2))["choices"]) == 2


async def test_one_prompt_that_fails_fails_the_request() -> None:
    async with client_of(reply_engine(fail_after=2)) as client:
        answer = await client.post(PATH, json=completion(["a", "b"]))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "server_error"
