"""The Triton kernels over packed pages against the torch forms: on a GPU, or interpreted."""

import dataclasses
import math
import os
import random

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.kv.codec import Affine
from kernels.kv.format import dense_rows
from kernels.kv.pack import unpack
from kernels.kv.paged import Paged
from kernels.kv.windows import Windows
from kernels.ops import AttentionBatch, AttentionLayer
from tests.kernels.batches import Rows, demote, moved

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.attention import packed_triton, split
from kernels.interpreter import mend
from kernels.kv import append_triton

mend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CODECS = {
    "int8n": (Affine(8), Affine(8)),
    "k8v4": (Affine(8), Affine(4)),
    "int4h": (Affine(4), Affine(4)),
    "int4h64": (Affine(4, group=64), Affine(4, group=64)),
    "k4v2h": (Affine(4), Affine(2, clip=1.5)),
    "int2h": (Affine(2, clip=1.5), Affine(2, clip=1.5)),
    "k8v2g32": (Affine(8), Affine(2, group=32, clip=1.5)),
    "k2g32v8": (Affine(2, group=32), Affine(8)),
}


@dataclasses.dataclass
class Case:
    """A layer with filled pages."""

    layer: AttentionLayer
    rows: Rows
    kv: Tensor
    generator: torch.Generator
    dtype: torch.dtype

    @classmethod
    def make(
        cls,
        codecs: str,
        lengths: list[int],
        *,
        kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 64,
        page_size: int = 16,
        window: int | None = None,
        dense: Windows | None = None,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        halves: bool = False,
    ) -> "Case":
        generator = torch.Generator().manual_seed(seed)
        keys, values = CODECS[codecs]
        paged = Paged(
            kv_heads,
            page_size,
            head_dim,
            keys,
            values,
            rotated=True,
            windows=dense,
            halves=halves,
        )
        rows = Rows.shuffled(lengths, page_size, generator)
        behind = dense_rows(paged, rows.num_pages, kv_heads, page_size, head_dim, dtype)
        # Whatever was there before: numbers that are NaN among it.
        shape = (rows.num_pages + behind, paged.layout.bytes)
        kv = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
        heads = kv_heads * group
        layer = AttentionLayer(
            heads, kv_heads, head_dim, head_dim**-0.5, None, window=window, kv=paged
        )
        case = cls(layer, rows, kv, generator, dtype)
        batch = case.step([(row, 0, length) for row, length in enumerate(lengths)])
        k, v = case.keys_and_values(sum(lengths))
        paged.append(k, v, kv, batch.kv_slots, batch.copies)
        return case

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(DEVICE, self.dtype)

    def keys_and_values(self, tokens: int) -> tuple[Tensor, Tensor]:
        shape = (tokens, self.layer.num_kv_heads, self.layer.head_dim)
        return self.random(*shape), self.random(*shape)

    def queries(self, batch: AttentionBatch) -> Tensor:
        tokens = batch.positions.shape[0]
        return self.random(tokens, self.layer.num_heads, self.layer.head_dim)

    def step(self, spans: list[tuple[int, int, int]]) -> AttentionBatch:
        return moved(self.rows.step(spans), DEVICE)

    def attend(self, q: Tensor, batch: AttentionBatch, length: int | None = None) -> Tensor:
        paged = self.layer.kv
        parts = packed_triton.attend(paged.turn(q), self.kv, self.layer, batch, length)
        return paged.turn_back(split.merge(parts, q.dtype))

    def clean(self, batch: AttentionBatch) -> Tensor:
        """The pool with numbers on the null page of dense ones, which the reference multiplies."""
        paged, kv = self.layer.kv, self.kv.clone()
        if paged.windows is not None:
            paged.dense(kv, batch.copies.count, self.dtype)[0] = 0.0
        return kv

    def check(self, spans: list[tuple[int, int, int]], length: int | None = None) -> None:
        self.check_batch(self.step(spans), length)

    def check_batch(self, batch: AttentionBatch, length: int | None) -> None:
        q = self.queries(batch)
        expected = attend_reference(q, self.clean(batch), self.layer, batch).float()
        within = {torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}[self.dtype]
        found = self.attend(q, batch, length).float()
        torch.testing.assert_close(found, expected, atol=within, rtol=within)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_drafts_and_a_chunk(codecs: str, head_dim: int):
    if head_dim == 64 and "g" in codecs and "g32" not in codecs:
        pytest.skip("one group, as without")
    case = Case.make(codecs, [33, 70, 17], head_dim=head_dim, group=2)
    case.check([(0, 32, 33), (1, 66, 70), (2, 14, 17)], length=64)
    case.check([(1, 60, 70), (0, 32, 33)], length=64)


