"""What the scheduler tells the worker (`StepPlan`, a diff) and what comes back (`StepResult`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from scheduler.profile import StepShape
from scheduler.request import SamplingParams, TokenLogprob

NO_SHAPE = StepShape()


class PageCopy(NamedTuple):
    """The KV of one page, copied from one tier to the other."""

    source: int
    target: int


class Demotion(NamedTuple):
    """A page of a slot becomes half of a page; see `kernels.kv.paged`."""

    slot: int
    place: int  # in the slot's page table
    page: int  # that stands there
    half: int  # that will stand there

    @property
    def copy(self) -> PageCopy | None:
        """Of upper halves, counted in halves; None: it is where it belongs."""
        source, target = 2 * self.page, ~self.half
        return None if source == target else PageCopy(source, target)


@dataclass(frozen=True, slots=True)
class Admit:
    """A slot gets a new owner. Everything the worker cannot know and will not be told again."""

    slot: int  # >= 1; slot 0 is the null slot
    epoch: int  # unique per admission: rows of an older epoch are stale
    params: SamplingParams
    choice: int  # a word of the noise counter
    prompt_len: int  # tokens before this position are prompt, the rest output (penalties)
    pages: tuple[int, ...]  # pages of the cached prefix
    cached: tuple[int, ...]  # the tokens whose KV those pages hold, len = pages * page_size
    loads: tuple[PageCopy, ...] = ()  # host page -> device page, one of `pages`
    group: bytes = b""  # drafters may learn from one sequence for another of the same group


# Rows, their results and `Output`s are values like the rest, and nobody changes one. They are made
# for each sequence and step, and a frozen dataclass takes four times as long to construct.
@dataclass(slots=True)
class Row:
    """One sequence's work in a step.

    With a chunk: append these tokens. Without: continue from the slot's own last token with up to
    `drafts` drafted tokens. A live row has no absolute position: under pipelining only the device
    knows it.
    """

    slot: int
    epoch: int
    chunk: tuple[int, ...] | None
    samples: bool  # False for a chunk that does not reach the end of the known tokens
    drafts: int = 0  # a cap
    drafters: tuple[int, ...] = ()  # by number, in the order to be asked: the first that knows
    # A cap: drafts to be made while these are verified, for the likeliest outcome.
    ahead: int = 0
    next_token: int | None = None  # the known token after the chunk; only prompt logprobs need it
    new_pages: tuple[int, ...] = ()  # appended to the slot's page table before the row runs


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step, in this order: saves, demotions, admissions with their loads, rows."""

    step: int
    admits: tuple[Admit, ...]
    rows: tuple[Row, ...]
    shape: StepShape = NO_SHAPE  # what its cost depends on; contexts at their upper bounds
    # By drafter: it drafts on for a row only while it believes with at least this probability that
    # all of its drafts so far are right. Those left out never stop.
    least: tuple[float, ...] = ()
    # By drafter: where others can be asked after it, it is heard only if it expects so many or more
    # of its drafts to be right. Those left out always are.
    heard: tuple[float, ...] = ()
    # Where drafts are made ahead, it pays to draft now only for so many rows whose outcome was not
    # foreseen: fewer go without, and are drafted for ahead.
    patience: int = 0
    saves: tuple[PageCopy, ...] = ()  # device page -> host page; the rows may overwrite the former
    demotions: tuple[Demotion, ...] = ()  # in this order; the rows may overwrite what is given up

    @property
    def copies(self) -> int:
        """Pages copied between device and host memory, which `shape` does not tell."""
        return len(self.saves) + sum(len(admit.loads) for admit in self.admits)


class DraftTime(NamedTuple):
    """What drafting took of a step, beside verification.

    Drafts that were made ahead, while the step before was verified, count as work of the step that
    verifies them; of their time, what nobody waited for does not count.
    """

    seconds: float = 0.0  # that verification waited
    depth: int = 0  # forwards of a draft model, one after the other
    # Computed by them, the prompt's included. Without forwards: those that came to the texts of the
    # rows since they were last drafted for, which drafters read.
    tokens: int = 0
    beside: float = 0.0  # seconds of drafting ahead while this step was verified
    ahead: int = 0  # rows that were drafted for ahead then
    foreseen: int = 0  # rows whose drafts had been made ahead


NO_DRAFTING = DraftTime()


class Shadow(NamedTuple):
    """A text that was written without drafts: which of its tokens a drafter would have guessed."""

    drafter: int
    right: tuple[bool, ...]


@dataclass(slots=True)  # not frozen, see Row
class RowResult:
    """What one row committed: between 0 (no sampling) and 1 + drafts tokens."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, when the slot's parameters ask
    # For a chunk of a prompt_logprobs request: entry i is about the prompt token that follows the
    # chunk's token i; the last token of the prompt has no entry.
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    proposed: int = 0  # drafts verified
    drafter: int = -1  # that was heard; -1: none had anything to say, or was asked
    # Of each draft verified, how probable its drafter took it to be if all before it were right.
    confidence: tuple[float, ...] = ()
    error: str = ""  # the row failed (its logits were not finite); nothing was committed


@dataclass(frozen=True, slots=True)
class StepResult:
    """The settled outcome of one `StepPlan`, row by row in the plan's order."""

    step: int
    rows: tuple[RowResult, ...]
    # On the worker, from its start to its last result, without those of drafting.
    seconds: float = 0.0
    drafting: DraftTime = NO_DRAFTING
    shadows: tuple[Shadow, ...] = ()  # of texts that ended before
    # Rows that were not run: their texts had ended with the step before, which was not known yet
    # when this one was planned, but when it began.
    over: int = 0
