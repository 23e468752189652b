"""`ModelDrafter`: a small model of the same vocabulary writes ahead.

It draws with the noise of the target (see `worker/sampler.py`), so that where the two models agree
about the probabilities they also agree about the token (Daliri, Musco & Suresh 2024). Its keys and
values lie in a pool of its own under the page ids of the target's: one allocator and one page
table serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cpu.chain import ChainRows, NativeChain
from worker.drafters.base import LATER, Ask, Guess
from worker.drafters.followed import Followed, OwnPages, TargetPages
from worker.drafters.outcomes import Foreseen, Outcome, likely_branches
from worker.drafters.spans import Moved, span_batch
from worker.runner import Runner
from worker.sampler import Sampler
from worker.sampling_state import Need
from worker.slots import SlotTable

# Multiplications of a forward below which a second CPU thread costs more than it brings: each of
# the dozens of meetings of two threads takes about a microsecond.
_ALONE = 16_000_000


@dataclass(slots=True)
class _Row:
    """One ask on its way."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    # By draft, what would have been drawn if it could not be; only where drafts are made ahead.
    others: list[int] = field(default_factory=list)
    all_right: float = 1.0  # the probability that all drafts so far are
    moved: Moved | None = None  # where its last keys and values lie, if not in the slot's pages

    @property
    def length(self) -> int:
        return len(self.ask.tokens) + len(self.tokens)

    def add(self, token: int, confidence: float) -> None:
        self.tokens.append(token)
        self.confidence.append(confidence)
        self.all_right *= confidence

    def drafts_on(self, least: float) -> bool:
        return len(self.tokens) < self.ask.most and self.all_right >= least


class _Reading(NamedTuple):
    """Positions of a row that go through the model: from `start` to before `end`."""

    row: _Row
    start: int
    end: int

    def ids(self) -> list[int]:
        known = self.row.ask.tokens
        if self.start < len(known):
            return known[self.start : self.end]
        return self.row.tokens[self.start - len(known) : self.end - len(known)]


