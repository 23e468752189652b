"""Pages of mixed formats under everything a scheduler does with them.

A real scheduler and the worker of packed.py: a real pool with layers of different formats.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from kernels.kv import turned
from kernels.kv.presets import NAMES, LayerPages, packed_format
from kernels.kv.windows import Windows
from scheduler import choices
from scheduler.pages import PagePool
from scheduler.plan import StepPlan, StepResult
from scheduler.prefix import HashChain, Link, PrefixIndex, chain_root
from scheduler.scheduler import Scheduler
from tests.fakes import KVCorruptedError, Script, extend
from tests.scheduler.driving import Pair, assert_exact, gather, greedy, pair, request
from tests.worker import packed
from tests.worker.packed import DIM, HEADS, SIZES, WINDOWS, PackedWorker, Reads, formats, owner
from worker.kv_pool import copy_pages
from worker.window_pages import WindowPages

OPERATIONS = 25_000  # on pages, for each mix and each of four seeds
KEPT = 8  # latest positions that are never demoted
# By mix: the tokens that texts may have in common, and all that they may have.
LENGTHS = {"codes": (30, 60), "windows": (60, 96), "halves": (30, 60)}
every_mix = pytest.mark.parametrize("mix", SIZES)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small here, and threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Watch:
    """Counts operations on pages, and remembers the text of every page that was ever named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations = 0
        self._texts: dict[bytes, tuple[bytes, int]] = {}  # digest -> its root, the whole text
        self._owners: dict[bytes, list[int]] = {}
        take, pin, drop, demote = PagePool.take, PagePool.pin, PagePool.drop, PagePool.demote
        register = PrefixIndex.register

        def counting_take(pool: PagePool, count: int) -> tuple[int, ...]:
            self.operations += count
            return take(pool, count)

        def counting_pin(pool: PagePool, pages: Sequence[int]) -> None:
            self.operations += len(pages)
            pin(pool, pages)

        def counting_drop(pool: PagePool, pages: Sequence[int], fence: int | None) -> None:
            self.operations += len(pages)
            drop(pool, pages, fence)

        def counting_demote(pool: PagePool, page: int) -> int:
            self.operations += 1
            return demote(pool, page)

        def naming(index: PrefixIndex, page: int, link: Link) -> None:
            self._name(link)
            register(index, page, link)

        monkeypatch.setattr(PagePool, "take", counting_take)
        monkeypatch.setattr(PagePool, "pin", counting_pin)
        monkeypatch.setattr(PagePool, "drop", counting_drop)
        monkeypatch.setattr(PagePool, "demote", counting_demote)
        monkeypatch.setattr(PrefixIndex, "register", naming)

    def _name(self, link: Link) -> None:
        root, text = self._texts.get(link.parent, (link.parent, 0))
        owners = []
        for token in memoryview(link.content).cast("i"):
            text = extend(text, token)
            owners.append(owner(root, text))
        self._texts[link.digest], self._owners[link.digest] = (root, text), owners

    def check(self, both: Pair) -> None:
        """Every page that a prefix could hit, on the device and in host memory, holds its text; and
        no page is lost."""
        memory, worker = both.scheduler._memory, both.worker
        assert isinstance(worker, PackedWorker)
        assert memory.host is not None
        tiers = [(memory.pool, memory._index, worker.pool)]
        tiers.append((memory.host._pool, memory.host._index, worker.host_pool))
        for pages, index, pool in tiers:
            held = {page for page in range(1, pages.total + 1) if pages.held(page)}
            if pages is memory.pool:
                held |= halved(both.scheduler)
            assert pages.available + pages.fenced + len(held) == pages.total
            found = {page: self._owners[link.digest] for page, link in index._link_of.items()}
            worker.check(pool, Reads(found, found))
        if (near := worker.windows) is not None:
            copies = near.table[near.table > 0].tolist()
            assert len(copies) == len(set(copies)) == near.count - 1 - near.free


def halved(scheduler: Scheduler) -> set[int]:
    """Pages half of which, or both halves, somebody holds."""
    places = [page for sequence in scheduler._running for page in sequence.pages]
    return {~page >> 1 for page in places if page < 0}


def mixed(rng: random.Random, mix: str, **config) -> Pair:
    size, length = SIZES[mix], LENGTHS[mix][1]
    names = "/".join(layer.name for layer in formats(mix))
    asked = {
        "num_pages": 1 + rng.choice([2, 3, 4]) * length // size,
        "page_size": size,
        "slots": rng.randint(8, 16),
        "budget": rng.randint(32, 96),
        "max_len": length,
        "depth": rng.randint(0, 3),
        "drafts": rng.choice([1, 4, 6]),
        "host_pages": rng.choice([8, 80, 400]),
        "prefix_block": WINDOWS.block if mix == "windows" else 0,
        "demote_all_but": KEPT if mix == "halves" else None,
        "hash_root": chain_root(names.encode()),
    }
    both = pair(policy=greedy(), script=Script(acceptance=0.6), **{**asked, **config})
    both.worker = PackedWorker.of(both.scheduler.config, mix, both.worker.script)
    return both


