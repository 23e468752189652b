"""A draft model that remembers, sequences in all slots, and what their drafts must be.

The model makes its scores of the tokens that it finds in its pool, by the page table, at the
positions up to its own: a key too few, or at the wrong place, and it drafts something else.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.cpu.chain import ChainRows, NativeChain
from kernels.ops import AttentionBatch
from kernels.sampling import reference
from kernels.sampling.reference import Draws, NoiseKey, Truncation
from scheduler.plan import Admit, PageCopy
from scheduler.request import SamplingParams
from worker.drafters.base import Ask, Guess
from worker.drafters.model import ModelDrafter
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable

SLOTS, LENGTH, PAGE, PAGES, VOCAB, CPU = 5, 120, 4, 200, 50, torch.device("cpu")
GREEDY = SamplingParams(max_tokens=50, temperature=0)
# By slot from 1 on.
PARAMS = [
    GREEDY,
    SamplingParams(max_tokens=50, temperature=1, seed=7),
    SamplingParams(max_tokens=50, temperature=0.8, top_k=9, top_p=0.9, seed=2**63 + 1),
    GREEDY,
]


def scores(history: Sequence[int], vocab: int) -> Tensor:
    """The logits after a text: one token stands out, more or less."""
    state = zlib.crc32(bytes(history))
    row = torch.tensor([zlib.crc32(bytes([i]), state) % 1000 / 500 for i in range(vocab)])
    row[state % vocab] += state // vocab % 9
    return row


def step(
    history: Sequence[int], position: int, vocab: int, drawn_of: int, by: ChainRows, slot: int
) -> tuple[int, float]:
    """A draft after a text and its confidence, as the specification has them."""
    logits = torch.full((1, drawn_of), -torch.inf)
    both = min(vocab, drawn_of)
    logits[0, :both] = scores(history, vocab)[:both]
    at = slice(slot, slot + 1)
    if by.temperature[slot] == 0:
        token = int(logits.argmax())
    else:
        key = NoiseKey(by.seed[at], by.choice[at], torch.tensor([position]))
        limits = Truncation(by.log_min_p[at], by.top_k[at], by.top_p[at])
        token = int(reference.draw(logits, Draws(by.temperature[at], key, limits)))
    return token, float(logits.softmax(1)[0, token])


class Model:
    """A `Runner` whose keys are the tokens themselves, and its own `NativeChain`."""

    name = "remembering"

    def __init__(self, vocab: int, chained: bool) -> None:
        self.vocab = vocab
        self.chain: NativeChain | None = self if chained else None
        self.forwards: list[list[int]] = []  # the positions fed, forward by forward
        self.chains = 0

    def forward(
        self, ids: Tensor, batch: AttentionBatch, kv: Sequence[Tensor], read: Tensor | None = None
    ) -> Tensor:
        keys, table = kv[0].view(-1), batch.page_table
        rows, positions = batch.token_rows, batch.positions
        pages = table[rows, positions // PAGE].long()
        assert (pages > 0).all()
        assert torch.equal(batch.kv_slots, pages * PAGE + positions % PAGE)
        assert torch.equal(
            batch.kv_lengths.long(), positions[batch.query_starts[1:].long() - 1] + 1
        )
        assert int(ids.max()) < self.vocab
        self.forwards.append(positions.tolist())
        keys[batch.kv_slots] = ids
        hidden = torch.zeros(len(ids), LENGTH + 1, dtype=torch.int64)  # a length and a text
        for token, (row, position) in enumerate(
            zip(rows.tolist(), positions.tolist(), strict=True)
        ):
            hidden[token, 0] = position + 1
            hidden[token, 1 : position + 2] = self._text(kv, table[row], position + 1)
        return hidden if read is None else hidden[read]

    @staticmethod
    def _text(kv: Sequence[Tensor], pages: Tensor, length: int) -> Tensor:
        return kv[0][pages[: -(-length // PAGE)].long()].view(-1)[:length]

    def logits(self, hidden: Tensor) -> Tensor:
        return torch.stack([scores(row[1 : row[0] + 1].tolist(), self.vocab) for row in hidden])

    def draft(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor,
        rows: ChainRows,
        least: float,
        vocab_size: int,
        others: bool = False,
    ) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
        assert not others, "nobody drafts ahead here"
        self.chains += 1
        states = self.forward(ids, batch, kv, read)
        assert states[:, 0].tolist() == rows.length.tolist()
        tokens: list[list[int]] = [[] for _ in states]
        confidence: list[list[float]] = [[] for _ in states]
        for row, known in enumerate(rows.length.tolist()):
            pages, belief = rows.page_table[row], 1.0
            while True:
                length = known + len(tokens[row])
                text = self._text(kv, pages, length).tolist()
                slot = int(rows.slot[row])
                token, sure = step(text, length, self.vocab, vocab_size, rows, slot)
                tokens[row].append(token)
                confidence[row].append(sure)
                belief *= sure
                if len(tokens[row]) == rows.most[row] or belief < least:
                    break
                assert pages[length // PAGE] > 0
                kv[0][pages[length // PAGE], length % PAGE] = token
        return tokens, confidence, [[] for _ in tokens]


class Setting:
    """A drafter, and sequences in all slots but the null slot."""

    def __init__(
        self,
        chained: bool = False,
        vocab: int = VOCAB,
        params: Sequence[SamplingParams] = PARAMS,
        most_tokens: int = 1000,
        target_vocab: int = VOCAB,
        late: bool = False,
    ) -> None:
        """late: drafts are read when all are made, as on a GPU."""
        self.vocab, self.params = vocab, params
        self.model = Model(vocab, chained)
        self.slots = SlotTable(SLOTS, LENGTH, PAGE, CPU)
        self.sampling = SlotSampling(SLOTS, target_vocab, CPU)
        sampler = Sampler(self.sampling, self.slots.tokens)
        self.kv = [torch.full((PAGES, PAGE), 255)]
        self.drafter = ModelDrafter(
            self.model, self.kv, self.slots, sampler, 10**3, vocab, most_tokens
        )
        if late:
            self.drafter._reads_each = False
        self.free = list(range(1, PAGES))
        random.Random(2).shuffle(self.free)
        self.epoch = 0
        self.tokens: dict[int, list[int]] = {}

    def admit(
        self, slot: int, tokens: Sequence[int], cached: Sequence[int] = (), loaded: int = 0
    ) -> None:
        """A new owner of the slot with that text; `cached` are the pages of its first tokens, the
        last `loaded` of them come from the host."""
        self.epoch += 1
        params = self.params[(slot - 1) % len(self.params)]
        loads = tuple(PageCopy(0, page) for page in cached[len(cached) - loaded :])
        known = tuple(tokens[: len(cached) * PAGE])
        self.slots.admit(Admit(slot, self.epoch, params, slot % 2, 1, tuple(cached), known, loads))
        self.sampling.admit(slot, params, slot % 2, 1)
        self.drafter.admit(slot, b"")
        new = [self.free.pop() for _ in range(LENGTH // PAGE - len(cached))]
        self.slots.add_pages(slot, new)
        self.tokens[slot] = list(tokens)

    def leave(self, slot: int) -> list[int]:
        """The owner goes: its pages, which others may get from now on."""
        del self.tokens[slot]
        return self.slots.pages[slot]

    def propose(self, most: dict[int, int], least: float = 0.0) -> list[Guess]:
        self.model.forwards.clear()
        return self.drafter.propose([Ask(s, self.tokens[s], k) for s, k in most.items()], least)

    def expected(self, slot: int, most: int, least: float = 0.0) -> Guess:
        state = self.sampling
        rows = ChainRows(
            slot=torch.empty(0),
            length=torch.empty(0),
            most=torch.empty(0),
            temperature=state.temperature,
            log_min_p=state.log_min_p,
            top_k=state.top_k,
            top_p=state.top_p,
            seed=state.seed,
            choice=state.choice,
            page_table=torch.empty(0),
        )
        text, drafts = [min(token, self.vocab - 1) for token in self.tokens[slot]], Guess([], [])
        belief = 1.0
        while len(drafts.tokens) < most and belief >= least:
            token, sure = step(text, len(text), self.vocab, state.vocab_size, rows, slot)
            drafts.tokens.append(token)
            drafts.confidence.append(sure)
            text.append(token)
            belief *= sure
        return drafts

    def verify(self, slot: int, drafts: Sequence[int], right: int, other: int = 0) -> None:
        """The target confirms that many drafts and goes on with another token."""
        fed = [self.tokens[slot][-1], *drafts]
        chosen = [*drafts[:right], other, *[-1] * (len(drafts) - right)]
        self.drafter.verified(slot, fed, chosen)
        self.tokens[slot] += chosen[: right + 1]


def check(guess: Guess, expected: Guess) -> None:
    assert guess.tokens == expected.tokens
    assert guess.confidence == pytest.approx(expected.confidence, rel=1e-5)


def text(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]


both = pytest.mark.parametrize("chained", [False, True], ids=["one by one", "one call"])
