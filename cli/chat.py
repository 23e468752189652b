"""Talk to a server from the terminal."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
from rich.console import Console

from cli.errors import CommandError

Message = dict[str, str]


def run(arguments: Sequence[str]) -> int:
    """Asks once with a message given, else reads messages until the end of input."""
    parser = argparse.ArgumentParser(prog="foresight chat", description=__doc__)
    parser.add_argument("message", nargs="?", help="ask this and leave")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1", help="default: %(default)s")
    parser.add_argument("--model", help="default: the first one the server names")
    parser.add_argument("--system", help="a system message to begin with")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"))
    given = parser.parse_args(arguments)
    headers = {"authorization": f"Bearer {given.api_key}"} if given.api_key else {}
    options = {
        name: value
        for name, value in (("temperature", given.temperature), ("max_tokens", given.max_tokens))
        if value is not None
    }
    timeout = httpx.Timeout(10.0, read=600.0)
    try:
        with httpx.Client(base_url=given.url, headers=headers, timeout=timeout) as client:
            model = given.model or _first_model(client)
            chat = Conversation(client, {"model": model, **options}, given.system)
            if given.message is not None:
                chat.ask(given.message)
            else:
                _converse(chat, model)
    except httpx.HTTPError as error:
        raise CommandError(f"no answer from {given.url}: {error}.") from error
    return 0


class Conversation:
    """The messages so far, and how to add one."""

    def __init__(self, client: httpx.Client, options: dict[str, Any], system: str | None) -> None:
        self._client = client
        self._options = options
        self._console = Console(highlight=False, markup=False)
        self._messages: list[Message] = (
            [] if system is None else [{"role": "system", "content": system}]
        )

    def ask(self, text: str) -> None:
        """Prints the answer as it comes. Raises `CommandError` when the server refuses."""
        messages = [*self._messages, {"role": "user", "content": text}]
        body = {**self._options, "messages": messages, "stream": True}
        parts: list[str] = []
        with self._client.stream("POST", "/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise CommandError(_reason(answer))
            for piece in _pieces(answer):
                parts.append(piece)
                self._console.print(piece, end="", soft_wrap=True)
        self._console.print()
        self._messages = [*messages, {"role": "assistant", "content": "".join(parts)}]


def _converse(chat: Conversation, model: str) -> None:
    print(f"Talking to {model}; an empty line or Ctrl-D ends it.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            return
        chat.ask(text)


def _pieces(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise CommandError(event["error"]["message"])
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def _first_model(client: httpx.Client) -> str:
    answer = client.get("/models")
    if answer.status_code != 200:
        raise CommandError(_reason(answer))
    name: str = answer.json()["data"][0]["id"]
    return name


def _reason(answer: httpx.Response) -> str:
    try:
        message: str = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {answer.status_code}."
    return message
