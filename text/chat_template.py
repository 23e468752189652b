"""Chat templates: Jinja in a sandbox, with what Hugging Face checkpoints expect to find there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]

# Stands in for the last message's end while `continue_final_message` looks for it.
_MARK = "\ue000continue\ue000"


class TemplateError(Exception):
    """A conversation that the template refuses or cannot render; the message is for the client."""


class ChatTemplate:
    """One compiled template. Rendering is pure and may run on any thread."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises `TemplateError` when the template does not compile."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateError(f"the chat template does not compile: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation. Raises `TemplateError`.

        `continue_final_message` leaves the last message open: the prompt ends with its content, and
        nothing the template would put after it.
        """
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message excludes add_generation_prompt")
        rendered = list(messages)
        if continue_final_message:
            rendered[-1] = _marked(messages[-1])
        try:
            prompt = self._template.render(
                **{
                    **self._special_tokens,
                    **(variables or {}),
                    "messages": rendered,
                    "tools": list(tools) if tools else None,
                    "documents": list(documents) if documents else None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
            raise TemplateError(f"the chat template failed on these messages: {error}") from error
        return _cut(prompt) if continue_final_message else prompt


def load_chat_template(
    folder: Path, special_tokens: Mapping[str, str], override: Path | None = None
) -> ChatTemplate | None:
    """The checkpoint's template, None if it has none.

    Looked for in `override`, `chat_template.jinja`, `chat_template.json` and tokenizer_config.json,
    where it is a string or a list of named templates, of which `default` is taken.
    """
    if override is not None:
        return ChatTemplate(override.read_text(encoding="utf-8"), special_tokens)
    file = folder / "chat_template.jinja"
    if file.exists():
        return ChatTemplate(file.read_text(encoding="utf-8"), special_tokens)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        source = _named(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))
        if source is not None:
            return ChatTemplate(source, special_tokens)
    return None


def _named(entry: object) -> str | None:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, list):
        return None
    named = {e.get("name"): e.get("template") for e in entry if isinstance(e, dict)}
    source = named.get("default", next(iter(named.values()), None))
    return source if isinstance(source, str) else None


def _marked(last: Message) -> dict[str, Any]:
    """The last message with a mark at the end of its text."""
    content = last.get("content")
    if not isinstance(content, str):
        raise TemplateError("continue_final_message needs a last message with text content")
    return {**last, "content": content + _MARK}


def _cut(prompt: str) -> str:
    """End the prompt where the last message's content ends."""
    place = prompt.rfind(_MARK)
    if place < 0:
        raise TemplateError("the chat template does not show the last message's content")
    return prompt[:place]


class _Generation(Extension):
    """`{% generation %}` marks assistant text for training masks; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Any) -> str:
        return str(caller())


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML characters, which models never saw."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
