"""Drafts in one native call against forwards and draws one by one."""

from __future__ import annotations

import random

import pytest
import torch

from kernels.cpu.ops import NativeOps
from models.decoder import Decoder
from scheduler.request import SamplingParams
from tests.e2e.test_exactness import SPEC
from worker.drafters.base import Ask, Guess
from worker.drafters.model import ModelDrafter
from worker.kv_pool import allocate_pool
from worker.native import native_runner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable

SLOTS, LENGTH, PAGE, PAGES, CPU = 7, 200, 8, 200, torch.device("cpu")
PARAMS = [
    SamplingParams(max_tokens=50, temperature=0),
    SamplingParams(max_tokens=50, temperature=1, seed=7),
    SamplingParams(max_tokens=50, temperature=0.7, top_k=12, seed=8),
    SamplingParams(max_tokens=50, temperature=1.3, top_p=0.8, min_p=0.02, seed=2**63 + 5),
    SamplingParams(max_tokens=50, temperature=1, logprobs=3, seed=9),
    SamplingParams(max_tokens=50, temperature=0),
]


class Pair:
    """The same drafter twice, with and without the chain, in the same state."""

    def __init__(
        self, native: NativeOps, dtype: torch.dtype, vocab: int, parameters: int = 10**4
    ) -> None:
        torch.manual_seed(4)
        model = Decoder(SPEC, dtype=dtype, max_model_len=LENGTH + 20)
        for name, target in model.targets().items():
            if target.dim() > 1:
                target.normal_(0.0, 1.0 if "embed" in name else 0.3)
            else:
                target.fill_(1.0)
        runner = native_runner(model, native)
        assert runner.chain is not None
        self.chain = runner.chain
        self.runner = runner
        slots = SlotTable(SLOTS, LENGTH + 20, PAGE, CPU)
        sampling = SlotSampling(SLOTS, vocab, CPU)
        sampler = Sampler(sampling, slots.tokens)
        sampler.use(native.sampling())
        rng = random.Random(1)
        pages = list(range(1, PAGES))
        rng.shuffle(pages)
        for slot, params in enumerate(PARAMS, 1):
            sampling.admit(slot, params, choice=slot % 2, prompt_len=5)
            slots.add_pages(slot, [pages.pop() for _ in range(-(-(LENGTH + 20) // PAGE))])
        self.both = []
        for _ in range(2):
            kv = allocate_pool(SPEC, PAGES + 16, PAGE, dtype, CPU)
            spare = range(PAGES, PAGES + 16)
            self.both.append(
                ModelDrafter(
                    runner, kv, slots, sampler, parameters, SPEC.vocab_size, 64, spare_pages=spare
                )
            )
        for slot in range(1, SLOTS):
            for drafter in self.both:
                drafter.admit(slot, b"")
        self.tokens = {
            slot: [rng.randrange(SPEC.vocab_size) for _ in range(rng.randrange(1, 60))]
            for slot in range(1, SLOTS)
        }

    def propose(self, most: dict[int, int], least: float) -> tuple[list[Guess], list[Guess]]:
        asks = [Ask(slot, self.tokens[slot], k, k) for slot, k in most.items()]
        self.runner.chain = self.chain
        chained = self.both[0].propose(asks, least)
        self.runner.chain = None
        single = self.both[1].propose(asks, least)
        a, b = (drafter._drafted for drafter in self.both)
        assert {slot: row.others for slot, row in a.items()} == {
            slot: row.others for slot, row in b.items()
        }
        return chained, single


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [SPEC.vocab_size, SPEC.vocab_size + 40, SPEC.vocab_size - 60])
def test_it_equals_single_steps(native: NativeOps, dtype: torch.dtype, vocab: int) -> None:
    pair = Pair(native, dtype, vocab)
    rng = random.Random(5)
    seen = 0
    for _ in range(25):
        most = {slot: rng.randrange(1, 7) for slot in pair.tokens if rng.random() < 0.8}
        least = rng.choice((0.0, 0.05, 0.3))
        chained, single = pair.propose(most, least)
        work = [drafter.take_work() for drafter in pair.both]
        assert work[0] == work[1]
        for slot, a, b in zip(most, chained, single, strict=True):
            assert a.tokens == b.tokens, PARAMS[slot - 1]
            assert a.confidence == pytest.approx(b.confidence, rel=1e-5, abs=1e-6)
            assert all(token < min(vocab, SPEC.vocab_size) for token in a.tokens)
            seen += len(a.tokens)
            if not a.tokens:
                continue
            right = rng.randrange(len(a.tokens) + 1)
            chosen = [*a.tokens[:right], rng.randrange(SPEC.vocab_size)]
            fed = [pair.tokens[slot][-1], *a.tokens]
            padded = chosen + [-1] * (len(fed) - len(chosen))
            for drafter in pair.both:
                drafter.verified(slot, fed, padded)
            pair.tokens[slot] += chosen
            del pair.tokens[slot][LENGTH:]
        for layer, other in zip(pair.both[0]._kv, pair.both[1]._kv, strict=True):
            torch.testing.assert_close(layer, other, rtol=0, atol=0)
        assert pair.both[0].followed.computed == pair.both[1].followed.computed
    assert seen > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_make_no_difference(native: NativeOps, dtype: torch.dtype, threads: None) -> None:
    """Models large enough for several threads draft what they would on one."""
    made = []
    for count in (1, 3):
        torch.set_num_threads(count)
        pair = Pair(native, dtype, SPEC.vocab_size, parameters=10**9)
        guesses = [pair.propose(dict.fromkeys(pair.tokens, 4), 0.0) for _ in range(4)]
        assert torch.get_num_threads() == count
        made.append((guesses, pair.both[0]._kv))
    assert made[0][0] == made[1][0]
    assert any(guess.tokens for guess in made[0][0][0][0])
    for layer, other in zip(made[0][1], made[1][1], strict=True):
        torch.testing.assert_close(layer, other, rtol=0, atol=0)


def test_rows_that_need_more_go_one_by_one(native: NativeOps) -> None:
    pair = Pair(native, torch.float32, SPEC.vocab_size)
    params = SamplingParams(max_tokens=50, temperature=0, repetition_penalty=1.5)
    pair.both[0]._sampler.slots.admit(2, params, 0, 5)
    while True:  # until all have caught up
        chained, single = pair.propose({1: 4, 2: 4}, 0.0)
        if all(guess.tokens for guess in chained):
            break
    assert [g.tokens for g in chained] == [g.tokens for g in single]


@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drafted_ahead_is_what_would_be_drafted_late(
    native: NativeOps, dtype: torch.dtype, chained: bool
) -> None:
    """Whatever comes: all drafts and the guess after them, one of them replaced by what was thought
    of, or anything else. Drafts, and keys and values of what is read, are those of a drafter that
    waits to see."""
    pair = Pair(native, dtype, SPEC.vocab_size)
    pair.runner.chain = pair.chain if chained else None
    ahead, late = pair.both
    rng = random.Random(8)
    hits = {"all": 0, "branch": 0}
    for _ in range(40):
        slots = [slot for slot in pair.tokens if rng.random() < 0.8]
        asks = [Ask(slot, pair.tokens[slot], 4, 4) for slot in slots]
        least = rng.choice((0.0, 0.05))
        found = ahead.propose(asks, least)
        for a, b in zip(found, late.propose(asks, least), strict=True):
            assert a.tokens == b.tokens
            assert a.confidence == pytest.approx(b.confidence, rel=1e-4, abs=1e-5)
        ahead.forget()
        ahead.foresee(asks, [guess.tokens for guess in found])
        expected = {slot: dict(seen.outcomes) for slot, seen in ahead._foreseen.items()}
        for slot, guess in zip(slots, found, strict=True):
            outcomes = list(expected.get(slot, {}))
            if outcomes and rng.random() < 0.8:
                came = list(rng.choice(outcomes))
                hits["all" if len(came) == len(guess.tokens) + 1 else "branch"] += 1
            else:
                right = rng.randrange(len(guess.tokens) + 1)
                came = [*guess.tokens[:right], rng.randrange(SPEC.vocab_size)]
            fed = [pair.tokens[slot][-1], *guess.tokens]
            padded = came + [-1] * (len(fed) - len(came))
            for drafter in pair.both:
                drafter.verified(slot, fed, padded)
            pair.tokens[slot] += came
        if any(len(text) > LENGTH for text in pair.tokens.values()):
            break
    assert min(hits.values()) > 10, hits
    size = PAGE
    for layer, other in zip(ahead._kv, late._kv, strict=True):
        for slot in pair.tokens:
            upto = min(d.followed.computed[slot] for d in pair.both)
            for position in range(upto):
                page = ahead._slots.pages[slot][position // size]
                a, b = layer[page, :, :, position % size], other[page, :, :, position % size]
                torch.testing.assert_close(a, b, rtol=0, atol=0)
