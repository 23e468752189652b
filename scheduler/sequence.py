"""`Sequence`: one choice of a request on its way through the scheduler."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto
from typing import TYPE_CHECKING

from scheduler.fair_share import Account
from scheduler.plan import Row
from scheduler.prefix import HashChain
from scheduler.request import Finish, FinishReason, Request, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from scheduler.acceptance import Own

_ANY_DRAFTS = 1 << 16
NO_ROW = Row(slot=0, epoch=0, chunk=None, samples=False)


@dataclass(frozen=True, slots=True)
class WaitForecast:
    """Seconds from arrival until a sequence should be admitted and have its first token. `model_s`
    is the admission before it was corrected by experience, of `admitted` requests."""

    admission_s: float
    first_token_s: float
    model_s: float = 0.0
    admitted: int = 0


class Phase(Enum):
    """Where a sequence is kept. Not what it does: there are no prefill and decode states."""

    PARKED = auto()  # waits for another choice of its request to compute the prompt
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One number line, mutated by the scheduler alone.

        registered <= computed <= fed <= len(tokens)        pending_min <= pending_max

    `fed` known tokens were handed to the worker; `computed` positions have settled KV. When all
    known tokens are fed the sequence is live: the worker continues it alone, and
    `pending_min`/`pending_max` bound what the steps in flight will add. Positions below
    `registered` are in the prefix index. Pages cover every position a launched row may write.

    Once a page is demoted, what is computed from then on is not what others would compute: pages
    from the first half on stay out of the prefix index, until it starts again.
    """

    request: Request
    choice: int
    account: Account  # of its tenant
    tokens: list[int]  # prompt, produced and settled output; append-only
    order: tuple[float, int]  # rank in every queue: lower is served sooner, preempted later
    limit: int  # len(tokens) at which it ends for length
    chain: HashChain
    prompt_logprobs: list[TokenLogprob | None] | None  # gathered over chunks; None: not wanted
    group: bytes = b""  # the same for all that may learn of each other's texts
    prompt_len: int = field(init=False)
    cap: int = field(init=False)  # output tokens it can have at most

    phase: Phase = Phase.WAITING
    slot: int = 0  # the null slot while it does not run
    epoch: int = 0  # of the current admission; 0 while it does not run: its rows are stale
    # Its most common row while it runs: no drafts, no new pages.
    plain_row: Row = field(default_factory=lambda: NO_ROW)
    pages: list[int] = field(default_factory=list)
    fed: int = 0
    computed: int = 0
    registered: int = 0
    halves: int = 0  # of its pages, those that were demoted
    pending_min: int = 0
    pending_max: int = 0

    # What the admission test knows of it; `lengths.py` keeps these.
    guess: int = 0  # output tokens it is expected to have when it ends
    # By future: the share of answers that got as long as it is which outlive it; none: not drawn.
    levels: tuple[float, ...] = ()
    pace: float = 1.0  # tokens it gains per step, rounded

    # What may be drafted for it in its next step; `speculation.py` keeps these.
    drafts: int = 0
    drafters: tuple[int, ...] = ()
    exact_pace: float = 1.0
    read_to: int = 0  # tokens of it that the draft model has read, about
    shown: dict[int, Own] = field(default_factory=dict)  # see acceptance.py
    drafted: int = 0  # since it arrived
    accepted: int = 0

    overtaken: int = 0  # sequences admitted past it while it was the blocked head of the queue
    preemptions: int = 0
    demoted: int = 0  # positions, since it arrived
    cached_tokens: int = 0  # of the prompt, at the first admission
    forecast: WaitForecast | None = None  # at arrival
    admitted: float | None = None
    first_token: float | None = None

    @property
    def params(self) -> SamplingParams:
        """What the worker is told: prompt log-probabilities only where they are still wanted."""
        params = self.request.params
        if params.prompt_logprobs is None or self.prompt_logprobs is not None:
            return params
        return replace(params, prompt_logprobs=None)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt)
        self.cap = self.limit - self.prompt_len

    @property
    def most_drafts(self) -> int:
        """Drafts a step that its request allows; the server has a limit of its own."""
        asked = self.request.speculation
        if not asked.enabled or asked.max_draft_tokens == 0:
            return 0
        return asked.max_draft_tokens or _ANY_DRAFTS

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len

    def enter(self, slot: int, epoch: int, hits: list[int], cached: int) -> None:
        """Starts to run in a slot, with pages whose KV is valid up to `cached`."""
        self.phase = Phase.RUNNING
        self.slot, self.epoch = slot, epoch
        self.plain_row = Row(slot, epoch, None, True)
        self.pages = list(hits)
        self.fed = self.computed = self.registered = cached

    def leave(self) -> None:
        """Gives up the slot: what was computed is lost, except through the prefix index."""
        self.slot = self.epoch = 0
        self.plain_row = NO_ROW
        self.pages = []
        self.fed = self.computed = self.registered = 0
        self.halves = 0
        self.pending_min = self.pending_max = 0
        if self.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def demote(self, place: int, half: int, page_size: int) -> None:
        """A page of it is half of a page from now on."""
        self.pages[place] = half
        self.halves += 1
        self.demoted += page_size

    def learn(self, committed: tuple[int, ...]) -> tuple[int, FinishReason | None, int | None]:
        """Appends committed tokens up to the first that ends the sequence.

        Returns how many were appended, the reason if it ended, and the stop token if one did it.
        A stop token beats the length, and is not appended; before `min_tokens` of output it is a
        token like any other.
        """
        tokens, params = self.tokens, self.request.params
        kept = 0
        reason: FinishReason | None = None
        stop_token: int | None = None
        for token in committed:
            if token in params.stop_token_ids and self.output_len >= params.min_tokens:
                reason, stop_token = FinishReason.STOP, token
                break
            tokens.append(token)
            kept += 1
            if len(tokens) >= self.limit:
                reason = FinishReason.LENGTH
                break
        if kept:
            self.fed += kept
            # The newest token is known, but only the next row computes its keys and values.
            self.computed = len(tokens) - 1
        return kept, reason, stop_token

    def take_prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Hands the gathered prompt log-probabilities out, once."""
        if self.prompt_logprobs is None:
            return None
        taken, self.prompt_logprobs = tuple(self.prompt_logprobs), None
        return taken

    def finish(
        self,
        reason: FinishReason,
        now: float,
        completion_tokens: int,
        stop_token: int | None = None,
        message: str = "",
    ) -> Finish:
        """Its account, closed at `now`."""
        predicted = None
        if self.forecast is not None and self.forecast.admission_s > 0.0:
            predicted = self.request.arrival + self.forecast.first_token_s
        return Finish(
            reason=reason,
            stop_token=stop_token,
            message=message,
            prompt_tokens=self.prompt_len,
            completion_tokens=completion_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
            drafted=self.drafted,
            accepted=self.accepted,
            demoted=self.demoted,
            arrival=self.request.arrival,
            predicted_first_token=predicted,
            admitted=self.admitted,
            first_token=self.first_token,
            finished=now,
        )

    def check(self, page_size: int) -> None:
        """Raises `AssertionError` unless the number line is in order and the pages cover it."""
        known = len(self.tokens)
        assert self.phase is Phase.RUNNING
        assert self.slot > 0
        assert self.epoch > 0
        assert 0 <= self.registered <= self.computed <= self.fed <= known < self.limit
        assert self.registered % page_size == 0
        assert self.registered < known, "the last token must be computed for its logits"
        assert 0 <= self.pending_min <= self.pending_max
        assert self.fed == known or not self.pending_max, "only the last chunk samples"
        assert len(self.pages) == len(set(self.pages))
        assert self.halves == sum(page < 0 for page in self.pages)
        # The newest token is fed by the next row only; with it, a page more may be needed.
        assert len(self.pages) * page_size >= known + self.pending_max - 1
