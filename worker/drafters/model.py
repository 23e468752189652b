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
from worker.batch import span_batch
from worker.drafters.base import LATER, Ask, Guess
from worker.drafters.followed import Followed, OwnPages, TargetPages
from worker.runner import Runner
from worker.sampler import Sampler
from worker.sampling_state import Need
from worker.slots import SlotTable

Span = tuple[int, int, int]  # a slot, and positions from the first to before the last

# Multiplications of a forward below which a second CPU thread costs more than it brings: each of
# the dozens of meetings of two threads takes about a microsecond.
_ALONE = 16_000_000


@dataclass(slots=True)
class _Row:
    """One ask on its way."""

    ask: Ask
    tokens: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)
    all_right: float = 1.0  # the probability that all drafts so far are

    def add(self, token: int, confidence: float) -> None:
        self.tokens.append(token)
        self.confidence.append(confidence)
        self.all_right *= confidence

    def drafts_on(self, least: float) -> bool:
        return len(self.tokens) < self.ask.most and self.all_right >= least


class _Foreseen(NamedTuple):
    """Drafts that were made while the target was still choosing."""

    known: int  # tokens at that time
    coming: tuple[int, ...]  # the outcome they were made for: the tokens after those
    guess: Guess


class ModelDrafter:
    """Drafts of all rows side by side, one token of each a forward.

    A sequence is followed only while it is asked about. Whatever was computed of it before, or by
    another sequence that shares its first pages, is made use of.

    While a row's drafts are verified it can be drafted for ahead, for the likeliest outcome: all
    are right, and the token after them is the one that this model would choose. It draws with the
    target's noise, so that guess is as good as any draft.
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
    ) -> None:
        """kv: the draft model's pool, see `kv_pool.allocate_pool`; `parameters` and `vocab_size`
        of the model; `most_tokens` of known text are caught up with in one step, by rows that do
        not draft in it. `coarse`: the model is the target itself, reading its own pages by fewer
        bits."""
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
        self._drafted: dict[int, list[int]] = {}  # by slot, in the last `propose`
        self._ready: dict[int, _Foreseen] = {}  # by slot
        self._hits = 0

    def use(self, runner: Runner) -> None:
        """Computes by another runner from now on. On the worker's thread."""
        self.runner = runner

    def admit(self, slot: int, group: bytes) -> None:
        self.followed.admit(slot)
        self._ready.pop(slot, None)

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> list[bool] | None:
        return None

    def propose(self, asks: Sequence[Ask], least: float, patience: int = 0) -> list[Guess]:
        """See `Drafter`; `patience`: see `StepPlan`."""
        rows = [_Row(ask) for ask in asks]
        late = [row for row in rows if not self._foresaw(row, least)]
        self._hits += len(rows) - len(late)
        if len(late) >= patience:
            through, spans = self._behind(late, self.followed.read)
            self._draft(late, through, spans, least)
            for slot, _, end in spans:
                self.followed.advance(slot, end)
        self._drafted = {row.ask.slot: row.tokens for row in rows}
        return [Guess(row.tokens, row.confidence) if row.tokens else LATER for row in rows]

    def foresee(self, asks: Sequence[Ask], drafts: Sequence[list[int]]) -> None:
        """Drafts on for each of these, as if all of its `drafts`, which are being verified, were
        right. The asks' tokens are the known ones; what they allow is meant for the step after."""
        depth, fed = self._depth, self._fed  # the work of the step that verifies what comes of it
        rows = [
            _Row(Ask(ask.slot, ask.tokens + right, 1 + ask.most))
            for ask, right in zip(asks, drafts, strict=True)
        ]
        known = {ask.slot: len(ask.tokens) for ask in asks}

        def read(ask: Ask) -> int:
            own = self._drafted.get(ask.slot)
            right = ask.tokens[known[ask.slot] :]
            # Of its own drafts all but the last were fed.
            return len(ask.tokens) - 1 if own == right != [] else self.followed.read(ask)

        through, spans = self._behind(rows, read)
        self._draft(rows, through, spans, 0.0)
        for slot, _, end in spans:
            self.followed.advance(slot, min(end, known[slot]))
        for row in through:
            slot, tokens = row.ask.slot, row.ask.tokens
            coming = (*tokens[known[slot] :], row.tokens[0])
            guess = Guess(row.tokens[1:], row.confidence[1:])
            self._ready[slot] = _Foreseen(known[slot], coming, guess)
        self._depth, self._fed = depth, fed

    def forget(self) -> None:
        """What was foreseen has come, or not."""
        self._ready.clear()

    def _foresaw(self, row: _Row, least: float) -> bool:
        """Gives the row the drafts that were made for what has come, if they were."""
        slot, tokens = row.ask.slot, row.ask.tokens
        foreseen = self._ready.get(slot)
        if foreseen is None:
            return False
        came = tuple(tokens[foreseen.known :])
        if came[:-1] != foreseen.coming[:-1]:
            return False
        guess = foreseen.guess
        if came != foreseen.coming or not guess.tokens:
            self.followed.advance(slot, len(tokens) - 1)
            return False
        self.followed.advance(slot, len(tokens))
        for token, confidence in zip(guess.tokens, guess.confidence, strict=True):
            if row.tokens and not row.drafts_on(least):
                break
            row.add(token, confidence)
        self._depth = max(self._depth, len(row.tokens))
        self._fed += len(row.tokens)
        return True

    def _draft(
        self, rows: list[_Row], through: list[_Row], spans: list[Span], least: float
    ) -> None:
        """Feeds the spans, and drafts for the rows that are through with what is known."""
        needs = self._sampler.slots.needs
        chain = self.runner.chain
        if chain is None or any(needs[row.ask.slot] & Need.PROCESSING for row in through):
            self._one_by_one(rows, through, spans, least)
        elif through:
            self._in_one_call(chain, rows, through, spans, least)
        elif spans:
            self._forward(self._ids(rows, spans), spans, None)

    def _one_by_one(
        self, rows: list[_Row], through: list[_Row], spans: list[Span], least: float
    ) -> None:
        if not spans:
            return
        ids = self._ids(rows, spans)
        with self._threads(len(ids)):
            hidden = self._forward(ids, spans, self._last_tokens(spans, len(through)))
            if through:
                self._draw(through, hidden)
        with self._threads(len(through)):
            while alive := [row for row in through if row.drafts_on(least)]:
                self._draw(alive, self._continue(alive))
                through = alive

    def _in_one_call(
        self,
        chain: NativeChain,
        rows: list[_Row],
        through: list[_Row],
        spans: list[Span],
        least: float,
    ) -> None:
        ids, count = self._ids(rows, spans), len(through)
        batch = span_batch(self._slots, spans, max(row.ask.most for row in through))
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
        read = self._last_tokens(spans, count)
        fed = torch.tensor(ids).clamp_(max=self._last)
        with self._threads(max(len(ids), count)):
            tokens, confidence = chain.draft(
                fed, batch, self._kv, read, drafting, least, self._vocab
            )
        for i, row in enumerate(through):
            row.tokens, row.confidence = tokens[i], confidence[i]
        made = [len(row.tokens) for row in through]
        self._depth += max(made)
        self._fed += len(ids) + sum(made) - count

    def verified(self, slot: int, fed: Sequence[int], chosen: Sequence[int]) -> None:
        # The last draft was drawn, but not fed.
        right = 0
        while right < len(fed) - 2 and fed[right + 1] == chosen[right]:
            right += 1
        self.followed.confirmed(slot, right)

    def take_work(self) -> tuple[int, int, int]:
        """Forwards, one after the other, the tokens they computed, and how many rows' drafts were
        made ahead, since it was last asked."""
        work = self._depth, self._fed, self._hits
        self._depth = self._fed = self._hits = 0
        return work

    @staticmethod
    def _length(row: _Row) -> int:
        return len(row.ask.tokens) + len(row.tokens)

    def _behind(
        self, rows: list[_Row], read: Callable[[Ask], int]
    ) -> tuple[list[_Row], list[Span]]:
        """Those that will be through with what is known, and what is to be fed: theirs first.
        `read`: positions of an ask that were computed."""
        budget = self._most_tokens
        through: list[_Row] = []
        spans: list[Span] = []
        for row in sorted(rows, key=lambda r: len(r.ask.tokens) - read(r.ask)):
            slot, known = row.ask.slot, len(row.ask.tokens)
            start = min(read(row.ask), known - 1)  # the last gives the first draft
            end = min(known, start + max(budget, 1 if known - start == 1 else 0))
            if end == start:
                continue
            budget -= end - start
            spans.append((slot, start, end))
            if end == known:
                through.append(row)
        return through, spans

    def _last_tokens(self, spans: list[Span], count: int) -> Tensor:
        """Where in the forward the last tokens of the first rows stand."""
        lengths = [end - start for _, start, end in spans[:count]]
        ends = np.cumsum(lengths, dtype=np.int64)
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

    @staticmethod
    def _ids(rows: list[_Row], spans: list[Span]) -> list[int]:
        tokens = {row.ask.slot: row.ask.tokens for row in rows}
        return [token for slot, start, end in spans for token in tokens[slot][start:end]]

    def _continue(self, rows: list[_Row]) -> Tensor:
        """Feeds the last draft of each, which stands in the token table from here on."""
        spans = [(row.ask.slot, self._length(row) - 1, self._length(row)) for row in rows]
        ids = [row.tokens[-1] for row in rows]
        table = self._slots.tokens
        at = torch.tensor([[slot, first] for slot, first, _ in spans], device=table.device)
        table[at[:, 0], at[:, 1]] = torch.tensor(ids, dtype=table.dtype, device=table.device)
        return self._forward(ids, spans, None)

    def _forward(self, ids: list[int], spans: list[Span], read: Tensor | None) -> Tensor:
        device = self._slots.tokens.device
        self._depth += 1
        self._fed += len(ids)
        batch = span_batch(self._slots, spans)
        fed = torch.tensor(ids, device=device).clamp_(max=self._last)
        return self.runner.forward(fed, batch, self._kv, read)

    def _draw(self, rows: list[_Row], hidden: Tensor) -> None:
        """A draft of each, by the target's noise and rules."""
        logits = self.runner.logits(hidden)
        missing = self._vocab - logits.shape[1]
        if missing:  # one of the two vocabularies is padded; what the other has not is not drawn
            logits = pad(logits, (0, missing), value=-torch.inf).contiguous()
        slots = [row.ask.slot for row in rows]
        positions = torch.tensor([self._length(row) for row in rows], device=logits.device)
        drawn = self._sampler.draw(logits, slots, positions)
        taken = logits.gather(1, drawn[:, None])[:, 0] - logits.logsumexp(1)
        for row, token, confidence in zip(rows, drawn.tolist(), taken.exp().tolist(), strict=True):
            row.add(token, confidence)
