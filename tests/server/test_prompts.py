"""Which texts are tokenized on the event loop, and what is no prompt."""

from __future__ import annotations

import pytest

from server.errors import ApiError
from server.prompts import prompt_list
from tests.server.helpers import chat, client_of, completion, reply_engine
from text.pool import SHORT, TextPool

LONG = "x " * SHORT


@pytest.mark.parametrize(
    ("path", "body", "short"),
    [
        ("completions", completion(prompt="hello"), True),
        ("completions", completion(prompt=LONG), False),
        ("completions", completion(prompt=["hello"] * 3), False),  # each short, together not
        ("chat/completions", chat(), True),
        ("chat/completions", chat(messages=[{"role": "user", "content": LONG}]), False),
        ("chat/completions", chat(messages=[{"role": "user", "content": ""}] * 200), False),
        (
            "chat/completions",
            chat(messages=[{"role": "assistant", "content": "", "reasoning": LONG}]),
            False,
        ),
        ("chat/completions", chat(chat_template_kwargs={"facts": LONG}), False),
    ],
)
async def test_only_a_short_text_is_tokenized_on_the_event_loop(
    monkeypatch, path: str, body: dict, short: bool
) -> None:
    sizes = []
    run = TextPool.run

    async def recorded(self, function, characters=None):
        sizes.append(characters)
        return await run(self, function, characters)

    monkeypatch.setattr(TextPool, "run", recorded)
    async with client_of(reply_engine()) as client:
        await client.post(f"/v1/{path}", json=body)
    assert sizes
    assert all(size is not None and size <= SHORT for size in sizes) == short


@pytest.mark.parametrize("value", [[[]], [""], [[1], []]])
def test_an_empty_prompt_is_called_empty(value: list) -> None:
    with pytest.raises(ApiError, match="must not be empty"):
        prompt_list(value, 100)


@pytest.mark.parametrize("value", [[True], [[1, True]], [[1, 2.0]]])
def test_what_is_no_token_id_is_told_so(value: list) -> None:
    with pytest.raises(ApiError, match=r"integers|must be a string or a list of token ids"):
        prompt_list(value, 100)
