"""A validated API request: what the engine gets, and how its outcome is to be shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from scheduler.request import Request
from server.parameters import Endpoint
from text.stops import StopStrings


@dataclass(frozen=True, slots=True)
class View:
    """How outputs become an answer. The same for every prompt and choice of a job."""

    stops: StopStrings
    min_tokens: int = 0  # no stop string before so many tokens
    skip_special_tokens: bool = True
    stop_reasons: Mapping[int, int | str] = field(
        default_factory=dict
    )  # by the client's stop token
    logprobs: int | None = None  # None: none; n: the token's own and the n most likely
    prompt_logprobs: int | None = None
    token_ids: bool = False
    tokens_as_ids: bool = False
    echo: bool = False
    scoring: bool = False  # max_tokens 0: the one token the engine generates is not shown
    stream: bool = False
    usage_at_end: bool = False
    usage_always: bool = False
    timings: bool = False
    metadata: dict[str, str] | None = None

    @property
    def per_token(self) -> bool:
        """Whether text has to be cut token by token rather than step by step."""
        return bool(self.stops) or self.logprobs is not None or self.token_ids


@dataclass(frozen=True, slots=True)
class Job:
    """One API request. Choice `c` of prompt `p` is shown under index `p * n + c`."""

    id: str  # of the response; the engine's request ids start with it
    created: int  # seconds since the epoch
    model: str
    endpoint: Endpoint
    requests: tuple[Request, ...]  # one for each prompt
    view: View
    prompt_texts: tuple[str, ...] = ()  # for echo
    ignored: tuple[str, ...] = ()  # fields for x-ignored-params
    max_tokens: int | None = None  # as asked, before clamping

    @property
    def n(self) -> int:
        return self.requests[0].n

    @property
    def choices(self) -> int:
        return self.n * len(self.requests)


@dataclass(frozen=True, slots=True)
class Caller:
    """What is known of a request besides its body."""

    arrival: float  # seconds, monotonic: before the body was read and tokenized
    tenant: str = ""
    priority: int | None = None  # from a header; wins over the body
    timeout: float | None = None  # seconds, from a header


@dataclass(slots=True)
class Usage:
    """Token counts of an answer, summed over prompts and choices; a prompt counts once."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0  # tokens that were guessed ahead of their verification
    accepted: int = 0  # of these, the right ones
    demoted: int = 0  # positions whose keys and values were reduced to four bits

    def as_json(self) -> dict[str, object]:
        demoted = {"kv_demoted_tokens": self.demoted} if self.demoted else {}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {
                "accepted_prediction_tokens": self.accepted,
                "rejected_prediction_tokens": self.drafted - self.accepted,
            },
            **demoted,
        }


@dataclass(slots=True)
class LogFields:
    """What the request's log line says besides method, path, status and duration."""

    id: str = ""
    model: str = ""
    stream: bool = False
    n: int = 0
    seed: int | None = None
    finish: list[str] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    resumptions: int = 0  # in other engines, after its own had died
    queue_ms: float | None = None
    first_token_ms: float | None = None
    error: str = ""
    prompts: list[str] = field(default_factory=list)  # only when the configuration asks for them
    outputs: list[str] = field(default_factory=list)
