"""Pages of mixed formats under everything a scheduler does with them.

A real scheduler, a real pool with layers of different formats, and a worker whose "model" writes
keys and values that say whose they are: of which text up to which token, for which tenant and salt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from kernels.kv.codec import Affine
from kernels.kv.format import DENSE, KVFormat
from kernels.kv.paged import Paged
from kernels.kv.rotation import SEED
from scheduler import choices
from scheduler.pages import PagePool
from scheduler.plan import StepPlan, StepResult
from scheduler.prefix import HashChain, Link, PrefixIndex, chain_root
from tests.e2e.test_exactness import CPU, SPEC
from tests.fakes import KVCorruptedError, Script, ScriptedWorker, _Slot, extend
from tests.scheduler.driving import Pair, assert_exact, gather, greedy, pair, request
from worker.kv_pool import allocate_host_pool, allocate_pool, copy_pages

HEADS, DIM, SIZE = 2, 32, 2  # a page holds few positions, so that pages change hands often
OWNERS = 4096  # a key stands for one of so many, a value for another
OPERATIONS = 25_000  # on pages, for each of four seeds
EVERY = 4  # of so many steps what one reads is looked at


def formats() -> list[KVFormat]:
    """Of the layers: the ends have more bits, as served."""
    mean = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(1))
    eight, four = Affine(8), Affine(4)
    return [
        Paged(HEADS, SIZE, DIM, eight, eight, rotated=True, key_mean=mean),
        Paged(HEADS, SIZE, DIM, four, four, rotated=True, key_mean=mean),
        DENSE,
    ]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small here, and threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Owners:
    """A key and a value for each owner, and as the layers' formats store them."""

    def __init__(self, layers: Sequence[KVFormat]) -> None:
        generator = torch.Generator().manual_seed(2)
        self.keys, self.values = torch.randn(2, OWNERS, HEADS, DIM, generator=generator)
        self.stored = []
        for layer in layers:
            shift = layer.key_mean if isinstance(layer, Paged) else None
            keys = self.keys if shift is None else self.keys - shift
            self.stored.append((layer.turn(keys), layer.turn(self.values)))

    def check(self, pool: Sequence[Tensor], layers: Sequence[KVFormat], found: Pages) -> None:
        """Raises `KVCorruptedError` unless these pages hold what their owners wrote."""
        if not found:
            return
        pages = torch.tensor([list(found)])
        owners = torch.tensor([[*each, *[-1] * (SIZE - len(each))] for each in found.values()])
        owners = owners.flatten()
        known = owners >= 0
        key, value = (owners % OWNERS)[known], (owners // OWNERS)[known]
        for kv, layer, (keys, values) in zip(pool, layers, self.stored, strict=True):
            written = keys[key], values[value]
            for part, right in zip(layer.gather(kv, pages), written, strict=True):
                wrong = part[0].transpose(0, 1)[known] - right
                # Two of them are 2 apart by this measure, four bits cost a hundredth.
                if (wrong.square().sum(-1) > 0.7 * right.square().sum(-1)).any():
                    raise KVCorruptedError(f"a page of {layer.name}")


Pages = dict[int, list[int]]  # page -> the owners of its first positions


def owner(group: bytes, name: int) -> int:
    """`group` stands for model, format, tenant and salt; `name` for the text up to a token."""
    return hash((int.from_bytes(group[:8], "little"), name)) % OWNERS**2


@dataclass(slots=True)
class PackedWorker(ScriptedWorker):
    """A scripted worker that keeps a real pool beside its lists, and checks both."""

    layers: list[KVFormat] = field(default_factory=formats)
    pool: list[Tensor] = field(default_factory=list)
    host_pool: list[Tensor] = field(default_factory=list)
    owners: Owners | None = None
    written: dict[int, int] = field(default_factory=dict)  # position in the pool -> owner
    read: Pages = field(default_factory=dict)

    def __post_init__(self) -> None:
        super(PackedWorker, self).__post_init__()
        spec = replace(SPEC, num_layers=len(self.layers), num_kv_heads=HEADS, head_dim=DIM)
        self.pool = allocate_pool(spec, self.num_pages, SIZE, torch.float32, CPU, self.layers)
        self.host_pool = allocate_host_pool(self.pool, 1 + self.host_pages)
        self.owners = Owners(self.layers)

    def execute(self, plan: StepPlan) -> StepResult:
        copy_pages(self.pool, self.host_pool, plan.saves)
        for admit in plan.admits:
            copy_pages(self.host_pool, self.pool, admit.loads)
        self.written, self.read = {}, {}
        result = super(PackedWorker, self).execute(plan)
        assert self.owners is not None
        slots = torch.tensor(list(self.written))
        who = torch.tensor(list(self.written.values()))
        keys, values = self.owners.keys[who % OWNERS], self.owners.values[who // OWNERS]
        for kv, layer in zip(self.pool, self.layers, strict=True):
            layer.append(keys, values, kv, slots)
        if len(self.plans) % EVERY == 0:
            self.owners.check(self.pool, self.layers, self.read)
        return result

    def _write(self, slot: _Slot, start: int) -> None:
        super(PackedWorker, self)._write(slot, start)
        for i in range(start, len(slot.tokens)):
            place = slot.pages[i // SIZE] * SIZE + i % SIZE
            assert place not in self.written, "two rows write to one position"
            self.written[place] = owner(slot.admit.group, slot.names[i])

    def _read(self, slot: _Slot, length: int) -> None:
        """Other rows' writes come first here, and must not be where this one reads."""
        super(PackedWorker, self)._read(slot, length)
        if len(self.plans) % EVERY:
            return
        for first in range(0, length, SIZE):
            names = slot.names[first : min(first + SIZE, length)]
            owners = [owner(slot.admit.group, name) for name in names]
            known = self.read.setdefault(slot.pages[first // SIZE], owners)
            if len(owners) > len(known):
                self.read[slot.pages[first // SIZE]] = owners


class Watch:
    """Counts operations on pages, and remembers the text of every page that was ever named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.operations = 0
        self._texts: dict[bytes, tuple[bytes, int]] = {}  # digest -> its root, the whole text
        self._owners: dict[bytes, list[int]] = {}
        take, pin, drop = PagePool.take, PagePool.pin, PagePool.drop
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

        def naming(index: PrefixIndex, page: int, link: Link) -> None:
            self._name(link)
            register(index, page, link)

        monkeypatch.setattr(PagePool, "take", counting_take)
        monkeypatch.setattr(PagePool, "pin", counting_pin)
        monkeypatch.setattr(PagePool, "drop", counting_drop)
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
        assert worker.owners is not None
        assert memory.host is not None
        tiers = [(memory.pool, memory._index, worker.pool)]
        tiers.append((memory.host._pool, memory.host._index, worker.host_pool))
        for pages, index, pool in tiers:
            held = sum(map(pages.held, range(1, pages.total + 1)))
            assert pages.available + pages.fenced + held == pages.total
            found = {page: self._owners[link.digest] for page, link in index._link_of.items()}
            worker.owners.check(pool, worker.layers, found)


def mixed(rng: random.Random) -> Pair:
    both = pair(
        num_pages=1 + rng.choice([60, 80, 120]),
        page_size=SIZE,
        slots=rng.randint(8, 16),
        budget=rng.randint(32, 96),
        max_len=60,
        depth=rng.randint(0, 3),
        drafts=rng.choice([1, 4, 6]),
        policy=greedy(),
        script=Script(acceptance=0.6),
        host_pages=rng.choice([8, 80, 400]),
        hash_root=chain_root("/".join(layer.name for layer in formats()).encode()),
    )
    config, script = both.scheduler.config, both.worker.script
    both.worker = PackedWorker(config.num_pages, SIZE, config.host_pages, script)
    return both


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2, 3))]
)
def test_random_operations_leak_nothing_and_serve_nobody_elses_page(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10^5 operations on pages with all seeds: submissions, aborts, pauses, drafts, settled steps.
    `Scheduler.check` runs after each, and looks for every page."""
    rng, watch = random.Random(seed), Watch(monkeypatch)
    seen: Counter[str] = Counter()
    while watch.operations < OPERATIONS:
        both = mixed(rng)
        stem = [rng.randrange(50) for _ in range(30)]
        todo = [
            request(
                f"r{i}",
                stem[: rng.randrange(30)] + [rng.randrange(50) for _ in range(5)],
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
        )
    for what in ("hits", "preemptions", "out", "back", "drafts"):
        assert seen[what] > 20, what


def few_requests() -> Pair:
    """Two tenants with the same prompt, one after the other."""
    both = mixed(random.Random(1))
    for i, tenant in enumerate(("a", "b", "a")):
        both.add(request(f"r{i}", range(30), 4, seed=i, tenant=tenant))
        both.finish()
    return both


def test_the_same_text_of_another_tenant_is_computed_anew() -> None:
    hits = few_requests().scheduler.load().prefix_hits
    assert 0 < hits < 30, "the third has hit the first, the second nobody"


def test_a_page_of_another_tenant_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a scheduler that hashes no tenant."""
    monkeypatch.setattr(choices, "HashChain", lambda root, size: HashChain(b"", size))
    with pytest.raises(KVCorruptedError, match="a page of"):
        few_requests()


def test_a_page_that_is_saved_too_late_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: host memory gets what the page's next owner has written."""
    execute, watch = PackedWorker.execute, Watch(monkeypatch)

    def late(worker: PackedWorker, plan: StepPlan) -> StepResult:
        result = execute(worker, plan)
        copy_pages(worker.pool, worker.host_pool, plan.saves)
        return result

    monkeypatch.setattr(PackedWorker, "execute", late)
    both = mixed(random.Random(1))  # with little room, so that much is saved
    both.add(*(request(f"r{i}", [i] * 30, 25, seed=i, arrival=i) for i in range(20)))

    def run() -> None:
        while both.step() is not None:
            watch.check(both)

    with pytest.raises(KVCorruptedError, match="a page of"):
        run()


def test_names_of_formats_tell_bits_seeds_and_means_apart() -> None:
    """They make the root of all hashes of a server."""
    names = [layer.name for layer in formats()]
    assert len(set(names)) == len(names)
    assert all(f"r{SEED}" in name for name in names[:-1])
    eight = Affine(8)
    means = [None, torch.zeros(HEADS, DIM), torch.ones(HEADS, DIM)]
    made = [Paged(HEADS, SIZE, DIM, eight, eight, rotated=True, key_mean=mean) for mean in means]
    assert len({form.name for form in made}) == 3
