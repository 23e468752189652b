"""Speculation is invisible: every drafter, number of drafts and policy gives the text of none.

The same requests, samplers and model as in test_exactness.py, whose `alone` decodes each by itself.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from kernels.linear.prepare import prepare_linears
from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from scheduler.admission import make_policy
from scheduler.allocation import Option
from scheduler.controller import Controller
from scheduler.request import FinishReason, SchedulerConfig, Speculation
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.speculation import DraftPolicy, FixedDrafts, Rules
from scheduler.step_cost import StepCost
from tests.e2e.driving import drive
from tests.e2e.test_exactness import (
    CELLS,
    CONFIG,
    CONTEXT,
    CPU,
    SPEC,
    VOCAB,
    decoder,
    requests,
    same,
)
from worker.beside import Beside
from worker.drafters.base import Ask, Drafter, Guess
from worker.drafters.model import ModelDrafter
from worker.drafters.registry import MODEL_FREE
from worker.drafters.spans import span_batch
from worker.drafting import Drafting
from worker.executor import ThreadExecutor
from worker.kv_pool import allocate_host_pool, allocate_pool
from worker.runner import EagerRunner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable
from worker.worker import Worker, WorkerFacts

DRAFTERS = ("suffix", "lookup", "recycling", "twin", "stranger", "narrow", "garbage")


class Garbage:
    """Wrong drafts, of all lengths, and now and then a right one by accident."""

    name = "garbage"

    def __init__(self) -> None:
        self._random = random.Random(5)

    def admit(self, slot: int, group: bytes) -> None:
        pass

    def ended(self, slot: int, tokens: list[int], prompt_len: int) -> None:
        pass

    def propose(self, asks: list[Ask], least: float) -> list[Guess]:
        def one(most: int) -> Guess:
            count = self._random.randrange(most + 1)
            return Guess([self._random.randrange(VOCAB) for _ in range(count)], [0.5] * count)

        return [one(ask.most) for ask in asks]

    def verified(self, slot: int, fed: list[int], chosen: list[int]) -> None:
        assert len(fed) == len(chosen)


@cache
def stranger(vocab: int) -> Decoder:
    """Another model, maybe of another vocabulary's size."""
    torch.manual_seed(1)
    model = Decoder(replace(SPEC, num_layers=1, vocab_size=vocab), max_model_len=CONTEXT)
    for target in model.targets().values():
        if target.dim() > 1:
            target.normal_(0.0, 0.5)
        else:
            target.fill_(1.0)
    prepare_linears(model, "invariant")
    return model


def drafter(name: str, slots: SlotTable, sampler: Sampler, pages: int) -> Drafter:
    """A new one. `twin` is the target itself, whose drafts are all right."""
    if name == "garbage":
        return Garbage()
    if name in MODEL_FREE:
        return MODEL_FREE[name]()
    model = decoder() if name == "twin" else stranger(VOCAB if name == "stranger" else 100)
    kv = allocate_pool(model.spec, pages + 12, slots.page_size, torch.float32, CPU)
    vocab, spare = model.spec.vocab_size, range(pages, pages + 12)
    runner = EagerRunner(model, TorchOps())
    return ModelDrafter(runner, kv, slots, sampler, 10**6, vocab, 20, spare_pages=spare)


def worker(config: SchedulerConfig, *names: str, ahead: bool = False) -> Worker:
    slots = SlotTable(config.max_num_seqs + 1, CONTEXT, config.page_size, CPU)
    kv = allocate_pool(SPEC, config.num_pages, config.page_size, torch.float32, CPU)
    sampler = Sampler(SlotSampling(config.max_num_seqs + 1, VOCAB, CPU), slots.tokens)
    drafters = [drafter(name, slots, sampler, config.num_pages) for name in names]
    model = next((d for d in drafters if isinstance(d, ModelDrafter)), None)
    return Worker(
        EagerRunner(decoder(), TorchOps()),
        kv,
        slots,
        sampler,
        ThreadExecutor(1),
        WorkerFacts(VOCAB, CONTEXT, config.num_pages, config.page_size, "cpu", "float32"),
        allocate_host_pool(kv, config.host_pages + 1),
        Drafting(slots, drafters, model, Beside(CPU) if ahead else None),
    )


