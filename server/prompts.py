"""Prompts as token ids: templates rendered and text tokenized, long ones off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from server.errors import context_exceeded, invalid, unavailable
from server.schema import ChatBody, ContentPart, Message, TokenizeBody
from text.assets import TextAssets
from text.chat_template import TemplateError
from text.pool import PoolFullError, TextPool

T = TypeVar("T")

MAX_PROMPTS = 1024
TRUNCATABLE = 8  # contexts; longer lists of ids are not worth truncating
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
THOUGHT_PARTS = frozenset({"thinking", "reasoning"})


@dataclass(frozen=True, slots=True)
class Truncation:
    """Keep `tokens` prompt tokens: the last ones, or with `keep_start` the first."""

    tokens: int
    keep_start: bool = False


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes prompts for one model."""

    text: TextAssets
    pool: TextPool
    max_model_len: int
    vocab_size: int

    async def chat(
        self,
        body: ChatBody | TokenizeBody,
        *,
        completion: int,
        variables: dict[str, Any] | None = None,
        documents: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; `completion` is only for the text of an overflow error.

        Raises `ApiError`.
        """
        template = self.text.template
        if template is None:
            raise invalid(
                "This model has no chat template; use /v1/completions.", "messages", "no_template"
            )
        if body.continue_final_message and body.add_generation_prompt:
            raise invalid(
                "continue_final_message and add_generation_prompt exclude each other.",
                "continue_final_message",
            )
        messages = [template_message(m, i) for i, m in enumerate(body.messages or [])]
        self._guard(sum(len(m["content"]) for m in messages), completion, "messages")
        # All that is rendered counts, thoughts and tool calls too.
        extra = documents or variables or body.chat_template_kwargs
        size = None if extra else len(orjson.dumps(messages))

        def make() -> list[int]:
            text = template.render(
                messages,
                add_generation_prompt=body.add_generation_prompt is not False
                and not body.continue_final_message,
                continue_final_message=bool(body.continue_final_message),
                documents=documents,
                variables={**(body.chat_template_kwargs or {}), **(variables or {})},
            )
            self._guard(len(text), completion, "messages")
            return self.text.tokenizer.encode(
                text, add_special_tokens=bool(body.add_special_tokens)
            )

        try:
            return await self.off_loop(make, size)
        except TemplateError as error:
            raise invalid(f"{error}", "messages", "invalid_messages") from None

    async def encode(
        self, text: str, *, add_special_tokens: bool, completion: int, alone: bool = True
    ) -> list[int]:
        """Token ids of a plain prompt; `alone`: the only one of its request. Raises `ApiError`."""
        self._guard(len(text), completion, "prompt")

        def make() -> list[int]:
            return self.text.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return await self.off_loop(make, len(text) if alone else None)

    async def off_loop(self, function: Callable[[], T], characters: int | None = None) -> T:
        """The result of a function that tokenizes, where `TextPool.run` has it run. Raises
        `ApiError` when too many wait."""
        try:
            return await self.pool.run(function, characters)
        except PoolFullError:
            raise unavailable("Too many prompts are waiting to be tokenized.", 1.0) from None

    def fit(
        self, ids: list[int], *, truncation: Truncation | None, completion: int, param: str
    ) -> list[int]:
        """The ids, truncated if asked; at least one, and room for one more. Raises `ApiError`."""
        if not ids:
            raise invalid("The prompt has no tokens.", param)
        if min(ids) < 0:
            raise invalid(f"Token id {min(ids)} is negative.", param)
        if max(ids) >= self.vocab_size:  # a tokenizer may know tokens its model was not built for
            raise invalid(
                f"Token id {max(ids)} in the prompt is out of vocabulary ({self.vocab_size} ids).",
                param,
            )
        if truncation is not None and len(ids) > truncation.tokens:
            kept = ids[: truncation.tokens] if truncation.keep_start else ids[-truncation.tokens :]
            ids = kept
        if len(ids) >= self.max_model_len:
            raise context_exceeded(
                limit=self.max_model_len, prompt=len(ids), completion=completion, param=param
            )
        return ids

    def _guard(self, characters: int, completion: int, param: str) -> None:
        """Refuse text that cannot fit, before spending time on it."""
        least = characters // self.text.tokenizer.longest_token
        if least > self.max_model_len:
            raise context_exceeded(
                limit=self.max_model_len,
                prompt=least,
                completion=completion,
                param=param,
                at_least=True,
            )


def prompt_list(value: object, max_model_len: int) -> list[str | list[int]]:
    """The `prompt` field of a completion as a list of prompts. Raises `ApiError`.

    Hopelessly long lists of ids are refused before each id is looked at.
    """
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and type(value[0]) is int:
        prompts = [value]
    elif isinstance(value, list):
        prompts = value
    else:
        raise invalid(
            "prompt must be a string, a list of token ids, or a list of either.",
            "prompt",
            "invalid_type",
        )
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise invalid(f"prompt must hold 1 to {MAX_PROMPTS} prompts.", "prompt")
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, list):
            if len(prompt) > TRUNCATABLE * max_model_len:
                raise context_exceeded(
                    limit=max_model_len, prompt=len(prompt), completion=0, param="prompt"
                )
            if not set(map(type, prompt)) <= {int}:
                raise invalid("Token ids must be integers.", f"prompt[{index}]", "invalid_type")
        elif not isinstance(prompt, str):
            raise invalid(
                "A prompt must be a string or a list of token ids.",
                f"prompt[{index}]",
                "invalid_type",
            )
        if not prompt:
            raise invalid("A prompt must not be empty.", "prompt")
    return prompts


def template_message(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: text content, tool arguments as objects, thoughts under
    both of their names. Fields we do not know are passed on."""
    plain = message.model_dump(exclude_none=True)
    plain["content"] = _content_text(message.content, index)
    thoughts = message.reasoning if message.reasoning is not None else message.reasoning_content
    if thoughts is not None:
        plain["reasoning"] = plain["reasoning_content"] = thoughts
    for call in plain.get("tool_calls", ()):
        call["function"]["arguments"] = _arguments(call["function"].get("arguments"))
    return plain


def _content_text(content: str | list[ContentPart] | None, index: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n".join(_part_text(part, index, i) for i, part in enumerate(content))


def _part_text(part: ContentPart, message: int, index: int) -> str:
    where = f"messages[{message}].content[{index}]"
    if part.type in TEXT_PARTS:
        text = part.text
    elif part.type == "refusal":
        text = part.refusal
    elif part.type in THOUGHT_PARTS:
        return ""
    else:
        raise invalid(
            f"{where}: only text parts are supported, not {part.type[:32]!r}.",
            where,
            "unsupported_parameter",
        )
    if text is None:
        raise invalid(f"{where}: the part has no text.", where)
    return text


def _arguments(arguments: object) -> object:
    """Arguments arrive as a JSON string; templates iterate over them. Anything else stays."""
    if not isinstance(arguments, str):
        return arguments if arguments is not None else {}
    try:
        value = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return arguments
    return value if isinstance(value, dict) else arguments
