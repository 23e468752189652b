"""Every KV format against its own decoding of each request alone: token-identical.

What is compared is one format with itself. Between formats texts differ, and tests of the codecs
say by how much keys and values do.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch

from kernels.cpu.build import start_build
from kernels.kv.format import dense_rows
from kernels.kv.presets import HALVES, NAMES, SEALED
from kernels.kv.windows import DensePages
from kernels.torch_ops import TorchOps
from scheduler.admission import make_policy
from scheduler.plan import Row, RowResult
from scheduler.scheduler import Scheduler
from scheduler.sequence import Sequence
from scheduler.speculation import FixedDrafts
from tests.e2e.driving import drive
from tests.e2e.serving import REPOSITORY
from tests.e2e.test_exactness import (
    CONFIG,
    alone,
    decoder,
    filled,
    layers,
    requests,
    run,
    same,
    windowed,
    worker,
)
from worker.drafters.model import ModelDrafter
from worker.drafting import Drafting
from worker.kv_pool import page_bytes
from worker.native import native_runner
from worker.runner import EagerRunner

SAMPLER = "temperature"
# A head of 16 has no groups of 64; elsewhere they are tested as any other. The last two are pages
# that can be demoted, when nothing is, and heads with scales.
FORMATS = [*(name for name in NAMES if name != "int4h64"), "int8n halves", "fp8 scales"]
# Tables of two and three bits are `turbo4` with other numbers: `make exhaustive` has them.
CELLS = [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in ("turbo2", "turbo3") else name
    for name in FORMATS
]
# Native code has a path of its own for dense windows.
NATIVE = ("k4v2h native", "int2h native")
every_reading = pytest.mark.parametrize("how", [*CELLS, *NATIVE])


@cache
def read_by(how: str) -> dict[str, Any]:
    """What `run` and `same` take."""
    kv_format = how.removesuffix(" native")
    if kv_format == how:
        return {"kv_format": kv_format}
    model = filled()
    model.use_formats(layers(kv_format))
    native = start_build(REPOSITORY / ".pytest_cache" / "foresight").result()
    return {"kv_format": kv_format, "runner": native_runner(model, native)}


@every_reading
def test_neighbours_and_prefix_hits(how: str) -> None:
    batch = requests(SAMPLER)
    found, scheduler = run(CONFIG, batch, arrivals_per_step=1, **read_by(how))
    assert scheduler.load().prefix_hits > 100
    same(found, SAMPLER, **read_by(how))


@every_reading
def test_small_chunks_and_drafts(how: str) -> None:
    config = replace(CONFIG, max_step_tokens=14, enable_prefix_cache=False)
    same(run(config, requests(SAMPLER), drafts=2, **read_by(how))[0], SAMPLER, **read_by(how))


@every_reading
def test_preemption_and_drafts(how: str) -> None:
    config = replace(CONFIG, num_pages=26, max_step_tokens=64)
    crowded = make_policy("aggressive", watermark=0.0)
    found, scheduler = run(config, requests(SAMPLER), drafts=3, policy=crowded, **read_by(how))
    assert scheduler.load().preemptions > 0
    same(found, SAMPLER, **read_by(how))


@every_reading
def test_swapping(how: str) -> None:
    config = replace(CONFIG, num_pages=34, enable_prefix_cache=False, host_pages=60)
    crowded = make_policy("aggressive", watermark=0.0)
    found, scheduler = run(config, requests(SAMPLER), policy=crowded, **read_by(how))
    assert scheduler.load().pages_swapped_in > 0
    same(found, SAMPLER, **read_by(how))


@pytest.mark.parametrize("how", NATIVE)
def test_native_code_says_the_same_with_windows(how: str) -> None:
    """At first: a rounding to another cell may change a text of a random model in the end."""
    texts = alone(SAMPLER, **read_by(how)), alone(SAMPLER, how.removesuffix(" native"))
    for key, result in texts[0].items():
        assert result.tokens[:3] == texts[1][key].tokens[:3]


class Watched(FixedDrafts):
    """Notes what became of drafts."""

    proposed = accepted = 0

    def learn(self, sequence: Sequence, row: Row, done: RowResult) -> None:
        self.proposed += done.proposed
        self.accepted += max(len(done.tokens) - 1, 0)


@pytest.mark.parametrize("pages", [200, 34])
@pytest.mark.parametrize("sampler", ["greedy", "penalties"])
@pytest.mark.parametrize("kv_format", HALVES)
def test_drafts_by_half_of_the_bits_change_nothing(
    kv_format: str, sampler: str, pages: int
) -> None:
    """The mode that stays exact: the target drafts for itself on the upper halves of its pages.
    Of the two formats one has dense windows, which drafts do not read."""
    config = windowed(replace(CONFIG, num_pages=pages), kv_format)
    device, drafts = worker(config, kv_format), Watched(4, (0,), ("coarse",))
    slots, sampling = device._slots, device._sampler
    runner = EagerRunner(decoder(kv_format), TorchOps()).coarse()
    coarse = ModelDrafter(runner, device.kv, slots, sampling, 10**6, 160, 20, coarse=True)
    device._drafting = Drafting(slots, [coarse], coarse)
    scheduler = Scheduler(config, drafts, make_policy("aggressive", watermark=0.0))
    try:
        found = drive(scheduler, device, requests(sampler), arrivals_per_step=2)
    finally:
        device.close()
    same(found, sampler, kv_format)
    assert drafts.accepted > 0.5 * drafts.proposed > 100
    assert (scheduler.load().preemptions > 0) == (pages == 34)


def test_formats_are_not_all_the_same() -> None:
    """Otherwise the tests above would compare dense pages with dense pages."""
    texts = {
        name: [result.tokens for _, result in sorted(alone(SAMPLER, name).items())]
        for name in ("auto", "int4h", "int2h", "fp8", "fp8 scales")
    }
    assert texts["int4h"] != texts["auto"]
    assert texts["int2h"] != texts["int4h"]
    assert texts["fp8 scales"] != texts["fp8"]


@pytest.mark.parametrize("kv_format", [cell for cell in CELLS if cell not in tuple(SEALED)])
def test_codes_do_not_depend_on_how_tokens_come(kv_format: str) -> None:
    """Bit for bit the same pages, dense ones too, token by token and in chunks, in any order. What
    sealed pages depend on is in `tests/kernels/kv/test_sealed.py`."""
    form, rng = layers(kv_format)[0], Random(kv_format)
    generator = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 90, 2, 16, generator=generator)
    slots = torch.randperm(12 * 8, generator=generator)[:90]
    rows = 12 + dense_rows(form, 12, 2, 8, 16, torch.float32)
    pools = [torch.zeros(rows, *form.page_shape(2, 8, 16), dtype=torch.uint8) for _ in range(3)]

    def append(pool: torch.Tensor, part: slice) -> None:
        copies = DensePages(torch.zeros(1, 1, dtype=torch.int32), slots[part], 12)
        form.append(k[part], v[part], pool, slots[part], copies)

    append(pools[0], slice(None))
    for i in rng.sample(range(90), 90):
        append(pools[1], slice(i, i + 1))
    for start in range(0, 90, 7):
        append(pools[2], slice(start, start + 7))
    assert pools[0][12:].any() == (form.windows is not None)
    assert torch.equal(pools[0], pools[1])
    assert torch.equal(pools[0], pools[2])


def test_names_tell_apart_what_bytes_depend_on() -> None:
    names = {"/".join(form.name for form in layers(name)) for name in (*FORMATS, "auto")}
    assert len(names) == len(FORMATS) + 1


def test_a_head_that_does_not_suit_a_format_is_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="int4h64 does not fit this model: 16 numbers"):
        layers("int4h64")


def test_fewer_bits_take_fewer_bytes() -> None:
    from tests.e2e.test_exactness import SPEC

    sizes = [
        page_bytes(SPEC, 8, torch.bfloat16, layers(name))
        for name in ("auto", "int8n", "k8v4", "int4h", "k4v2h", "int2h")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)
