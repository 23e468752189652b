"""What a client asks for (`SamplingParams`, `Request`), and how each choice ends (`Finish`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class FinishReason(StrEnum):
    """Why a sequence ended. Each sequence ends exactly once; whoever ends it decides the reason."""

    STOP = "stop"  # stop token, end token or, reported by the API process, a stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # the client left, or the server drained
    TIMEOUT = "timeout"  # its deadline passed
    QUEUE_TIMEOUT = "queue_timeout"  # its time in the queue was over before it got a slot
    ERROR = "error"  # the request failed inside the engine


class Refusal(StrEnum):
    """Why an overloaded server did not take a request."""

    QUEUE_FULL = "queue_full"  # too many wait
    QUEUE_TOKENS = "queue_tokens"  # their prompts are too long together
    TTFT = "ttft_target"  # its first token would come later than wanted
    DEADLINE = "deadline"  # one of its time limits would pass before


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen for one request. Validated at construction (raises `ValueError`).

    Out-of-vocabulary ids are checked where the vocabulary is known: `server/translate.py` and
    `engine/llm.py`.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    seed: int = 0  # 64-bit key of the sampling noise; drawn by the server when the client gave none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    allowed_token_ids: tuple[int, ...] | None = None
    stop_token_ids: frozenset[int] = frozenset()  # end tokens included unless ignore_eos
    logprobs: int | None = None  # None: none; n: the token's own and the n most likely
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        floats = (
            self.temperature,
            self.top_p,
            self.min_p,
            self.presence_penalty,
            self.frequency_penalty,
            self.repetition_penalty,
            *(bias for _, bias in self.logit_bias),
        )
        check(all(math.isfinite(x) for x in floats), "sampling parameters must be finite numbers")
        check(self.max_tokens >= 1, "max_tokens must be at least 1")
        check(
            0 <= self.min_tokens <= self.max_tokens, "min_tokens must be between 0 and max_tokens"
        )
        check(self.temperature >= 0, "temperature must not be negative")
        check(0 < self.top_p <= 1, "top_p must be in (0, 1]")
        check(self.top_k >= 0, "top_k must be 0 (off) or positive")
        check(0 <= self.min_p <= 1, "min_p must be in [0, 1]")
        check(0 <= self.seed < 2**64, "seed must fit 64 bits")
        check(self.repetition_penalty > 0, "repetition_penalty must be positive")
        check(all(self.bad_words), "bad_words must not contain an empty sequence")
        check(self.allowed_token_ids != (), "allowed_token_ids must not be empty")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"{name} must not be negative")


@dataclass(frozen=True, slots=True)
class Speculation:
    """What one request asks of speculative decoding, which never changes its text."""

    enabled: bool = True
    max_draft_tokens: int | None = None  # a step; the server's limit counts as well
    drafter: str | None = None  # the only one that may draft; None: whichever does best

    def __post_init__(self) -> None:
        if self.max_draft_tokens is not None and self.max_draft_tokens < 0:
            raise ValueError("max_draft_tokens must not be negative")


@dataclass(frozen=True, slots=True)
class Request:
    """One request as submitted; crosses the process boundary unchanged.

    `n` choices share the prompt and differ in the `choice` word of the sampling noise. `produced`
    is there when an engine before this one died: per choice the tokens it had committed, which are
    part of the text so far but count as output for penalties, limits and usage, or None for a
    choice that had ended. Such a request was accepted once and is not refused for overload.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    arrival: float  # seconds on the engine's clock
    n: int = 1
    priority: int = 0  # lower runs sooner
    tenant: str = ""
    cache_salt: bytes = b""  # isolates the prefix cache: part of every page hash
    adapter: str = ""  # part of every page hash
    deadline: float | None = None  # seconds on the engine's clock; past it the request is ended
    queue_deadline: float | None = None  # past it the request is ended unless it was admitted
    # Latency wanted, in seconds. None: nothing asked.
    ttft_target: float | None = None  # from arrival to the first token; else the server's counts
    # The largest gap between two outputs of one choice; the stricter of this and the server's.
    mtpot_target: float | None = None
    speculation: Speculation = Speculation()
    produced: tuple[tuple[int, ...] | None, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt must hold at least one token")
        if self.n < 1:
            raise ValueError("n must be at least 1")
        if self.produced and len(self.produced) != self.n:
            raise ValueError("produced must hold one token list per choice")
        if self.produced and not self.open_choices:
            raise ValueError("every choice has ended before")
        _check_targets(self)

    @property
    def resumed(self) -> bool:
        """Whether an engine before this one had accepted it."""
        return bool(self.produced)

    @property
    def open_choices(self) -> tuple[int, ...]:
        """The choices to run: all but those that ended before a restart."""
        if not self.produced:
            return tuple(range(self.n))
        return tuple(c for c, tokens in enumerate(self.produced) if tokens is not None)


def _check_targets(holder: Request | SchedulerConfig) -> None:
    for name in ("ttft_target", "mtpot_target"):
        seconds = getattr(holder, name)
        if seconds is not None and not 0 < seconds < math.inf:
            raise ValueError(f"{name} must be a positive number of seconds")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities at one position, of the raw model distribution (before any processing)."""

    token: int
    logprob: float
    rank: int  # 1 is the most likely token
    top: tuple[tuple[int, float], ...] = ()  # (token, logprob), most likely first


@dataclass(frozen=True, slots=True)
class Finish:
    """The single terminal value of one sequence. Times are seconds on the engine's clock."""

    reason: FinishReason
    stop_token: int | None = None  # the stop token that ended it; it is not part of the output
    message: str = ""  # for what is no natural end: what to tell the client
    prompt_tokens: int = 0
    completion_tokens: int = 0  # a stop token counts, as it was generated
    cached_tokens: int = 0  # prompt positions whose KV came from the prefix cache
    preemptions: int = 0
    # How often it went on in another engine after its own had died; filled in by the API process.
    # Then prompt and output are whole, but the times of the first token and of admission, the
    # cached and the drafted tokens are of the last engine alone, and `demoted` of one of them.
    resumptions: int = 0
    drafted: int = 0  # tokens that were guessed ahead and verified
    accepted: int = 0  # of these, the right ones
    demoted: int = 0  # positions whose keys and values were reduced to four bits while it ran
    arrival: float = 0.0
    predicted_first_token: float | None = None  # at arrival; None: it was not to wait, or unknown
    admitted: float | None = None
    first_token: float | None = None
    finished: float = 0.0


@dataclass(slots=True)  # a value too, but one for each row and step: see scheduler/plan.py
class Output:
    """What one settled step brought for one choice: tokens, and at the end one `Finish`."""

    request_id: str
    choice: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, when asked for
    # With the first output of choice 0 (once per request, not again after a restart), when asked
    # for: one entry per prompt token, None for the first.
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None
    demoted: int = 0  # as in `Finish`, so far: an engine that dies says nothing at the end


class Occupancy(NamedTuple):
    """Of `Load`, what changes with every step."""

    used: float  # share of all pages
    running: int
    waiting: int
    reserve: float  # share of all pages that admission keeps free
    preemptions: int  # since start


@dataclass(frozen=True, slots=True)
class Load:
    """Gauges and counters of one scheduler, for metrics, `/load` and admission."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0  # prompt tokens not yet computed, over all waiting sequences
    predicted_wait: float = 0.0  # seconds a usual request arriving now would wait for a slot
    pages_total: int = 0
    pages_held: int = 0  # referenced by a sequence, or fenced until a step settles
    pages_cached: int = 0  # unreferenced but reusable through the prefix index
    pages_forecast: int = 0  # most pages that the last forecast saw held at once
    pages_reserved: int = 0  # kept free by admission
    host_pages_total: int = 0
    host_pages_held: int = 0  # kept for a paused sequence, or read by a step in flight
    # Counters since start.
    steps: int = 0
    step_seconds: float = 0.0  # from one settled step to the next, while there is another
    step_seconds_profiled: float = 0.0  # the same by the profile, without correction
    prompt_tokens: int = 0
    generated_tokens: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    rows_stalled: int = 0  # of live sequences, left out of a step for want of a page
    preemptions: int = 0
    recomputed_tokens: int = 0
    pages_swapped_out: int = 0
    pages_swapped_in: int = 0
    pages_demoted: int = 0
    drafts: int = 0  # rows that verified drafts
    draft_tokens: int = 0  # verified
    accepted_tokens: int = 0  # of these
    accepted_by_position: tuple[int, ...] = ()  # at the first draft of a row, the second, ...
    draft_seconds: float = 0.0  # spent on drafting while the target waited
    ahead_seconds: float = 0.0  # spent on drafting while the target verified
    ahead_rows: int = 0  # rows that were drafted for ahead
    foreseen_rows: int = 0  # of these, those whose drafts were of use


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits and policy of one scheduler."""

    num_pages: int  # page 0, the null page, included
    page_size: int = 16  # token positions
    max_num_seqs: int = 64  # slots; slot 0, the null slot, is not one of them
    max_step_tokens: int = 2048  # token budget of one step, prefill chunks and decodes together
    max_model_len: int = 8192
    enable_prefix_cache: bool = True
    # A cached prefix ends at a multiple of so many tokens: nothing after one reads what only those
    # who computed the tokens before it had (`kernels.kv.windows`). 0: it ends with any page.
    prefix_block: int = 0
    # Where no page is to be had, others are demoted to four bits, but for so many of the latest
    # positions of each sequence. None: nothing is.
    demote_all_but: int | None = None
    host_pages: int = 0  # in host memory, where the pages of paused sequences wait; 0: no swapping
    hash_root: bytes = b""  # model, weights, KV format: what makes pages comparable
    max_queued_requests: int = 2048
    max_queued_tokens: int | None = None  # known tokens of all that wait; an empty queue takes any
    lookahead: int = 8  # how many waiting sequences may be tried behind one that does not fit
    priority_ageing: float = 30.0  # seconds of waiting that equal one level of priority
    # A prompt is long while more than 1 / long_prefill_rows of a step's budget is left of it. Fewer
    # than so many are computed in one step, and that part of it is kept for short ones.
    long_prefill_rows: int = 4
    ttft_target: float | None = None  # see Request; for those that ask for nothing stricter
    mtpot_target: float | None = None

    def __post_init__(self) -> None:
        def check(ok: bool, what: str) -> None:
            if not ok:
                raise ValueError(what)

        check(self.num_pages >= 2, "num_pages must be at least 2: page 0 is the null page")
        check(self.host_pages >= 0, "host_pages must not be negative")
        check(self.page_size >= 1, "page_size must be at least 1")
        check((self.demote_all_but or 0) >= 0, "demote_all_but must not be negative")
        check(
            self.prefix_block >= 0 and self.prefix_block % self.page_size == 0,
            "prefix_block must be a multiple of page_size",
        )
        check(self.max_num_seqs >= 1, "max_num_seqs must be at least 1")
        check(
            self.max_step_tokens >= self.max_num_seqs,
            "max_step_tokens must be at least max_num_seqs: each sequence gets a token per step",
        )
        check(self.priority_ageing > 0, "priority_ageing must be positive")
        check(self.lookahead >= 0, "lookahead must not be negative")
        check(
            self.max_queued_tokens is None or self.max_queued_tokens >= 1,
            "max_queued_tokens must be at least 1",
        )
        check(self.long_prefill_rows >= 2, "long_prefill_rows must be at least 2")
        _check_targets(self)
