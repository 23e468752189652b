"""Everything that crosses between an API process and an engine, as tagged msgspec structs.

The transport's routing identity tells API processes apart, so several can share an engine; a
request id needs to be unique only within one of them.
"""

from __future__ import annotations

import msgspec

from scheduler.request import FinishReason, Load, Output, Request


class Hello(msgspec.Struct, tag=True, frozen=True):
    """An API process introduces itself, first of all; the engine answers `Ready`."""


class Submit(msgspec.Struct, tag=True, frozen=True):
    """Start a request. Times inside are on the sender's clock and only differences are used.

    `age` is the seconds since its arrival that count against its deadlines and for its turn: 0 for
    a new one, more for one that another engine had accepted.
    """

    request: Request
    age: float = 0.0


class Abort(msgspec.Struct, tag=True, frozen=True):
    """End a request, or one choice of it. Idempotent; an unknown id is ignored.

    `reason=STOP` is a natural end found on text (a stop string): `tokens_kept` says how many
    output tokens belong to the answer.
    """

    request_id: str
    choice: int | None = None
    reason: FinishReason = FinishReason.ABORT
    tokens_kept: int | None = None


class Drain(msgspec.Struct, tag=True, frozen=True):
    """Accept nothing new, finish what runs, abort the rest after `seconds`, then exit."""

    seconds: float


class EngineFacts(msgspec.Struct, frozen=True):
    """What the API process needs to know of the engine it talks to."""

    max_model_len: int
    vocab_size: int
    num_pages: int
    page_size: int
    max_num_seqs: int
    max_logprobs: int
    device: str
    dtype: str
    drafters: tuple[str, ...] = ()  # by name

    @property
    def max_len(self) -> int:
        """Tokens that one sequence can have: by the context, and alone in the pool."""
        return min(self.max_model_len, (self.num_pages - 1) * self.page_size)

    def continues(self, before: EngineFacts, request: Request) -> bool:
        """Whether a request begun by an engine `before` gets the same text from this one."""
        if (self.device, self.dtype, self.vocab_size) != (
            before.device,
            before.dtype,
            before.vocab_size,
        ):
            return False
        longest = len(request.prompt) + request.params.max_tokens
        return min(longest, self.max_len) == min(longest, before.max_len)


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The engine has loaded its model and takes requests: the answer to `Hello`."""

    facts: EngineFacts
    load: Load = Load()


class Step(msgspec.Struct, tag=True, frozen=True):
    """What one settled step (or a batch of aborts) brought.

    Every settled step sends one to each API process with unfinished requests, even when it brought
    them nothing: they read it as forward progress.
    """

    outputs: tuple[Output, ...]
    load: Load
    step_seconds: float = 0.0
    step_tokens: int = 0


class Rejected(msgspec.Struct, tag=True, frozen=True):
    """A request that was never accepted; no `Output` follows."""

    request_id: str
    code: str  # a `Refusal`, "context_length_exceeded", "draining", "invalid"
    message: str
    retry_after: float | None = None  # seconds


class Dead(msgspec.Struct, tag=True, frozen=True):
    """The engine's last words."""

    message: str


ToEngine = Hello | Submit | Abort | Drain
FromEngine = Ready | Step | Rejected | Dead

_to_engine_encoder = msgspec.msgpack.Encoder()
_to_engine_decoder = msgspec.msgpack.Decoder(ToEngine)
_from_engine_encoder = msgspec.msgpack.Encoder()
_from_engine_decoder = msgspec.msgpack.Decoder(FromEngine)


def encode_to_engine(message: ToEngine) -> bytes:
    return _to_engine_encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Raises `msgspec.DecodeError` or `msgspec.ValidationError` on malformed input."""
    return _to_engine_decoder.decode(data)


def encode_from_engine(message: FromEngine) -> bytes:
    return _from_engine_encoder.encode(message)


def decode_from_engine(data: bytes) -> FromEngine:
    return _from_engine_decoder.decode(data)