class ModelDrafter:
    """Drafts of all rows side by side, one token of each a forward.

    A sequence is followed only while it is asked about. Whatever was computed of it before, or by
    another sequence that shares its first pages, is made use of.

    While a row's drafts are verified it can be drafted for ahead, for what the target is likely to
    choose (`outcomes.py`). What is written for an outcome with a wrong draft lies in pages of its
    own until it is the one that has come.
    """

    def __init__(
        self,
        runner: Runner,
        kv: Sequence[Tensor],
        slots: SlotTable,
        sampler: Sampler,
        parameters: int,
        vocab_size: int,
        most_tokens: int,
        *,
        coarse: bool = False,
        spare_pages: Sequence[int] = (),
    ) -> None:
        """kv: the draft model's pool, see `kv_pool.allocate_pool`; `parameters` and `vocab_size`
        of the model; `most_tokens` of known text are caught up with in one step, by rows that do
        not draft in it. `coarse`: the model is the target itself, reading its own pages by fewer
        bits. `spare_pages`: of the pool, which no sequence has, for drafts made ahead."""
        self.name = "coarse" if coarse else "model"
        self.coarse = coarse
        self.followed: Followed = TargetPages() if coarse else OwnPages(slots)
        self.runner = runner
        self._kv = kv
        self._slots = slots
        self._sampler = sampler
        self._parameters = parameters
        self._last = vocab_size - 1  # a token beyond it is as good as any to a drafter
        self._most_tokens = most_tokens
        self._vocab = sampler.slots.vocab_size
        self._depth = self._fed = 0  # see `take_work`
        self._spare_pages = spare_pages
        self._drafted: dict[int, _Row] = {}  # by slot, in the last `propose`
        self._foreseen: dict[int, Foreseen] = {}  # by slot
        self._hits = 0

    def use(self, runner: Runner) -> None:
        """Computes by another runner from now on. On the worker's thread."""
        self.runner = runner

    def admit(self, slot: int, group: bytes) -> None:
        self.followed.admit(slot)
        self._foreseen.pop(slot, None)

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float, patience: int = 0) -> list[Guess]:
        """See `Drafter`; `patience`: see `StepPlan`."""
        rows = [_Row(ask) for ask in asks]
        late = [row for row in rows if not self._foresaw(row, least)]
        self._hits += len(rows) - len(late)
        if len(late) >= patience:
            readings = self._behind(late, self.followed.read)
            self._draft(readings, least)
            for row, _, end in readings:
                self.followed.advance(row.ask.slot, end)
        self._drafted = {row.ask.slot: row for row in rows}
        return [Guess(row.tokens, row.confidence) if row.tokens else LATER for row in rows]

    # --- ahead ----------------------------------------------------------------------------------

    def foresee(self, asks: Sequence[Ask], drafts: Sequence[list[int]]) -> None:
        """Drafts on for each of these while its `drafts` are verified; they may be another's."""
        work = self._depth, self._fed  # counted with the step that verifies what comes of it
        known = {ask.slot: len(ask.tokens) for ask in asks}
        own = [self._own(ask, right) for ask, right in zip(asks, drafts, strict=True)]
        fed = {ask.slot for ask, row in zip(asks, own, strict=True) if row is not None}
        rows = [
            _Row(Ask(ask.slot, ask.tokens + right, ask.ahead + 1))
            for ask, right in zip(asks, drafts, strict=True)
        ]

        def read(ask: Ask) -> int:
            # Of its own drafts all but the last were fed.
            return len(ask.tokens) - 1 if ask.slot in fed else self.followed.read(ask)

        readings = self._behind(rows, read)
        branches = self._branches(asks, own)
        readings += [_Reading(row, row.length - 1, row.length) for row in branches]
        readings.sort(key=lambda r: r.end < r.row.length)  # see `_draft`
        self._draft(readings, 0.0)
        self._depth, self._fed = work

        self._foreseen = {}
        for row, _, end in readings:
            slot, tokens, before = row.ask.slot, row.ask.tokens, known[row.ask.slot]
            if row.moved is None:
                self.followed.advance(slot, min(end, before))
            if not row.tokens:
                continue  # there was too much to read
            coming, guess = tuple(tokens[before:]), Guess(row.tokens, row.confidence)
            if row.moved is None:
                # Its first token is a guess at the one that is chosen now. (Such rows stand before
                # the branches.)
                self._foreseen[slot] = Foreseen(before, coming)
                coming += tuple(row.tokens[:1])
                guess = Guess(row.tokens[1:], row.confidence[1:])
            self._foreseen[slot].outcomes[coming] = Outcome(guess, row.moved)

    def forget(self) -> None:
        """What was foreseen has come, or not."""
        self._foreseen = {}

    def _own(self, ask: Ask, drafts: list[int]) -> _Row | None:
        """The row of this drafter's in which these were drafted, if they were."""
        row = self._drafted.get(ask.slot)
        return row if drafts and row is not None and row.tokens == drafts else None

    def _branches(self, asks: Sequence[Ask], own: Sequence[_Row | None]) -> list[_Row]:
        """Rows for outcomes in which a draft is wrong."""
        needs, size = self._sampler.slots.needs, self._slots.page_size
        drafts: list[Guess] = []
        others: list[list[int]] = []
        for ask, row in zip(asks, own, strict=True):
            # Processors look into the token table, which holds one text of each slot.
            usable = row is not None and not needs[ask.slot] & Need.PROCESSING
            drafts.append(Guess(row.tokens, row.confidence) if usable and row else LATER)
            others.append(row.others if usable and row else [])
        found: list[_Row] = []
        spare = list(self._spare_pages)
        copied: list[tuple[int, int]] = []
        for branch in likely_branches(drafts, others):
            ask = asks[branch.row]
            at = len(ask.tokens) + branch.accepted
            first, count = at // size, (at + ask.ahead - 1) // size - at // size + 1
            if count > len(spare):
                break
            pages, spare = tuple(spare[:count]), spare[count:]
            if at % size:
                copied.append((self._slots.pages[ask.slot][first], pages[0]))
            text = [*ask.tokens, *drafts[branch.row].tokens[: branch.accepted], branch.token]
            found.append(_Row(Ask(ask.slot, text, ask.ahead), moved=Moved(first, pages)))
        self._copy(copied)
        return found

    def _copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Keys and values of the first of each pair to the second."""
        if pages:
            at = torch.tensor(pages, device=self._slots.tokens.device)
            for layer in self._kv:
                layer[at[:, 1]] = layer[at[:, 0]]

    def _foresaw(self, row: _Row, least: float) -> bool:
        """Gives the row the drafts that were made for what has come, if they were."""
        slot, tokens = row.ask.slot, row.ask.tokens
        foreseen = self._foreseen.get(slot)
        if foreseen is None:
            return False
        outcome, all_right = foreseen.look_up(tokens)
        if not outcome.guess.tokens:
            if all_right:  # then at least the drafts were fed
                self.followed.advance(slot, len(tokens) - 1)
            return False
        if outcome.moved is not None:
            first, pages = outcome.moved
            own = self._slots.pages[slot][first:]
            self._copy([(page, to) for page, to in zip(pages, own, strict=False)])
        self.followed.advance(slot, len(tokens))
        for token, confidence in zip(*outcome.guess, strict=True):
            if row.tokens and not row.drafts_on(least):
                break
            row.add(token, confidence)
        self._depth = max(self._depth, len(row.tokens))
        self._fed += len(row.tokens)
        return True

    # --- computing ------------------------------------------------------------------------------

    def _draft(self, readings: list[_Reading], least: float) -> None:
        """Reads, and drafts for the rows that are through with what is known: these come first."""
        if not readings:
            return
        through = [r.row for r in readings if r.end == len(r.row.ask.tokens)]
        needs = self._sampler.slots.needs
        chain = self.runner.chain
        if chain is None or any(needs[row.ask.slot] & Need.PROCESSING for row in through):
            self._one_by_one(readings, through, least)
        elif through:
            self._in_one_call(chain, readings, through, least)
        else:
            self._forward(readings, None)

    def _one_by_one(self, readings: list[_Reading], through: list[_Row], least: float) -> None:
        tokens = sum(r.end - r.start for r in readings)
        with self._threads(tokens):
            hidden = self._forward(readings, self._last_tokens(readings[: len(through)]))
            if through:
                self._draw(through, hidden)
        with self._threads(len(through)):
            while alive := [row for row in through if row.drafts_on(least)]:
                self._draw(alive, self._continue(alive))
                through = alive

    def _in_one_call(
        self, chain: NativeChain, readings: list[_Reading], through: list[_Row], least: float
    ) -> None:
        ids, count = [token for r in readings for token in r.ids()], len(through)
        batch = span_batch(
            self._slots,
            [(r.row.ask.slot, r.start, r.end) for r in readings],
            max(row.ask.most for row in through),
            [r.row.moved for r in readings],
        )
        sampling = self._sampler.slots
        slot = torch.tensor([row.ask.slot for row in through])
        drafting = ChainRows(
            length=torch.tensor([len(row.ask.tokens) for row in through]),
            most=torch.tensor([row.ask.most for row in through]),
            temperature=sampling.temperature[slot],
            log_min_p=sampling.log_min_p[slot],
            top_k=sampling.top_k[slot],
            top_p=sampling.top_p[slot],
            seed=sampling.seed[slot],
            choice=sampling.choice[slot],
            page_table=batch.page_table[:count],
        )
        read = self._last_tokens(readings[:count])
        fed = torch.tensor(ids).clamp_(max=self._last)
        others = any(row.ask.ahead for row in through)
        with self._threads(max(len(ids), count)):
            made = chain.draft(fed, batch, self._kv, read, drafting, least, self._vocab, others)
        for row, tokens, confidence, instead in zip(through, *made, strict=True):
            row.tokens, row.confidence, row.others = tokens, confidence, instead
        counts = [len(row.tokens) for row in through]
        self._depth += max(counts)
        self._fed += len(ids) + sum(counts) - count

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        # The last draft was drawn, but not fed.
        right = 0
        while right < len(fed) - 2 and fed[right + 1] == chosen[right]:
            right += 1
        self.followed.confirmed(slot, right)

    def take_work(self) -> tuple[int, int]:
        """Forwards, one after the other, and the tokens they computed, since it was last asked."""
        work, self._depth, self._fed = (self._depth, self._fed), 0, 0
        return work

    def take_hits(self) -> int:
        """Rows whose drafts had been made ahead, since it was last asked."""
        hits, self._hits = self._hits, 0
        return hits

    def _behind(self, rows: list[_Row], read: Callable[[Ask], int]) -> list[_Reading]:
        """What is to be fed of what is known: first of those that will be through with it. `read`:
        positions of an ask that were computed."""
        budget = self._most_tokens
        readings: list[_Reading] = []
        for row in sorted(rows, key=lambda r: len(r.ask.tokens) - read(r.ask)):
            known = len(row.ask.tokens)
            start = min(read(row.ask), known - 1)  # the last gives the first draft
            end = min(known, start + max(budget, 1 if known - start == 1 else 0))
            if end == start:
                continue
            budget -= end - start
            readings.append(_Reading(row, start, end))
        return readings

    def _last_tokens(self, readings: list[_Reading]) -> Tensor:
        """Where in the forward the last tokens of the first rows stand."""
        ends = np.cumsum([r.end - r.start for r in readings], dtype=np.int64)
        return torch.from_numpy(ends - 1).to(self._slots.tokens.device)

    @contextmanager
    def _threads(self, tokens: int) -> Iterator[None]:
        """As many CPU threads as so many tokens are worth."""
        threads = torch.get_num_threads()
        if tokens * self._parameters < _ALONE:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)

    def _continue(self, rows: list[_Row]) -> Tensor:
        """Feeds the last draft of each. Where processors look at it, it stands in the token table
        from here on."""
        needs, table = self._sampler.slots.needs, self._slots.tokens
        shown = [row for row in rows if needs[row.ask.slot] & Need.PROCESSING]
        if shown:
            at = torch.tensor([(r.ask.slot, r.length - 1) for r in shown], device=table.device)
            last = [row.tokens[-1] for row in shown]
            table[at[:, 0], at[:, 1]] = torch.tensor(last, dtype=table.dtype, device=table.device)
        return self._forward([_Reading(row, row.length - 1, row.length) for row in rows], None)

    def _forward(self, readings: list[_Reading], read: Tensor | None) -> Tensor:
        device = self._slots.tokens.device
        ids = [token for r in readings for token in r.ids()]
        self._depth += 1
        self._fed += len(ids)
        batch = span_batch(
            self._slots,
            [(r.row.ask.slot, r.start, r.end) for r in readings],
            moved=[r.row.moved for r in readings],
        )
        fed = torch.tensor(ids, device=device).clamp_(max=self._last)
        return self.runner.forward(fed, batch, self._kv, read)

    def _draw(self, rows: list[_Row], hidden: Tensor) -> None:
        """A draft of each, by the target's noise and rules."""
        logits = self.runner.logits(hidden)
        missing = self._vocab - logits.shape[1]
        if missing:  # one of the two vocabularies is padded; what the other has not is not drawn
            logits = pad(logits, (0, missing), value=-torch.inf).contiguous()
        slots = [row.ask.slot for row in rows]
        positions = torch.tensor([row.length for row in rows], device=logits.device)
        drawn = self._sampler.draw(logits, slots, positions)
        taken = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
        for row, token, confidence in zip(rows, drawn.tolist(), taken.exp().tolist(), strict=True):
            row.add(token, confidence)
        if any(row.ask.ahead for row in rows):
            rest = logits.scatter(1, drawn[:, None], -torch.inf)
            instead = self._sampler.draw(rest, slots, positions)
            for row, token in zip(rows, instead.tolist(), strict=True):
                row.others.append(token)
