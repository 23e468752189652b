"""Prompts for the serving benchmark: distinct, of an exact length, of ordinary text."""

from __future__ import annotations

import json
import pydoc
import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import count

from benchmarks.streaming import Endpoint

# Documentation that every Python has, so the same command makes the same prompts anywhere.
_modules = (
    "argparse",
    "collections",
    "configparser",
    "csv",
    "datetime",
    "decimal",
    "difflib",
    "email.message",
    "fractions",
    "functools",
    "heapq",
    "html.parser",
    "inspect",
    "itertools",
    "json",
    "logging",
    "os",
    "pathlib",
    "random",
    "re",
    "shutil",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "tokenize",
    "typing",
    "unittest",
    "zipfile",
)
_piece = 6000  # characters a /tokenize call; well inside any server's context


def text_pieces() -> Iterator[str]:
    """Plain documentation text in pieces, endless: the modules again and again, later laps cut
    elsewhere, so that no two pieces are equal. A module is rendered when its turn comes."""
    for lap in count():
        for name in _modules:
            text = _documentation(name)
            for start in range(lap * 997 % _piece, len(text) - _piece, _piece):
                yield text[start : start + _piece]


@cache
def _documentation(module: str) -> str:
    return pydoc.plain(pydoc.render_doc(import_module(module)))


def call(endpoint: Endpoint, path: str, body: object | None = None, timeout: float = 60) -> object:
    """One plain JSON request. Raises `OSError` or `ValueError`."""
    headers = {"Content-Type": "application/json"}
    if endpoint.api_key:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return json.load(response)


def served_model(endpoint: Endpoint) -> str:
    """The first model that `/v1/models` lists."""
    answer = call(endpoint, "/v1/models")
    assert isinstance(answer, dict)
    return str(answer["data"][0]["id"])


class PromptPool:
    """Cuts prompts of exactly `length` tokens out of one long tokenized text.

    Every cut starts at another offset, so no two prompts share their first page and a prefix cache
    has nothing to find, unless `shared` leading tokens are asked to be the same in all of them.
    """

    def __init__(self, tokens: list[int], length: int, shared: int, seed: int) -> None:
        own = length - shared
        if own < 1 or len(tokens) < shared + own + 1:
            raise ValueError("the shared prefix must be shorter than the prompt")
        self._tokens, self._shared, self._own = tokens, shared, own
        self._offsets = list(range(shared, len(tokens) - own))
        random.Random(seed).shuffle(self._offsets)
        self._next = 0

    def mark(self) -> int:
        """Where the pool stands; `back_to` it gives the same prompts once more."""
        return self._next

    def back_to(self, mark: int) -> None:
        self._next = mark

    def take(self, count: int) -> list[list[int]]:
        """The next `count` prompts, as token ids. Raises `ValueError` when none are left."""
        if self._next + count > len(self._offsets):
            raise ValueError("out of distinct prompts: ask for fewer or shorter ones")
        offsets = self._offsets[self._next : self._next + count]
        self._next += count
        prefix = self._tokens[: self._shared]
        return [prefix + self._tokens[at : at + self._own] for at in offsets]


def tokenized_text(endpoint: Endpoint, model: str, count: int) -> list[int]:
    """At least `count` token ids of documentation text, by the server's own tokenizer.

    Raises `OSError` when the server has no `/tokenize`.
    """
    tokens: list[int] = []
    for piece in text_pieces():
        if len(tokens) >= count:
            break
        body = {"model": model, "prompt": piece, "add_special_tokens": False}
        answer = call(endpoint, "/tokenize", body)
        assert isinstance(answer, dict)
        tokens += answer["tokens"]
    return tokens


def texts_of_length(endpoint: Endpoint, model: str, prompts: list[list[int]]) -> list[str]:
    """Prompts as text, for endpoints that take no ids. Lengths may then differ by a token or two,
    and a chat template adds its own."""
    texts = []
    for prompt in prompts:
        answer = call(endpoint, "/detokenize", {"model": model, "tokens": prompt})
        assert isinstance(answer, dict)
        texts.append(str(answer["prompt"]))
    return texts