@every_mix
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2, 3))]
)
def test_random_operations_leak_nothing_and_serve_nobody_elses_page(
    mix: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^5 operations on pages with all seeds: submissions, aborts, pauses, demotions, drafts,
    settled steps. `Scheduler.check` runs after each, and looks for every page."""
    rng, watch = random.Random(seed), Watch(monkeypatch)
    seen: Counter[str] = Counter()
    while watch.operations < OPERATIONS:
        both = mixed(rng, mix)
        stem = [rng.randrange(50) for _ in range(LENGTHS[mix][0])]
        todo = [
            request(
                f"r{i}",
                stem[: rng.randrange(len(stem))] + [rng.randrange(50) for _ in range(5)],
                rng.randint(1, 20),
                seed=i,
                arrival=float(i),
                n=rng.choice([1, 1, 2]),
                tenant=rng.choice(["", "", "a"]),
                cache_salt=rng.choice([b"", b"", b"salt"]),
            )
            for i in range(120)
        ]
        items = list(todo)
        while todo or both.scheduler.has_work():
            for _ in range(rng.randrange(5)):
                if todo:
                    both.add(todo.pop())
            if rng.random() < 0.05:
                both.abort(rng.choice(items).id)
            if rng.random() < 0.1 and both.in_flight:
                both.settle()
            both.step()
            if rng.random() < 0.05:
                watch.check(both)
        both.finish()
        watch.check(both)
        assert_exact(gather(both.outputs), items, both.worker.script)
        load = both.scheduler.load()
        seen += Counter(
            hits=load.prefix_hits,
            preemptions=load.preemptions,
            out=load.pages_swapped_out,
            back=load.pages_swapped_in,
            drafts=load.accepted_tokens,
            demoted=load.pages_demoted,
        )
    for what in ("hits", "preemptions", "out", "back", "drafts"):
        assert seen[what] > 20, what
    assert (seen["demoted"] > 100) == (mix == "halves")


def few_requests(mix: str, **config) -> Pair:
    """Two tenants with the same prompt, one after the other."""
    both = mixed(random.Random(1), mix, **config)
    for i, tenant in enumerate(("a", "b", "a")):
        both.add(request(f"r{i}", range(30), 4, seed=i, tenant=tenant))
        both.finish()
    return both


@every_mix
def test_the_same_text_of_another_tenant_is_computed_anew(mix: str) -> None:
    hits = few_requests(mix).scheduler.load().prefix_hits
    assert 0 < hits < 30, "the third has hit the first, the second nobody"


@every_mix
def test_a_page_of_another_tenant_is_noticed(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a scheduler that hashes no tenant."""
    monkeypatch.setattr(choices, "HashChain", lambda root, size: HashChain(b"", size))
    with pytest.raises(KVCorruptedError, match="a page of"):
        few_requests(mix)


def crowd(mix: str, **config) -> Pair:
    """With little room, so that much is saved, paused and demoted."""
    both = mixed(random.Random(1), mix, **config)
    both.add(*(request(f"r{i}", [i] * 30, 25, seed=i, arrival=i) for i in range(20)))
    return both


@every_mix
def test_a_page_that_is_saved_too_late_is_noticed(
    mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: host memory gets what the page's next owner has written."""
    execute, watch = PackedWorker.execute, Watch(monkeypatch)

    def late(worker: PackedWorker, plan: StepPlan) -> StepResult:
        result = execute(worker, plan)
        copy_pages(worker.pool, worker.host_pool, plan.saves)
        return result

    monkeypatch.setattr(PackedWorker, "execute", late)
    both = crowd(mix, demote_all_but=None)  # pauses, where else pages would be demoted

    def run() -> None:
        while both.step() is not None:
            watch.check(both)

    with pytest.raises(KVCorruptedError, match="a page of"):
        run()


def test_a_prefix_that_ends_within_a_block_is_noticed() -> None:
    """Negative control: of the block that goes on there are no dense copies."""
    with pytest.raises(KVCorruptedError, match=r"a page of .*dense"):
        few_requests("windows", prefix_block=0)


def test_dense_copies_that_are_given_back_too_soon_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: a page is sealed from what is left of them."""
    settle = WindowPages.settle
    monkeypatch.setattr(WindowPages, "settle", lambda pages, slot, n: settle(pages, slot, n + 8))
    with pytest.raises(KVCorruptedError, match="a page of"):
        crowd("windows").finish()


def test_halves_that_stay_where_they_were_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: nothing is copied when a page is demoted into another's half."""
    monkeypatch.setattr(packed, "copy_halves", lambda kv, copies: None)
    with pytest.raises(KVCorruptedError, match="a page of"):
        crowd("halves").finish()


def test_names_of_formats_tell_bits_seeds_and_means_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """They make the root of all hashes of a server. `fp8` has no seed, for nothing is rotated."""
    pages = LayerPages(HEADS, 32, DIM, windows=Windows(5, 32))
    means = [None, torch.zeros(HEADS, DIM), torch.ones(HEADS, DIM)]
    made = []
    for seed in (turned.SEED, turned.SEED + 1):
        monkeypatch.setattr(turned, "SEED", seed)
        for mean in means:
            made += [packed_format(name, replace(pages, key_mean=mean)).name for name in NAMES]
    assert len(made) == 2 * 3 * len(NAMES)
    assert len(set(made)) == len(made) - 3
    for mix in SIZES:
        layers = formats(mix)
        assert len({layer.name for layer in layers}) == len(layers)