def check(
    config: SchedulerConfig, sampler: str, drafts: DraftPolicy, *names: str, **how
) -> Scheduler:
    """Runs all requests and compares."""
    scheduler = Scheduler(config, drafts, how.pop("policy", None))
    device = worker(config, *names, ahead=how.pop("ahead", False))
    try:
        found = drive(scheduler, device, requests(sampler), **how)
    finally:
        device.close()
    same(found, sampler)
    load = scheduler.load()
    assert load.pages_held == load.running == 0
    assert load.accepted_tokens <= load.draft_tokens
    drafted = sum(result.finish.drafted for result in found.values() if result.finish)
    assert drafted == load.draft_tokens
    return scheduler


def controller(*names: str) -> Controller:
    numbers = range(len(names))
    options = [Option(tuple(numbers[: n + 1]), True) for n in numbers]
    return Controller(options, names, 5, StepCost.learning())


everywhere = pytest.mark.parametrize("sampler", CELLS)


@everywhere
@pytest.mark.parametrize("name", DRAFTERS)
def test_any_drafter(sampler: str, name: str) -> None:
    scheduler = check(CONFIG, sampler, FixedDrafts(3), name, depth=1, arrivals_per_step=2)
    load = scheduler.load()
    assert load.draft_tokens > 0 or name == "lookup"  # random text hardly repeats itself
    if name == "twin":
        assert load.accepted_tokens > 0.9 * load.draft_tokens
        assert load.steps < 60


@everywhere
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("name", ["suffix", "stranger"])
def test_under_memory_pressure(sampler: str, depth: int, name: str) -> None:
    config = replace(CONFIG, num_pages=34, max_step_tokens=64)
    crowded = make_policy("aggressive", watermark=0.0)
    scheduler = check(config, sampler, FixedDrafts(4), name, depth=depth, policy=crowded)
    assert scheduler.load().preemptions > 0


@everywhere
def test_beside_swapping_and_without_a_prefix_cache(sampler: str) -> None:
    config = replace(CONFIG, num_pages=34, enable_prefix_cache=False, host_pages=60)
    crowded = make_policy("aggressive", watermark=0.0)
    scheduler = check(config, sampler, FixedDrafts(3), "twin", depth=2, policy=crowded)
    assert scheduler.load().pages_swapped_in > 0


@everywhere
def test_chunks_as_small_as_can_be(sampler: str) -> None:
    config = replace(CONFIG, max_step_tokens=9, enable_prefix_cache=False)
    check(config, sampler, FixedDrafts(2), "lookup", "twin")


@everywhere
@pytest.mark.parametrize("names", [("suffix", "stranger"), ("garbage", "twin"), ("recycling",)])
def test_the_controller(sampler: str, names: tuple[str, ...]) -> None:
    check(CONFIG, sampler, controller(*names), *names, arrivals_per_step=3)


@everywhere
def test_lengths_that_change_with_every_step(sampler: str) -> None:
    class Random(FixedDrafts):
        rng = random.Random(9)

        def plan(self, running: list[Sequence], joining: int = 0, unread: int = 0) -> Rules:
            for sequence in running:
                sequence.drafts = self.rng.choice((0, 0, 1, 2, 5))
                sequence.drafters = self.rng.choice(((0,), (1,), (1, 0), (0, 1)))
            chances = (self.rng.random(), self.rng.random())
            return Rules(chances, (3 * self.rng.random(), 0.0))

    check(CONFIG, sampler, Random(), "suffix", "stranger", depth=1, arrivals_per_step=1)


# Who draws, and whether processors look at drafts, makes the differences here.
somewhere = pytest.mark.parametrize("sampler", ["greedy", "penalties"])


@somewhere
@pytest.mark.parametrize(("name", "patience"), [("twin", 0), ("twin", 99), ("narrow", 2)])
def test_drafting_ahead(sampler: str, name: str, patience: int) -> None:
    drafts = FixedDrafts(3, ahead=True, patience=patience)
    scheduler = check(CONFIG, sampler, drafts, name, depth=1, arrivals_per_step=2, ahead=True)
    load = scheduler.load()
    if name == "twin":  # whatever it guesses comes true, and few wait in vain
        assert load.accepted_tokens > 0.9 * load.draft_tokens
        assert load.steps < 60
    if patience < 99:
        assert load.draft_tokens


@somewhere
@pytest.mark.parametrize("depth", [1])
def test_drafting_ahead_under_memory_pressure(sampler: str, depth: int) -> None:
    config = replace(CONFIG, num_pages=34, max_step_tokens=64)
    crowded = make_policy("aggressive", watermark=0.0)
    drafts = FixedDrafts(4, (0, 1), ahead=True, patience=depth)
    how = {"depth": depth, "policy": crowded, "ahead": True}
    scheduler = check(config, sampler, drafts, "suffix", "twin", **how)
    assert scheduler.load().preemptions > 0


