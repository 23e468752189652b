"""Several ranks give the text of one: the requests, samplers and model of test_exactness.py.

Ranks are threads here; tests/engine/test_ranks.py has them as processes. The last bits of logits
differ from those of one rank, because sums over inputs are taken in another order; so a token could
differ where two are as good as equal. It does not in these texts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from queue import SimpleQueue

import msgspec
import pytest
import torch
from torch import Tensor

from kernels.linear.prepare import prepare_linears
from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from models.parallel import Collective, Shard
from scheduler.admission import make_policy
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.speculation import FixedDrafts
from tests.e2e.driving import Result, drive
from tests.e2e.test_exactness import (
    CONFIG,
    CONTEXT,
    CPU,
    SPEC,
    VOCAB,
    filled,
    layers,
    requests,
    same,
    slot_table,
    windowed,
)
from worker.drafters.model import ModelDrafter
from worker.drafters.registry import MODEL_FREE
from worker.drafting import Drafting
from worker.executor import ThreadExecutor
from worker.kv_pool import allocate_host_pool, allocate_pool
from worker.process_group import join, listener
from worker.ranks import Command, Follower, Forward, LeadingRunner
from worker.runner import EagerRunner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.worker import Worker, WorkerFacts

pytestmark = pytest.mark.slow

_commands = msgspec.json.Decoder(Command)


def part(whole: dict[str, Tensor], collective: Collective, kv_format: str) -> Decoder:
    """This rank's part of the model of test_exactness.py."""
    model = Decoder(SPEC, dtype=torch.float32, max_model_len=CONTEXT, collective=collective)
    cuts = model.cuts()
    for name, target in model.targets().items():
        target.copy_(whole[name][cuts[name].index] if name in cuts else whole[name])
    prepare_linears(model, "invariant")
    heads = model.spec.num_kv_heads
    assert heads == max(SPEC.num_kv_heads // collective.shard.size, 1)
    model.use_formats(layers(kv_format, heads))
    return model


class Threads:
    """The followers."""

    def __init__(self, size: int, build: Callable[[int], Follower]) -> None:
        self.lost: Future[str] = Future()
        self.told: list[Command] = []
        self._queues: list[SimpleQueue[bytes | None]] = [SimpleQueue() for _ in range(1, size)]
        self._threads = [
            threading.Thread(target=self._follow, args=(build, rank, queue))
            for rank, queue in enumerate(self._queues, 1)
        ]
        for thread in self._threads:
            thread.start()

    def _follow(self, build, rank: int, queue: SimpleQueue) -> None:
        torch.set_num_threads(1)
        follower = build(rank)
        while (line := queue.get()) is not None:
            follower.obey(_commands.decode(line))

    def tell(self, command: Command) -> None:
        self.told.append(command)
        for queue in self._queues:
            queue.put(msgspec.json.encode(command))

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()


def worker(
    config: SchedulerConfig, size: int, drafter: str = "", kv_format: str = "auto"
) -> tuple[Worker, Threads]:
    whole = filled().targets()
    listening = listener()
    port = listening.getsockname()[1]
    slots = slot_table(config, kv_format)
    copies = 0 if slots.windows is None else slots.windows.count

    def pools(model: Decoder) -> tuple[list, list]:
        formats = layers(kv_format, model.spec.num_kv_heads)
        kv = allocate_pool(
            model.spec, config.num_pages, config.page_size, torch.float32, CPU, formats, copies
        )
        return kv, allocate_host_pool(kv, config.host_pages + 1)

    def follower(rank: int) -> Follower:
        collective = join(Shard(rank, size), CPU, port, ordered=True)
        model = part(whole, collective, kv_format)
        runner = EagerRunner(model, TorchOps())
        return Follower(runner, *pools(model), collective, 48, torch.float32, CPU)

    followers = Threads(size, follower)
    collective = join(Shard(0, size), CPU, port, listening, ordered=True)
    model = part(whole, collective, kv_format)
    runner = LeadingRunner(EagerRunner(model, TorchOps()), followers, collective)
    kv, host = pools(model)
    sampler = Sampler(SlotSampling(config.max_num_seqs + 1, VOCAB, CPU), slots.tokens)
    drafting = None
    if drafter in MODEL_FREE:
        drafting = Drafting(slots, [MODEL_FREE[drafter]()])
    elif drafter == "coarse":
        coarse = runner.coarse()
        made = ModelDrafter(coarse, kv, slots, sampler, 10**6, VOCAB, 20, coarse=True)
        drafting = Drafting(slots, [made], made)
    facts = WorkerFacts(VOCAB, CONTEXT, config.num_pages, config.page_size, "cpu", "float32")
    executor = ThreadExecutor(1)
    made = Worker(runner, kv, slots, sampler, executor, facts, host, drafting, followers=followers)
    return made, followers


def run(
    config: SchedulerConfig,
    sampler: str,
    size: int = 2,
    *,
    drafts: int = 0,
    drafter: str = "",
    kv_format: str = "auto",
    crowded: bool = False,
    **how: int,
) -> tuple[dict[tuple[str, int], Result], Scheduler, Threads]:
    policy = make_policy("aggressive", watermark=0.0) if crowded else None
    config = windowed(config, kv_format)
    scheduler = Scheduler(config, FixedDrafts(drafts), policy)
    device, followers = worker(config, size, drafter, kv_format)
    try:
        return drive(scheduler, device, requests(sampler), **how), scheduler, followers
    finally:
        device.close()


@pytest.mark.parametrize("sampler", ["top-p", "bias, bans, minimum"])
def test_neighbours_chunks_and_prefix_hits(sampler: str) -> None:
    config = replace(CONFIG, max_step_tokens=40)
    found, scheduler, _ = run(config, sampler, arrivals_per_step=1)
    assert scheduler.load().prefix_hits > 100
    same(found, sampler)


def test_four_ranks_that_share_two_kv_heads() -> None:
    same(run(CONFIG, "temperature", 4)[0], "temperature")


@pytest.mark.parametrize("sampler", ["greedy", "temperature"])
def test_pages_of_every_rank_are_swapped(sampler: str) -> None:
    config = replace(CONFIG, num_pages=34, host_pages=60, enable_prefix_cache=False)
    found, scheduler, followers = run(config, sampler, crowded=True, depth=2, drafts=2)
    load = scheduler.load()
    assert load.preemptions > 0
    assert load.pages_swapped_in > 0
    assert {type(command).__name__ for command in followers.told} == {"Forward", "Logits", "Copies"}
    same(found, sampler)


def test_drafts_of_rank_0_are_verified_by_all() -> None:
    found, scheduler, _ = run(CONFIG, "penalties", drafts=3, drafter="recycling", depth=1)
    assert scheduler.load().draft_tokens > 0
    same(found, "penalties")


@pytest.mark.parametrize("crowded", [False, True])
@pytest.mark.parametrize("kv_format", ["k4v2h", "int2h", "oscar2"])
def test_dense_windows_on_all_ranks(kv_format: str, crowded: bool) -> None:
    """As below. Prefix hits have the sinks computed again by all."""
    config = replace(CONFIG, num_pages=40 if crowded else 200, max_step_tokens=64)
    found, scheduler, followers = run(
        config, "temperature", drafts=2, kv_format=kv_format, crowded=crowded, arrivals_per_step=1
    )
    load = scheduler.load()
    assert load.prefix_hits > 0
    assert (load.preemptions > 0) == crowded
    assert {
        command.dense_pages > 0 for command in followers.told if isinstance(command, Forward)
    } == {True}
    same(found, "temperature", kv_format, within=0.01)


def test_the_target_drafts_from_its_own_pages_on_all_ranks() -> None:
    """The text of one rank in the same format; a last bit may decide between two codes of a key."""
    found, scheduler, followers = run(
        CONFIG, "temperature", drafts=3, drafter="coarse", kv_format="int8n"
    )
    load = scheduler.load()
    assert load.accepted_tokens > 0.5 * load.draft_tokens > 0
    assert {command.coarse for command in followers.told if hasattr(command, "coarse")} == {
        True,
        False,
    }
    same(found, "temperature", "int8n", within=0.01)
