"""A worker without a model that keeps real pages: of mixed formats, and checked at every reading.

Its "model" writes keys and values that say whose they are: of which text up to which token, for
which tenant and salt. All formats that can be served are in one of three mixes: those whose tokens
are coded by themselves, those beside dense windows, and pages that can be demoted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.kv.format import DENSE, KVFormat
from kernels.kv.presets import PRESETS, SCALED, SEALED, LayerPages
from kernels.kv.scales import HeadScales
from kernels.kv.turned import Turned
from kernels.kv.windows import DensePages, Windows
from scheduler.plan import StepPlan, StepResult
from scheduler.request import SchedulerConfig
from tests.e2e.test_exactness import CPU, SPEC
from tests.fakes import KVCorruptedError, Script, ScriptedWorker, _Slot
from worker.kv_pool import allocate_host_pool, allocate_pool, copy_halves, copy_pages
from worker.window_pages import WindowPages, dense_page_count

HEADS, DIM = 2, 64
OWNERS = 4096  # a key stands for one of so many, a value for another
EVERY = 4  # of so many steps what one reads is looked at

# By mix: positions in a page, few, so that pages change hands often. Sealed ones cannot have fewer.
SIZES = {"codes": 2, "windows": 8, "halves": 2}
WINDOWS = Windows(5, 16)
GROUP = 8  # numbers that share a scale in pages that are sealed, which have as many positions
SCALES = HeadScales(torch.tensor([1, -3]), torch.tensor([-2, 4]))


def formats(mix: str) -> list[KVFormat]:
    """Of the layers."""
    mean = torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(1))
    pages = LayerPages(HEADS, SIZES[mix], DIM, mean)
    if mix == "codes":
        scales = dict.fromkeys(SCALED, SCALES)
        coded = [p.form(replace(pages, scales=scales.get(name))) for name, p in PRESETS.items()]
        return [*coded, DENSE]
    eight = PRESETS["int8n"]
    if mix == "halves":
        pages = replace(pages, halves=True)
        return [eight.form(pages), eight.form(replace(pages, key_mean=None))]
    near = replace(pages, windows=WINDOWS)
    return [
        eight.form(pages),  # the boundary's has none, as served
        *(replace(preset, group=GROUP).form(near) for preset in SEALED.values()),
        PRESETS["k4v2h"].form(near),
        PRESETS["fp8"].form(replace(near, scales=SCALES)),
    ]


Pages = dict[int, list[int]]  # page -> the owners of its first positions


@dataclass(frozen=True, slots=True)
class Reads:
    """Pages that layers without windows read, that those with windows read packed, and dense."""

    whole: Pages = field(default_factory=dict)
    packed: Pages = field(default_factory=dict)
    dense: Pages = field(default_factory=dict)


def owner(group: bytes, name: int) -> int:
    """`group` stands for model, format, tenant and salt; `name` for the text up to a token."""
    return hash((int.from_bytes(group[:8], "little"), name)) % OWNERS**2


class Owners:
    """A key and a value for each owner, and as the layers' formats store them."""

    def __init__(self, layers: Sequence[KVFormat], page_size: int) -> None:
        self._page_size = page_size
        generator = torch.Generator().manual_seed(2)
        self._keys, self._values = torch.randn(2, OWNERS, HEADS, DIM, generator=generator)
        self._stored = []
        for layer in layers:
            shift = layer.key_mean if isinstance(layer, Turned) else None
            keys = self._keys if shift is None else self._keys - shift
            self._stored.append((layer.turn(keys), layer.turn(self._values)))

    def of(self, owners: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values, [owners, kv_heads, head_dim] each."""
        who = torch.tensor(owners, dtype=torch.int64)
        return self._keys[who % OWNERS], self._values[who // OWNERS]

    def check(
        self, pool: Sequence[Tensor], layers: Sequence[KVFormat], reads: Reads, copies: int = 0
    ) -> None:
        """Raises `KVCorruptedError` unless these pages hold what their owners wrote. `copies`: how
        many dense pages lie behind the others."""
        for i, (kv, layer) in enumerate(zip(pool, layers, strict=True)):
            if layer.windows is None:
                self._check(i, layer, kv, reads.whole, layer.name)
                continue
            self._check(i, layer, kv, reads.packed, layer.name)
            if reads.dense:
                dense = layer.dense(kv, copies, torch.float32)
                self._check(i, DENSE, dense, reads.dense, f"{layer.name}, dense")

    def _check(self, index: int, form: KVFormat, kv: Tensor, found: Pages, what: str) -> None:
        if not found:
            return
        size = self._page_size
        owners = torch.tensor([[*each, *[-1] * (size - len(each))] for each in found.values()])
        owners = owners.flatten()
        known = owners >= 0
        keys, values = self._stored[index]
        written = keys[(owners % OWNERS)[known]], values[(owners // OWNERS)[known]]
        for part, right in zip(form.gather(kv, torch.tensor([list(found)])), written, strict=True):
            wrong = part[0].transpose(0, 1)[known] - right
            # Two of them are 2 apart by this measure, two bits cost an eighth.
            if (wrong.square().sum(-1) > 0.7 * right.square().sum(-1)).any():
                raise KVCorruptedError(f"a page of {what}")


@dataclass(slots=True)
class PackedWorker(ScriptedWorker):
    """A scripted worker that keeps a real pool beside its lists, and checks both."""

    layers: list[KVFormat] = field(default_factory=list)
    pool: list[Tensor] = field(default_factory=list)
    host_pool: list[Tensor] = field(default_factory=list)
    windows: WindowPages | None = None
    reads: Reads = field(default_factory=Reads)
    _written: list[tuple[int, int, int]] = field(default_factory=list)  # owner, place, copy's
    _owners: Owners = field(init=False)

    @classmethod
    def of(cls, config: SchedulerConfig, mix: str, script: Script) -> PackedWorker:
        size, count = config.page_size, config.max_num_seqs + 1
        worker = cls(config.num_pages, size, config.host_pages, script)
        worker.layers = formats(mix)
        copies = 0
        if mix == "windows":
            copies = dense_page_count(WINDOWS, count, size, config.max_step_tokens)
            places = -(-config.max_model_len // size)
            worker.windows = WindowPages(WINDOWS, copies, count, places, size, CPU)
        spec = replace(SPEC, num_layers=len(worker.layers), num_kv_heads=HEADS, head_dim=DIM)
        pages = config.num_pages, size, torch.float32, CPU
        worker.pool = allocate_pool(spec, *pages, worker.layers, copies)
        worker.host_pool = allocate_host_pool(worker.pool, 1 + config.host_pages)
        worker._owners = Owners(worker.layers, size)
        return worker

    def check(self, pool: Sequence[Tensor], reads: Reads) -> None:
        """As `Owners.check`."""
        copies = 0 if self.windows is None else self.windows.count
        self._owners.check(pool, self.layers, reads, copies)

    def execute(self, plan: StepPlan) -> StepResult:
        copy_pages(self.pool, self.host_pool, plan.saves)
        if halves := [d.copy for d in plan.demotions if d.copy is not None]:
            copy_halves(self.pool, halves)
        for admit in plan.admits:
            copy_pages(self.host_pool, self.pool, admit.loads)
            if self.windows is not None:
                self.windows.clear(admit.slot)
                self.windows.cover(admit.slot, 0, min(WINDOWS.sink, len(admit.cached)))
        self._written, self.reads = [], Reads()
        result = super(PackedWorker, self).execute(plan)
        written, self._written = self._written, []
        places = [place for _, place, _ in written]
        assert len(set(places)) == len(places), "two rows write to one position"
        for admit in plan.admits:
            self._recall_sinks(self._slots[admit.slot], len(admit.cached))
        self._append(self._written)
        self._append(written)
        if self._looks():
            self.check(self.pool, self.reads)
        if self.windows is not None:
            for row in plan.rows:
                length = len(self._slots[row.slot].tokens) - row.samples
                self.windows.settle(row.slot, length)
        return result

    def _looks(self) -> bool:
        return len(self.plans) % EVERY == 0

    def _append(self, written: Sequence[tuple[int, int, int]]) -> None:
        if not written:
            return
        owners, places, copies = zip(*written, strict=True)
        keys, values = self._owners.of(owners)
        near = None
        if self.windows is not None:
            near = DensePages(self.windows.table, torch.tensor(copies), self.windows.count)
        for kv, layer in zip(self.pool, self.layers, strict=True):
            layer.append(keys, values, kv, torch.tensor(places), near)

    def _recall_sinks(self, slot: _Slot, cached: int) -> None:
        """Dense copies of the first tokens of a prefix, which comes packed."""
        if self.windows is not None:
            table = self.windows.table[slot.admit.slot].tolist()
            for i in range(min(WINDOWS.sink, cached)):
                copy = table[i // self.page_size] * self.page_size + i % self.page_size
                own = owner(slot.admit.group, slot.names[i])
                self._written.append((own, i % self.page_size, copy))  # in the null page

    def _write(self, slot: _Slot, start: int) -> None:
        super(PackedWorker, self)._write(slot, start)
        size, end, table = self.page_size, len(slot.tokens), [0] * len(slot.pages)
        if self.windows is not None:
            self.windows.cover(slot.admit.slot, start, end)
            table = self.windows.table[slot.admit.slot].tolist()
        for i in range(start, end):
            places = (slot.pages[i // size] * size + i % size, table[i // size] * size + i % size)
            self._written.append((owner(slot.admit.group, slot.names[i]), *places))
        if self.windows is not None and self._looks():
            sink, block = min(WINDOWS.sink, end), WINDOWS.begin(start)
            # The last of these tokens reads most of them packed, the first what is dense before.
            self._see(self.reads.packed, slot, slot.pages, 0, WINDOWS.begin(end - 1))
            self._see(self.reads.dense, slot, table, 0, sink)
            self._see(self.reads.dense, slot, table, block, end)

    def _read(self, slot: _Slot, length: int) -> None:
        """Other rows' writes come first here, and must not be where this one reads."""
        super(PackedWorker, self)._read(slot, length)
        if self._looks():
            self._see(self.reads.whole, slot, slot.pages, 0, length)

    def _see(self, pages: Pages, slot: _Slot, table: Sequence[int], start: int, end: int) -> None:
        """Positions from `start`, which begins a page, on."""
        for first in range(start, end, self.page_size):
            names = slot.names[first : min(first + self.page_size, end)]
            owners = [owner(slot.admit.group, name) for name in names]
            page = table[first // self.page_size]
            if len(owners) > len(pages.setdefault(page, owners)):
                pages[page] = owners
