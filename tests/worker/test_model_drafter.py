"""What the draft model is fed, what it drafts, and what it remembers of each page.

The model here makes its scores of the tokens that it finds in its pool, by the page table, at the
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
from worker.drafters.base import LATER, Ask, Guess
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


@pytest.mark.parametrize(
    ("chained", "late"),
    [(False, False), (False, True), (True, False)],
    ids=["one by one", "read late", "one call"],
)
@pytest.mark.parametrize(
    ("vocab", "target"), [(VOCAB, VOCAB), (VOCAB - 9, VOCAB), (VOCAB, VOCAB - 9)]
)
def test_drafts_are_what_the_model_would_write(
    chained: bool, late: bool, vocab: int, target: int
) -> None:
    """Random lengths, owners, askers, limits and outcomes; tokens the model has not got, too."""
    rng = random.Random(1)
    setting = Setting(chained, vocab, target_vocab=target, late=late)
    drafted = steps = 0
    for _ in range(80):
        for slot in range(1, SLOTS):
            gone = slot in setting.tokens and (
                rng.random() < 0.05 or len(setting.tokens[slot]) > LENGTH - 20
            )
            if gone:
                setting.free = setting.leave(slot) + setting.free
            if slot not in setting.tokens:
                setting.admit(slot, [rng.randrange(target) for _ in range(rng.randrange(1, 60))])
        asked = {slot: rng.randrange(1, 6) for slot in setting.tokens if rng.random() < 0.7}
        least = rng.choice((0.0, 0.1, 0.5))
        steps += bool(asked)
        for (slot, most), guess in zip(asked.items(), setting.propose(asked, least), strict=True):
            check(guess, setting.expected(slot, most, least))
            assert max(guess.tokens) < min(vocab, target)
            drafted += len(guess.tokens)
            right = rng.choice((0, len(guess.tokens), rng.randrange(len(guess.tokens) + 1)))
            setting.verify(slot, guess.tokens, right, rng.randrange(target))
        for slot in setting.tokens.keys() - asked.keys():  # these go on without drafts
            setting.tokens[slot].append(rng.randrange(target))
    assert drafted > 300
    assert setting.model.chains == (steps if chained else 0)


@both
@pytest.mark.parametrize(
    ("right", "fed_next"), [(0, [10]), (1, [11]), (2, [12]), (3, [13]), (4, [13, 14])]
)
def test_only_what_is_new_is_computed(chained: bool, right: int, fed_next: list[int]) -> None:
    """Right drafts have been fed when they were continued; the last one was not."""
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    (guess,) = setting.propose({1: 4})
    fed = setting.model.forwards
    assert fed[0] == list(range(10))
    if not chained:
        assert fed[1:] == [[10], [11], [12]]
    assert setting.drafter.take_work() == (4, 13)
    assert setting.drafter.take_work() == (0, 0)
    setting.verify(1, guess.tokens, right)
    (guess,) = setting.propose({1: 2})
    assert setting.model.forwards[0] == fed_next
    check(guess, setting.expected(1, 2))
    assert setting.drafter.take_work() == (2, len(fed_next) + 1)


@both
def test_a_single_draft_was_not_fed_whether_right_or_not(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    (guess,) = setting.propose({1: 1})
    assert setting.drafter.take_work() == (1, 10)
    setting.verify(1, guess.tokens, 1)
    setting.propose({1: 1})
    assert setting.model.forwards == [[10, 11]]


@both
def test_who_was_not_asked_catches_up(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 10))
    setting.admit(2, text(2, 7))
    setting.propose({1: 1, 2: 1})
    setting.tokens[1] += text(3, 9)
    setting.propose({2: 1})
    assert setting.model.forwards == [[6]]
    first, second = setting.propose({1: 3, 2: 2})
    # Who has the least to catch up with comes first.
    assert setting.model.forwards[0] == [6, *range(10, 19)]
    check(first, setting.expected(1, 3))
    check(second, setting.expected(2, 2))


@both
def test_rows_stop_one_by_one(chained: bool) -> None:
    setting = Setting(chained, params=[GREEDY])
    for slot in range(1, SLOTS):
        setting.admit(slot, text(80 + slot, 3 * slot))
    most = {1: 1, 2: 6, 3: 3, 4: 6}
    guesses = setting.propose(most, 0.1)
    for (slot, k), guess in zip(most.items(), guesses, strict=True):
        check(guess, setting.expected(slot, k, 0.1))
    made = [len(guess.tokens) for guess in guesses]
    assert made == [1, 4, 3, 3]  # at `most`, by `least`, at `most`, by `least`
    assert setting.drafter.take_work() == (max(made), 3 + 6 + 9 + 12 + sum(made) - 4)


def test_who_is_read_late_goes_on_to_its_most() -> None:
    """What was drafted after the one that makes a row stop is computed and thrown away."""
    setting = Setting(params=[GREEDY], late=True)
    for slot in range(1, SLOTS):
        setting.admit(slot, text(80 + slot, 3 * slot))
    most = {1: 1, 2: 6, 3: 3, 4: 6}
    for (slot, k), guess in zip(most.items(), setting.propose(most, 0.1), strict=True):
        check(guess, setting.expected(slot, k, 0.1))
    assert [len(fed) for fed in setting.model.forwards] == [3 + 6 + 9 + 12, 3, 3, 2, 2, 2]


def test_the_host_never_waits_for_a_draft() -> None:
    """On the meta device whatever reads a value back raises; the reading of all is left out."""
    device = torch.device("meta")

    class Unknown(Model):
        def forward(
            self,
            ids: Tensor,
            batch: AttentionBatch,
            kv: Sequence[Tensor],
            read: Tensor | None = None,
        ) -> Tensor:
            self.forwards.append([0] * len(ids))
            return torch.empty(len(ids) if read is None else len(read), 8, device=device)

        def logits(self, hidden: Tensor) -> Tensor:
            return torch.empty(len(hidden), VOCAB, device=device)

    slots = SlotTable(SLOTS, LENGTH, PAGE, device)
    sampling = SlotSampling(SLOTS, VOCAB, device)
    model = Unknown(VOCAB, False)
    kv = [torch.empty(PAGES, PAGE, device=device)]
    drafter = ModelDrafter(
        model, kv, slots, Sampler(sampling, slots.tokens), 1000, VOCAB, most_tokens=1000
    )
    read: list[int] = []
    drafter._read = lambda drawn, least: read.append(len(drawn))  # type: ignore[method-assign]
    penalised = SamplingParams(max_tokens=9, seed=1, presence_penalty=0.5)
    for slot, params in enumerate([*PARAMS[:3], penalised], 1):
        slots.admit(Admit(slot, 1, params, 0, 1, (), (), ()))
        slots.add_pages(slot, list(range(10 * slot, 10 * slot + 10)))
        sampling.admit(slot, params, 0, 1)
        drafter.admit(slot, b"")
    asks = [Ask(slot, text(slot, 3 * slot), most=slot + 1, ahead=2) for slot in range(1, SLOTS)]
    drafter.propose(asks, 0.5)
    assert read == [5]
    assert [len(fed) for fed in model.forwards] == [3 + 6 + 9 + 12, 4, 3, 2, 1]


@both
def test_long_texts_are_caught_up_with_in_pieces(chained: bool) -> None:
    setting = Setting(chained, most_tokens=16)
    setting.admit(1, text(1, 40))
    setting.admit(2, text(2, 5))
    first, second = setting.propose({1: 2, 2: 2})
    assert first is LATER
    check(second, setting.expected(2, 2))
    assert setting.model.forwards[0] == [*range(5), *range(11)]
    assert setting.propose({1: 2}) == [LATER]
    assert setting.model.forwards == [list(range(11, 27))]
    assert setting.drafter.take_work() == (3, 16 + 1 + 16)
    (first,) = setting.propose({1: 2})
    assert setting.model.forwards[0] == list(range(27, 40))
    check(first, setting.expected(1, 2))


@both
def test_who_is_up_to_date_drafts_whatever_the_budget(chained: bool) -> None:
    setting = Setting(chained, most_tokens=2)
    for slot in (1, 2, 3):
        setting.admit(slot, text(slot, 1))
    setting.admit(4, text(4, 6))
    *near, far = setting.propose({4: 2, 1: 2, 2: 2, 3: 2})[1:] + setting.propose({4: 2})
    for slot, guess in zip((1, 2, 3), near, strict=True):
        check(guess, setting.expected(slot, 2))
    assert far is LATER
    assert setting.model.forwards == [[0, 1]]  # the budget had been spent on the others before


@both
def test_nobody_asks_for_nothing(chained: bool) -> None:
    setting = Setting(chained)
    assert setting.propose({}) == []
    assert setting.model.forwards == []
    assert setting.drafter.take_work() == (0, 0)


@both
def test_pages_of_another_sequence_are_made_use_of(chained: bool) -> None:
    setting = Setting(chained)
    shared = text(1, 11)  # two whole pages and three tokens
    setting.admit(1, shared)
    setting.propose({1: 1})
    setting.admit(2, [*shared[:8], *text(2, 5)], setting.slots.pages[1][:2])
    (guess,) = setting.propose({2: 3})
    assert setting.model.forwards[0] == list(range(8, 13))
    check(guess, setting.expected(2, 3))


@both
def test_pages_count_as_far_as_the_draft_model_has_read_them(chained: bool) -> None:
    """The target has computed three pages, the draft model two of them."""
    setting = Setting(chained, most_tokens=8)
    shared = text(1, 14)
    setting.admit(1, shared)
    assert setting.propose({1: 1}) == [LATER]
    setting.admit(2, shared, setting.slots.pages[1][:3])
    (guess,) = setting.propose({2: 2})
    assert setting.model.forwards[0] == list(range(8, 14))
    check(guess, setting.expected(2, 2))


@both
def test_a_page_with_a_new_owner_is_read_anew(chained: bool) -> None:
    setting = Setting(chained)
    setting.admit(1, text(1, 11))
    setting.propose({1: 1})
    pages = setting.leave(1)
    # Another writes into the second page, and later a third finds both pages in the prefix cache.
    setting.free.append(pages[1])
    setting.admit(2, text(2, 3))
    assert setting.slots.pages[2][0] == pages[1]
    setting.admit(3, text(1, 11), pages[:2])
    (guess,) = setting.propose({3: 2})
    assert setting.model.forwards[0] == list(range(4, 11))
    check(guess, setting.expected(3, 2))


@both
def test_a_page_from_the_host_has_no_keys_of_the_draft_model(chained: bool) -> None:
    """The host keeps the target's pages alone. What follows one that is missing does not count."""
    setting = Setting(chained)
    setting.admit(1, text(1, 14))
    setting.propose({1: 1})
    pages = setting.slots.pages[1][:3]
    setting.admit(2, text(1, 14), pages, loaded=1)
    setting.propose({2: 1})
    assert setting.model.forwards == [list(range(8, 14))]
    setting.slots.writer[pages[0]] += 1
    setting.admit(3, text(1, 14), pages)
    setting.propose({3: 1})
    assert setting.model.forwards == [list(range(14))]