@pytest.mark.parametrize("codecs", ["int8n", "int4h64", "k4v2h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits(codecs: str, dtype: torch.dtype):
    case = Case.make(codecs, [33, 70], head_dim=128, dtype=dtype)
    case.check([(0, 32, 33), (1, 65, 70)], length=64)


@pytest.mark.parametrize("seed", range(12))
def test_random_steps(seed: int):
    """Lengths about pages' ends, any groups, page sizes and windows."""
    rng = random.Random(seed)
    page_size = rng.choice([16, 32, 64])
    lengths = [
        rng.choice([1, 2, page_size - 1, page_size, page_size + 1, rng.randint(1, 150)])
        for _ in range(rng.randint(1, 4))
    ]
    case = Case.make(
        rng.choice(list(CODECS)),
        lengths,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 3, 4]),
        page_size=page_size,
        head_dim=128,
        window=rng.choice([None, 1, 7, 70]),
        seed=seed,
    )
    spans = []
    for row, length in enumerate(lengths):
        count = rng.choice([1, 1, 3, 20])
        spans.append((row, max(length - count, 0), length))
    rng.shuffle(spans)
    case.check(spans, rng.choice([64, 128, None]))


@pytest.mark.parametrize("seed", range(16))
def test_random_windows(seed: int):
    """Sinks, blocks and sliding windows of all sorts, rows over the ends of blocks. Where no row
    may read dense, the table names a page that holds no numbers."""
    rng = random.Random(seed)
    page_size = rng.choice([16, 32])
    windows = Windows(rng.choice([0, 5, 64, 100]), rng.choice([0, 1, 2, 4]) * page_size)
    lengths = [rng.choice([1, 16, 130, rng.randint(1, 300)]) for _ in range(rng.randint(1, 4))]
    case = Case.make(
        rng.choice(list(CODECS)),
        lengths,
        kv_heads=rng.choice([1, 2]),
        group=rng.choice([1, 2, 4]),
        page_size=page_size,
        head_dim=128,
        window=rng.choice([None, None, 7, 70]),
        dense=windows,
        dtype=rng.choice([torch.float32, torch.bfloat16]),
        seed=seed,
    )
    spans = [(row, max(n - rng.choice([1, 1, 5, 70]), 0), n) for row, n in enumerate(lengths)]
    rng.shuffle(spans)
    batch = case.step(spans)
    assert batch.copies is not None
    for row, (_, start, stop) in enumerate(spans):  # as `WindowPages` keeps them
        held = [*range(min(windows.sink, stop)), *range(windows.begin(start), stop)]
        held += range(start, stop)
        pages = {at // page_size for at in held}
        gone = [i for i in range(batch.copies.table.shape[1]) if i not in pages]
        batch.copies.table[row, gone] = 0
    case.layer.kv.dense(case.kv, batch.copies.count, case.dtype)[0] = torch.nan
    case.check_batch(batch, rng.choice([64, 128, None]))


@pytest.mark.parametrize("windows", [Windows(20, 32), Windows(40, 0)])
def test_a_chunk_with_windows_is_its_parts(windows: Windows):
    case = Case.make("k4v2h", [200], kv_heads=1, group=4, head_dim=128, dense=windows)
    q = case.queries(case.step([(0, 20, 200)]))
    whole = case.attend(q, case.step([(0, 20, 200)]), 64)
    parts = [(20, 60), (60, 61), (61, 66), (66, 200)]
    found = [case.attend(q[a - 20 : b - 20], case.step([(0, a, b)]), 64) for a, b in parts]
    torch.testing.assert_close(torch.cat(found), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_chunks_of_several_blocks_after_a_history(window: int | None):
    case = Case.make("k8v4", [100, 30, 90], kv_heads=1, group=4, window=window)
    case.check([(0, 40, 100), (1, 29, 30), (2, 0, 45)], length=64)


def test_few_dimensions():
    case = Case.make("k8v4", [20, 3], head_dim=32)
    case.check([(0, 19, 20), (1, 0, 3)])


def test_what_is_read_coarsely():
    fine = Case.make("int8n", [40, 20])
    layer = dataclasses.replace(fine.layer, kv=fine.layer.kv.coarse())
    coarse = dataclasses.replace(fine, layer=layer)
    coarse.check([(0, 38, 40), (1, 19, 20)])
    batch = fine.step([(0, 39, 40)])
    q = fine.queries(batch)
    assert not torch.allclose(coarse.attend(q, batch), fine.attend(q, batch), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coarse", [False, True])
def test_pages_of_which_some_are_halves(coarse: bool, dtype: torch.dtype):
    lengths = [150, 70, 33]
    whole = Case.make("int8n", lengths, dtype=dtype, halves=True)
    rng = random.Random(5)
    for share in (0.3, 1.0):
        kv, table = demote(whole.kv, whole.rows.page_table, share, rng)
        assert (table < 0).any()
        form = whole.layer.kv.coarse() if coarse else whole.layer.kv
        layer = dataclasses.replace(whole.layer, kv=form)
        rows = Rows(whole.rows.page_size, table)
        some = dataclasses.replace(whole, layer=layer, rows=rows, kv=kv)
        some.check([(0, 149, 150), (1, 69, 70), (2, 30, 33)], length=64)
        some.check([(0, 100, 150), (2, 0, 33)])


def test_several_splits_are_one():
    case = Case.make("int4h", [150, 10], kv_heads=1)
    batch = case.step([(0, 148, 150), (1, 9, 10)])
    q = case.layer.kv.turn(case.queries(batch))
    one = packed_triton.attend(q, case.kv, case.layer, batch, 192)
    several = packed_triton.attend(q, case.kv, case.layer, batch, 64)
    assert several.out.shape[0] == 3
    assert (several.lse[1:, 2] == -torch.inf).all(), "the short row has nothing there"
    together = (several.lse * math.log(2)).logsumexp(0) / math.log(2)
    torch.testing.assert_close(together, one.lse[0])
    torch.testing.assert_close(split.merge(several, q.dtype), split.merge(one, q.dtype))


def test_nothing_of_a_merge_is_nan():
    out = torch.full((3, 2, 1, 16), torch.nan, device=DEVICE)
    out[1, 0] = 2.0
    lse = torch.full((3, 2, 1), -torch.inf, device=DEVICE)
    lse[1, 0] = -3.0
    merged = split.merge(split.Partials(out, lse), torch.float32)
    assert torch.equal(merged[0], torch.full_like(merged[0], 2.0))
    assert torch.equal(merged[1], torch.zeros_like(merged[1]))


@pytest.mark.parametrize("codecs", ["int8n", "int4h"])
def test_a_token_does_not_depend_on_its_batch(codecs: str):
    """Nor on whether there are few rows to be multiplied together."""
    case = Case.make(codecs, [100, 130], kv_heads=1)
    alone = case.step([(0, 99, 100)])
    q = case.queries(alone)
    with_others = case.step([(1, 120, 130), (0, 99, 100)])
    both = torch.cat([case.random(10, *q.shape[1:]), q])
    found = case.attend(both, with_others, 64)[10]
    torch.testing.assert_close(found, case.attend(q, alone, 64)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_a_chunk_is_its_parts(window: int | None):
    case = Case.make("k8v4", [90], kv_heads=1, group=4, window=window)
    q = case.queries(case.step([(0, 20, 90)]))
    whole = case.attend(q, case.step([(0, 20, 90)]), 64)
    first = case.attend(q[:37], case.step([(0, 20, 57)]), 64)
    second = case.attend(q[37:], case.step([(0, 57, 90)]), 64)
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=1e-5, rtol=1e-5)


def test_splits_are_whole_tiles():
    case = Case.make("k8v4", [20])
    batch = case.step([(0, 19, 20)])
    with pytest.raises(ValueError, match="whole tiles"):
        case.attend(case.queries(batch), batch, 100)


@pytest.mark.parametrize("codecs", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_writes_the_bytes_of_the_torch_form(codecs: str, dtype: torch.dtype):
    case = Case.make(codecs, [21, 30], head_dim=128, dtype=dtype)
    paged = case.layer.kv
    paged.key_mean = torch.randn(2, 128, generator=case.generator).to(DEVICE)
    batch = case.step([(0, 3, 21), (1, 29, 30)])
    # Keys and values as they come: side by side, so that tokens lie further apart than heads.
    wide = case.random(19, 3 * 2, 128)
    wide[0] = 0.0
    wide[1] *= 1e4
    wide[2] *= 1e-4
    k, v = wide[:, 2:4], wide[:, 4:]
    expected, found = case.kv.clone(), case.kv.clone()
    paged.append(k, v, expected, batch.kv_slots)
    append_triton.append(paged, k, v, found, batch.kv_slots)
    check_pages(paged, found, expected)


@pytest.mark.parametrize("codecs", ["int8n", "k4v2h"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_append_writes_dense_copies(codecs: str, dtype: torch.dtype):
    case = Case.make(codecs, [21, 30], head_dim=128, dtype=dtype, dense=Windows(8, 16))
    paged = case.layer.kv
    paged.key_mean = torch.randn(2, 128, generator=case.generator).to(DEVICE)
    batch = case.step([(0, 3, 21), (1, 29, 30)])
    k, v = case.keys_and_values(19)
    expected, found = case.kv.clone(), case.kv.clone()
    paged.append(k, v, expected, batch.kv_slots, batch.copies)
    append_triton.append(paged, k, v, found, batch.kv_slots, batch.copies)
    count = case.rows.num_pages
    check_pages(paged, found[:count], expected[:count])
    assert torch.equal(found[count:], expected[count:])
    assert not torch.equal(found[count:], case.kv[count:])


def test_append_to_pages_that_can_be_demoted():
    case = Case.make("int8n", [21, 30], halves=True)
    batch = case.step([(0, 3, 21), (1, 29, 30)])
    k, v = case.keys_and_values(19)
    expected, found = case.kv.clone(), case.kv.clone()
    case.layer.kv.append(k, v, expected, batch.kv_slots)
    append_triton.append(case.layer.kv, k, v, found, batch.kv_slots)
    check_pages(case.layer.kv, found, expected)


def check_pages(paged: Paged, found: Tensor, expected: Tensor) -> None:
    """Equal, and on a GPU, whose roots and quotients may differ in the last place, nearly so."""
    if DEVICE == "cpu":
        assert torch.equal(found, expected)
        return
    ours, theirs = ([*paged._planes(pool)] for pool in (found, expected))
    numbers = [planes.pop(2).contiguous().view(torch.int16).int() for planes in (ours, theirs)]
    assert (numbers[0] - numbers[1]).abs().max() <= 1
    for side, codec in enumerate((paged.keys, paged.values)):
        bits = min(codec.bits, 4)
        codes = [unpack(planes[side], bits).int() for planes in (ours, theirs)]
        if codec.bits == 8:
            low = (unpack(planes[2 + side], bits) for planes in (ours, theirs))
            codes = [16 * high + rest for high, rest in zip(codes, low, strict=True)]
        off = (codes[0] - codes[1]).abs()
        assert off.max() <= 1
        assert (off > 0).float().mean() <= 1e-3


def test_append_without_rotation():
    case = Case.make("k8v4", [21])
    plain = Paged(2, 16, 64, *CODECS["k8v4"], rotated=False)
    batch = case.step([(0, 3, 21)])
    k, v = case.keys_and_values(18)
    expected, found = case.kv.clone(), case.kv.clone()
    plain.append(k, v, expected, batch.kv_slots)
    append_triton.append(plain, k, v, found, batch.kv_slots)
    check_pages(plain, found, expected)


@pytest.mark.parametrize(
    ("head_dim", "codecs"),
    [(96, "k8v4"), (16, "int4h"), (32, "int2h")],
)
def test_what_it_does_not_take(head_dim: int, codecs: str):
    paged = Paged(2, 16, head_dim, *CODECS[codecs], rotated=True)
    with pytest.raises(ValueError, match=r"do not take|power of two"):
        packed_triton.attend_launch(paged, 1, 1, False, torch.float32)
