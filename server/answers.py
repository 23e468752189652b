"""The shapes of answers, for /openapi.json. The formats write them directly; tests hold the two
together."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid")


class CachedTokens(_Shape):
    cached_tokens: int


class Predictions(_Shape):
    """Tokens guessed ahead of their verification: the right ones are part of the answer."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageShape(_Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: Predictions
    kv_demoted_tokens: int | None = None  # only where there are any


class Metrics(_Shape):
    """With `timings: true`."""

    queue_time_ms: float | None
    time_to_first_token_ms: float | None
    generation_time_ms: float | None
    mean_itl_ms: float | None
    tokens_per_second: float | None


class RankedToken(_Shape):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class _Answer(_Shape):
    id: str
    created: int
    model: str
    usage: UsageShape
    metrics: Metrics | None = None
    metadata: dict[str, str] | None = None


class TopLogprob(_Shape):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Shape):
    content: list[ChatLogprob]
    refusal: None


class AnswerMessage(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Shape):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatAnswer(_Answer):
    """A chat answer; streamed, the same in `chat.completion.chunk` events."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionLogprobs(_Shape):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionAnswer(_Answer):
    """A completion; streamed, the same in events."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Delta(_Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Shape):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class _Chunk(_Shape):
    id: str
    created: int
    model: str
    usage: UsageShape | None = None
    metrics: Metrics | None = None
    metadata: dict[str, str] | None = None


class ChatChunk(_Chunk):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class CompletionChunkChoice(_Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class CompletionChunk(_Chunk):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class TokenizeAnswer(_Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeAnswer(_Shape):
    prompt: str
    content: str
