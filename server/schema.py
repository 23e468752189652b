"""The honoured fields of each request body, typed. Strict: no coercion between JSON types.

Fields not listed here are handled by `parameters.py`. What needs the model's facts (vocabulary,
context) or other fields is checked in `translate.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from server.errors import ApiError

M = TypeVar("M", bound=BaseModel)

Strings = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1},
            ]
        }
    ),
]
Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(_Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # no padding is sent, whatever it says


Seconds = Annotated[float, Field(gt=0)]


class Slo(_Model):
    """Latency targets of one request."""

    model_config = ConfigDict(extra="forbid")

    ttft: Seconds | None = None  # from arrival to the first token
    mtpot: Seconds | None = None  # the largest gap between two outputs of a choice


class Speculative(_Model):
    """What one request asks of speculative decoding. Its text is the same with any of it."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | None = None
    max_draft_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None  # in one step
    drafter: Annotated[str, Field(max_length=64)] | None = None  # the only one


class ContentPart(_Model):
    type: str
    text: str | None = None
    refusal: str | None = None


class FunctionCall(_Model):
    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(_Model):
    function: FunctionCall
    id: str | None = None
    type: Literal["function"] | None = None


class Message(_Model):
    """Roles are the template's business; other fields are handed to it unread."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class SamplingFields(_Model):
    """Shared by both endpoints."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Count | None = None
    stop: Strings | None = None
    stop_token_ids: list[Int64] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Int64 | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    allowed_token_ids: list[Int64] | None = None
    bad_words: Annotated[list[str], Field(max_length=128)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int32 | None = None
    request_id: Annotated[str, Field(max_length=128)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    metadata: (
        Annotated[
            dict[
                Annotated[str, Field(max_length=64)],
                Annotated[str, Field(max_length=512)],
            ],
            Field(max_length=16),
        ]
        | None
    ) = None
    timings: bool | None = None
    slo: Slo | None = None
    speculative: Speculative | None = None
    disable_spec_decode: bool | None = None


class ChatBody(SamplingFields):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )


class CompletionBody(SamplingFields):
    """POST /v1/completions"""

    prompt: Prompt
    logprobs: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    best_of: Count | None = None


class TokenizeBody(_Model):
    """POST /tokenize: one of prompt, content (the same by another name) and messages."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Model):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Int64]
    skip_special_tokens: bool | None = None


def parse(model: type[M], fields: dict[str, Any]) -> M:
    """The body as a typed object. Raises `ApiError` 400 naming the field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _as_api_error(error, fields) from None


def _as_api_error(error: ValidationError, fields: dict[str, Any]) -> ApiError:
    """The most precise account of the first problem, without the value sent."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    field = errors[0]["loc"][:1]
    first = max((e for e in errors if e["loc"][:1] == field), key=lambda e: len(e["loc"]))
    param = _path(first["loc"], fields)
    missing = first["type"] == "missing"
    typed = first["type"].endswith(("_type", "_parsing"))
    code = "missing_required_parameter" if missing else "invalid_type" if typed else "invalid_value"
    message = "The field is required." if missing else first["msg"] + "."
    return ApiError(400, f"{param}: {message}", code=code, param=param)


def _path(location: tuple[int | str, ...], fields: object) -> str:
    """An error's location without pydantic's names of union branches, which are not in the body."""
    path = ""
    value = fields
    for step, part in enumerate(location):
        if isinstance(part, int) and isinstance(value, list) and part < len(value):
            path += f"[{part}]"
            value = value[part]
        elif isinstance(part, str) and isinstance(value, dict):
            if part not in value and step < len(location) - 1:
                continue
            path += f".{part[:64]}" if path else part[:64]
            value = value.get(part)
    return path
