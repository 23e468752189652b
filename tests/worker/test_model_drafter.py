"""What a draft model drafts: whose model it is, who is asked, and when rows stop."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from scheduler.plan import Admit
from scheduler.request import SamplingParams
from tests.worker.remembering import (
    GREEDY,
    LENGTH,
    PAGE,
    PAGES,
    PARAMS,
    SLOTS,
    VOCAB,
    Model,
    Setting,
    both,
    check,
    text,
)
from worker.drafters.base import LATER, Ask
from worker.drafters.model import ModelDrafter
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable


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