@pytest.mark.parametrize("sampler", ["temperature"])
def test_the_controller_drafts_ahead(sampler: str) -> None:
    options = [Option((0,), True), Option((0,), True, ahead=True)]
    policy = Controller(options, ["twin"], 5, StepCost.learning())
    check(CONFIG, sampler, policy, "twin", depth=1, arrivals_per_step=3, ahead=True)


def test_a_request_may_refuse_drafts() -> None:
    plain = Speculation(enabled=False)
    batch = [
        replace(r, speculation=plain) if i % 2 else r for i, r in enumerate(requests("greedy"))
    ]
    scheduler, device = Scheduler(CONFIG, FixedDrafts(3)), worker(CONFIG, "twin")
    found = drive(scheduler, device, batch)
    device.close()
    same(found, "greedy")
    drafted = {name: r.finish.drafted for (name, _), r in found.items() if r.finish is not None}
    refused = {name for name in drafted if int(name[1:]) % 2}
    assert not any(drafted[name] for name in refused)
    assert all(drafted[name] for name in drafted.keys() - refused)


@pytest.mark.parametrize(
    ("name", "ahead"),
    [*((name, False) for name in DRAFTERS), ("twin", True), ("stranger", True), ("narrow", True)],
)
def test_what_is_known_between_steps(name: str, ahead: bool) -> None:
    """Invariants I1 to I7 of batched speculation (EQSPEC, arXiv 2510.22876, and its review): tokens
    committed are contiguous, keys and values reach up to the last token and are those of the text,
    and so are those of the draft model, as far as it has any."""
    config = replace(CONFIG, num_pages=60)
    scheduler = Scheduler(config, FixedDrafts(3, ahead=ahead))
    device = worker(config, name, ahead=ahead)
    drafting, slots = device._drafting, device._slots
    assert drafting is not None
    now = 0.0
    waiting = list(requests("greedy"))
    rng = random.Random(2)
    while waiting or scheduler.has_work():
        now += 1.0
        if waiting and rng.random() < 0.3:
            scheduler.add(waiting.pop(), now)
        if rng.random() < 0.03 and scheduler._running:
            scheduler.abort(
                rng.choice(scheduler._running).request.id, now, reason=FinishReason.ABORT
            )
        plan = scheduler.plan(now)
        if plan is None:
            scheduler.take_outputs()
            continue
        scheduler.settle(plan, device.launch(plan).wait(), now)
        scheduler.check()
        for sequence in scheduler._running:
            if sequence.fed < len(sequence.tokens):
                continue
            slot, known = sequence.slot, len(sequence.tokens)
            assert slots.tokens[slot, :known].tolist() == sequence.tokens
            assert slots.computed[slot] == known - 1 == sequence.computed
            assert drafting._tokens[slot] == sequence.tokens
            assert slots.pages[slot] == sequence.pages
            if drafting.model is not None:
                assert drafting.model.followed.computed[slot] <= known - 1
        if int(now) % 25 == 0:
            for sequence in scheduler._running[:2]:
                compare_kv(device.kv, sequence, decoder())
                if drafting.model is not None:
                    kv, upto = drafting.model._kv, drafting.model.followed.computed[sequence.slot]
                    model = decoder() if name == "twin" else stranger(kv_vocab(name))
                    compare_kv(kv, sequence, model, upto)
    device.close()


def kv_vocab(name: str) -> int:
    return 100 if name == "narrow" else VOCAB


def compare_kv(kv, sequence: Sequence, model: Decoder, upto: int | None = None) -> None:
    """Keys and values of a sequence against those of its text computed in one go."""
    end = sequence.computed if upto is None else upto
    if end == 0:
        return
    slots = SlotTable(2, CONTEXT, 8, CPU)
    fresh = allocate_pool(model.spec, 40, 8, torch.float32, CPU)
    slots.add_pages(1, tuple(range(1, 33)))
    ids = torch.tensor(sequence.tokens[:end]).clamp(max=model.spec.vocab_size - 1)
    EagerRunner(model, TorchOps()).forward(ids, span_batch(slots, [(1, 0, end)]), fresh)
    size = kv[0].shape[3]
    for layer, expected in zip(kv, fresh, strict=True):
        for position in range(end):
            page, offset = divmod(position, size)
            found = layer[sequence.pages[page], :, :, offset]
            wanted = expected[1 + position // 8, :, :, position % 8]
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_every_combination_is_tried() -> None:
    """A reminder: who adds a drafter adds it to this matrix."""
    assert set(MODEL_FREE) <= set(DRAFTERS)
