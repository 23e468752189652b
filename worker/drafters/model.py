"""`ModelDrafter`: a small model of the same vocabulary writes ahead.

It draws with the noise of the target (see `worker/sampler.py`), so that where the two models agree
about the probabilities they also agree about the token (Daliri, Musco & Suresh 2024). Its keys and
values lie in a pool of its own under the page ids of the target's: one allocator and one page
table serve both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.cpu.chain import ChainRows, NativeChain
from kernels.ops import AttentionBatch
from kernels.sampling.upload import upload
from worker.drafters.base import LATER, Ask, Guess
from worker.drafters.followed import Followed, OwnPages, TargetPages
from worker.drafters.outcomes import Foreseen, Outcome, likely_branches
from worker.drafters.rows import Drawn, Front, Reading, Row
from worker.drafters.spans import Moved, last_batch, span_batch
from worker.runner import Runner
from worker.sampler import Sampler
from worker.sampling_state import Need
from worker.slots import SlotTable

# Multiplications of a forward below which a second CPU thread costs more than it brings: each of
# the dozens of meetings of two threads takes about a microsecond.
_ALONE = 16_000_000


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
        # Where a draft is read at no cost, its confidence may end a row. Elsewhere the host would
        # wait for the device once a draft, so drafts are read at the end, and cut then.
        self._reads_each = slots.tokens.device.type == "cpu"
        self._depth = self._fed = 0  # see `take_work`
        self._spare_pages = spare_pages
        self._drafted: dict[int, Row] = {}  # by slot, in the last `propose`
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
        rows = [Row(ask) for ask in asks]
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
            Row(Ask(ask.slot, ask.tokens + right, ask.ahead + 1))
            for ask, right in zip(asks, drafts, strict=True)
        ]

        def read(ask: Ask) -> int:
            # Of its own drafts all but the last were fed.
            return len(ask.tokens) - 1 if ask.slot in fed else self.followed.read(ask)

        readings = self._behind(rows, read)
        branches = self._branches(asks, own)
        readings += [Reading(row, row.length - 1, row.length) for row in branches]
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

    def _own(self, ask: Ask, drafts: list[int]) -> Row | None:
        """The row of this drafter's in which these were drafted, if they were."""
        row = self._drafted.get(ask.slot)
        return row if drafts and row is not None and row.tokens == drafts else None

    def _branches(self, asks: Sequence[Ask], own: Sequence[Row | None]) -> list[Row]:
        """Rows for outcomes in which a draft is wrong."""
        needs, size = self._sampler.slots.needs, self._slots.page_size
        drafts: list[Guess] = []
        others: list[list[int]] = []
        for ask, row in zip(asks, own, strict=True):
            # Processors look into the token table, which holds one text of each slot.
            usable = row is not None and not needs[ask.slot] & Need.PROCESSING
            drafts.append(Guess(row.tokens, row.confidence) if usable and row else LATER)
            others.append(row.others if usable and row else [])
        found: list[Row] = []
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
            found.append(Row(Ask(ask.slot, text, ask.ahead), moved=Moved(first, pages)))
        self._copy(copied)
        return found

    def _copy(self, pages: Sequence[tuple[int, int]]) -> None:
        """Keys and values of the first of each pair to the second."""
        if pages:
            source, target = (
                upload(of, self._slots.tokens.device) for of in zip(*pages, strict=True)
            )
            for layer in self._kv:
                layer[target] = layer[source]

    def _foresaw(self, row: Row, least: float) -> bool:
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
            if len(row.tokens) == row.ask.most or not row.believes(least):
                break
            row.add(token, confidence)
        self._depth = max(self._depth, len(row.tokens))
        self._fed += len(row.tokens)
        return True

    # --- computing ------------------------------------------------------------------------------

    def _draft(self, readings: list[Reading], least: float) -> None:
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
            self._forward(*self._laid_out(readings))

    def _one_by_one(self, readings: list[Reading], through: list[Row], least: float) -> None:
        """Nothing is read back before the last draft is on its way, but where reading is free."""
        ids, batch = self._laid_out(readings, max((row.ask.most for row in through), default=0))
        count, ahead = len(through), any(row.ask.ahead for row in through)
        with self._threads(len(ids)):
            hidden = self._forward(ids, batch, self._last_tokens(readings[:count]))
            if not through:
                return
            slots = upload([row.ask.slot for row in through], ids.device)
            lengths = batch.kv_lengths[:count].long()
            front = Front(through, slots, lengths, batch.page_table[:count])
            drawn = self._draw(front, hidden, ahead)
        unread = [drawn]
        with self._threads(count):
            while True:
                if self._reads_each:
                    self._read(unread, least)
                    unread = []
                stay = [i for i, row in enumerate(front.rows) if row.drafts_on(least)]
                if not stay:
                    break
                tokens = drawn.tokens
                if len(stay) < len(front.rows):
                    at = upload(stay, tokens.device)
                    tokens, front = tokens[at], front.keep(stay, at)
                front = replace(front, lengths=front.lengths + 1)
                drawn = self._draw(front, self._feed(front, tokens), ahead)
                unread.append(drawn)
        self._read(unread, least)

    def _in_one_call(
        self, chain: NativeChain, readings: list[Reading], through: list[Row], least: float
    ) -> None:
        count = len(through)
        ids, batch = self._laid_out(readings, max(row.ask.most for row in through))
        sampling = self._sampler.slots
        drafting = ChainRows(
            slot=torch.tensor([row.ask.slot for row in through]),
            length=torch.tensor([len(row.ask.tokens) for row in through]),
            most=torch.tensor([row.ask.most for row in through]),
            page_table=batch.page_table[:count],
            temperature=sampling.temperature,
            log_min_p=sampling.log_min_p,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            seed=sampling.seed,
            choice=sampling.choice,
        )
        read = self._last_tokens(readings[:count])
        others = any(row.ask.ahead for row in through)
        with self._threads(max(len(ids), count)):
            made = chain.draft(ids, batch, self._kv, read, drafting, least, self._vocab, others)
        for row, tokens, confidence, instead in zip(through, *made, strict=True):
            row.tokens, row.confidence, row.others = tokens, confidence, instead
            row.made = len(tokens)
        counts = [row.made for row in through]
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

    def _behind(self, rows: list[Row], read: Callable[[Ask], int]) -> list[Reading]:
        """What is to be fed of what is known: first of those that will be through with it. `read`:
        positions of an ask that were computed."""
        budget = self._most_tokens
        readings: list[Reading] = []
        for row in sorted(rows, key=lambda r: len(r.ask.tokens) - read(r.ask)):
            known = len(row.ask.tokens)
            start = min(read(row.ask), known - 1)  # the last gives the first draft
            end = min(known, start + max(budget, 1 if known - start == 1 else 0))
            if end == start:
                continue
            budget -= end - start
            readings.append(Reading(row, start, end))
        return readings

    def _laid_out(self, readings: list[Reading], more: int = 0) -> tuple[Tensor, AttentionBatch]:
        """One forward: its token ids, [tokens] int64, and where they stand; `more` as in
        `span_batch`."""
        spans = [(r.row.ask.slot, r.start, r.end) for r in readings]
        batch = span_batch(self._slots, spans, more, [r.row.moved for r in readings])
        ids = upload([token for r in readings for token in r.ids()], self._slots.tokens.device)
        return ids.clamp_(max=self._last), batch

    def _last_tokens(self, readings: list[Reading]) -> Tensor:
        """Where in the forward the last tokens of the first rows stand."""
        ends = accumulate(r.end - r.start for r in readings)
        return upload([end - 1 for end in ends], self._slots.tokens.device)

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

    def _feed(self, front: Front, tokens: Tensor) -> Tensor:
        """Computes the last draft of each: [rows] int64. Where processors look at it, it stands in
        the token table from here on."""
        needs, table = self._sampler.slots.needs, self._slots.tokens
        shown = [i for i, row in enumerate(front.rows) if needs[row.ask.slot] & Need.PROCESSING]
        if shown:
            at = upload(shown, table.device)
            table[front.slots[at], front.lengths[at] - 1] = tokens[at].to(table.dtype)
        longest = max(row.length for row in front.rows)
        batch = last_batch(front.lengths, front.page_table, self._slots.page_size, longest)
        return self._forward(tokens.clamp(max=self._last), batch)

    def _forward(self, ids: Tensor, batch: AttentionBatch, read: Tensor | None = None) -> Tensor:
        self._depth += 1
        self._fed += ids.shape[0]
        return self.runner.forward(ids, batch, self._kv, read)

    def _draw(self, front: Front, hidden: Tensor, ahead: bool) -> Drawn:
        """A draft of each, by the target's noise and rules; `ahead`: and what else it might be."""
        logits = self.runner.logits(hidden)
        missing = self._vocab - logits.shape[1]
        if missing:  # one of the two vocabularies is padded; what the other has not is not drawn
            logits = pad(logits, (0, missing), value=-torch.inf).contiguous()
        slots = [row.ask.slot for row in front.rows]
        tokens = self._sampler.draw(logits, slots, front.lengths, front.slots)
        taken = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)
        others = None
        if ahead:
            rest = logits.scatter(1, tokens[:, None], -torch.inf)
            others = self._sampler.draw(rest, slots, front.lengths, front.slots)
        for row in front.rows:
            row.made += 1
        return Drawn(front.rows, tokens, taken.exp(), others)

    @staticmethod
    def _read(drawn: Sequence[Drawn], least: float) -> None:
        """Tells the rows their drafts, up to the first that makes them stop."""
        if not drawn:
            return
        tokens = torch.cat([d.tokens for d in drawn]).tolist()
        confidence = torch.cat([d.confidence for d in drawn]).tolist()
        others = [d.others for d in drawn if d.others is not None]
        instead = torch.cat(others).tolist() if others else []
        for i, row in enumerate(row for d in drawn for row in d.rows):
            if row.believes(least):
                row.add(tokens[i], confidence[i])
                row.others += instead[i : i + 1]