@both
@pytest.mark.parametrize(("right", "whole"), [(0, 1), (1, 2), (4, 2)])
def test_wrong_drafts_do_not_make_a_page_whole(chained: bool, right: int, whole: int) -> None:
    """The drafts after seven tokens begin with the last place of the second page."""
    setting = Setting(chained)
    setting.admit(1, text(1, 7))
    (guess,) = setting.propose({1: 4})
    setting.verify(1, guess.tokens, right)
    setting.admit(2, [*setting.tokens[1][:8], *text(2, 3)], setting.slots.pages[1][:2])
    (guess,) = setting.propose({2: 2})
    assert setting.model.forwards[0] == list(range(4 * whole, 11))
    check(guess, setting.expected(2, 2))


def test_rows_that_need_processing_go_one_by_one() -> None:
    """And what was drafted is history to the drafts after it."""
    params = SamplingParams(
        max_tokens=9, temperature=0, allowed_token_ids=(3, 4), presence_penalty=9.0
    )
    setting = Setting(True, params=[params, GREEDY], most_tokens=20)
    tokens = text(1, 9)
    setting.admit(1, [token for token in tokens if token not in (3, 4)])
    setting.admit(2, tokens)
    restricted, free = setting.propose({1: 2, 2: 3})
    assert sorted(restricted.tokens) == [3, 4]
    check(free, setting.expected(2, 3))
    assert setting.model.chains == 0
    # While such a row only catches up, the others need not wait for its sake.
    setting.admit(1, text(2, 40))
    later, free = setting.propose({1: 2, 2: 3})
    assert later is LATER
    check(free, setting.expected(2, 3))
    assert setting.model.chains == 1


def test_another_runner_takes_over() -> None:
    setting = Setting(False)
    setting.admit(1, text(1, 9))
    (before,) = setting.propose({1: 3})
    other = Model(VOCAB, True)
    setting.drafter.use(other)
    (after,) = setting.propose({1: 3})
    check(after, before)
    assert setting.model.forwards == []
    assert (other.chains, other.forwards) == (1, [[8]])
