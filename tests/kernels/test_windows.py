"""Attention over packed pages with dense windows, against all packed and all dense values held: in
torch and in native code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.paged import attend_reference
from kernels.kv.codec import Affine
from kernels.kv.format import dense_rows
from kernels.kv.paged import Paged
from kernels.kv.windows import Windows
from kernels.ops import AttentionLayer, Ops
from kernels.torch_ops import TorchOps
from tests.kernels.batches import Rows
from tests.kernels.test_attention import TOLERANCE, layer, ragged_steps

DIM = 16


@pytest.fixture(scope="module", params=["torch", "native"])
def ops(request: pytest.FixtureRequest) -> Ops:
    return TorchOps() if request.param == "torch" else request.getfixturevalue("native")


def windowed(
    heads: tuple[int, int], page_size: int, sink: int, block: int, window: int | None = None
) -> AttentionLayer:
    form = Paged(
        *(heads[1], page_size, DIM, Affine(4), Affine(2, clip=1.5)),
        rotated=True,
        key_mean=torch.linspace(-1, 1, heads[1] * DIM).view(heads[1], DIM),
        windows=Windows(sink, block),
    )
    return replace(layer(*heads, DIM, window), kv=form)


def pool(rows: Rows, shape: AttentionLayer, dtype: torch.dtype) -> torch.Tensor:
    """Pages that nobody owns hold what some pattern of bits stands for."""
    form, heads = shape.kv, shape.num_kv_heads
    behind = dense_rows(form, rows.num_pages, heads, rows.page_size, DIM, dtype)
    size = (rows.num_pages + behind, *form.page_shape(heads, rows.page_size, DIM))
    return torch.full(size, 0x3A, dtype=torch.uint8)


def attend_both(
    q: torch.Tensor,
    dense: Sequence[torch.Tensor],
    packed: Sequence[torch.Tensor],
    shape: AttentionLayer,
    start: int,
    windows: Windows,
) -> torch.Tensor:
    """q: [queries, heads, dim] fp32 at `start`, ...; keys and values of all positions, as they are
    kept dense and as they are read packed: [positions, kv_heads, dim] fp32. One softmax."""
    out = torch.empty_like(q)
    at, of_key = start + torch.arange(len(q))[:, None], torch.arange(len(dense[0]))
    hidden = of_key > at if shape.window is None else (of_key > at) | (at - of_key >= shape.window)
    near = (of_key < windows.sink).expand(len(q), -1)
    if windows.block:
        near = near | (of_key // windows.block == at // windows.block)
    for head in range(shape.num_heads):
        of = head * shape.num_kv_heads // shape.num_heads
        scores = [q[:, head] @ keys[:, of].T for keys, _ in (dense, packed)]
        chosen = torch.where(near, *scores) * shape.scale
        weights = chosen.masked_fill(hidden, -torch.inf).softmax(-1)
        out[:, head] = (weights * near) @ dense[1][:, of] + (weights * ~near) @ packed[1][:, of]
    return out


def brute_force(q, k, v, shape: AttentionLayer, start: int, windows: Windows) -> torch.Tensor:
    """q: [queries, heads, DIM] at `start`, ...; k, v: [positions, kv_heads, DIM]. One softmax."""
    form = shape.kv
    assert isinstance(form, Paged)
    assert form.rotation is not None
    turned = form.rotation.forth(k.float() - form.key_mean), form.rotation.forth(v.float())
    packed = [c.decode(c.encode(x)) for c, x in zip((form.keys, form.values), turned, strict=True)]
    dense = [x.to(k.dtype).float() for x in turned]
    return form.turn_back(attend_both(form.turn(q).float(), dense, packed, shape, start, windows))


@settings(max_examples=15, deadline=None)
@given(
    spans=ragged_steps(),
    page_size=st.sampled_from([1, 8, 16]),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2)]),
    sink=st.sampled_from([0, 5, 64, 200]),
    blocks=st.sampled_from([0, 1, 2, 8, 17]),
    window=st.sampled_from([None, None, 7, 150]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_matches_brute_force(
    ops, spans, page_size, heads, sink, blocks, window, dtype, seed
) -> None:
    g = torch.Generator().manual_seed(seed)
    windows = Windows(sink, blocks * page_size)
    shape = windowed(heads, page_size, sink, windows.block, window)
    rows = Rows.shuffled([start + query for start, query in spans], page_size, g)
    ends = [(i, start, start + n) for i, (start, n) in enumerate(spans)]
    texts = [torch.randn(2, end, heads[1], DIM, generator=g).to(dtype) for _, _, end in ends]
    kv = pool(rows, shape, dtype)
    whole = rows.step([(i, 0, end) for i, _, end in ends])
    ops.append(*torch.cat(texts, dim=1), shape, kv, whole)
    batch = rows.step(ends)
    q = torch.randn(len(batch.positions), heads[0], DIM, generator=g).to(dtype)
    expected = torch.cat(
        [
            brute_force(part, *text, shape, start, windows)
            for part, text, (_, start, _) in zip(
                q.split([n for _, n in spans]), texts, ends, strict=True
            )
        ]
    )
    tolerance = {"atol": 3 * TOLERANCE[dtype], "rtol": 3 * TOLERANCE[dtype]}
    for found in (ops.attend(q, kv, shape, batch), attend_reference(q, kv, shape, batch)):
        torch.testing.assert_close(found.float(), expected, **tolerance)


@pytest.mark.parametrize(("sink", "block"), [(0, 128), (64, 128), (5, 48), (40, 0)])
def test_a_token_does_not_depend_on_its_step(ops: Ops, sink: int, block: int) -> None:
    """fp32: bitwise the same alone, in a chunk of any size, and beside any neighbours."""
    g = torch.Generator().manual_seed(7)
    shape, length = windowed((4, 2), 16, sink, block), 400
    rows = Rows.shuffled([length, 500, 40], 16, g)
    kv = pool(rows, shape, torch.float32)
    for i, end in ((0, length), (1, 500), (2, 40)):
        k, v = torch.randn(2, end, 2, DIM, generator=g)
        ops.append(k, v, shape, kv, rows.step([(i, 0, end)]))
    q = torch.randn(length, 4, DIM, generator=g)
    whole = ops.attend(q, kv, shape, rows.step([(0, 0, length)]))
    assert whole.isfinite().all()
    for size in (1, 3, 17, 100):
        for start in (0, 127, 128, length - size):
            stop = min(start + size, length)
            for before, after in (([], []), ([(1, 100, 101)], [(2, 0, 40)]), ([(1, 0, 500)], [])):
                batch = rows.step([*before, (0, start, stop), *after])
                n = sum(b - a for _, a, b in before)
                m = sum(b - a for _, a, b in after)
                others = torch.randn(n + m, *q.shape[1:], generator=g)
                mixed = torch.cat([others[:n], q[start:stop], others[n:]])
                found = ops.attend(mixed, kv, shape, batch)[n : n + stop - start]
                assert torch.equal(found, whole[start:stop]), (size, start, before)


def test_packed_pages_do_not_change_with_windows(ops: Ops) -> None:
    """What is shared and kept is the same, whatever is dense beside it."""
    g = torch.Generator().manual_seed(1)
    rows = Rows.shuffled([100], 16, g)
    k, v = torch.randn(2, 100, 2, DIM, generator=g)
    shape = windowed((4, 2), 16, 20, 32)
    assert isinstance(shape.kv, Paged)
    kv, plain = pool(rows, shape, torch.float32), pool(rows, shape, torch.float32)
    batch = rows.step([(0, 0, 100)])
    ops.append(k, v, shape, kv, batch)
    bare = windowed((4, 2), 16, 0, 0).kv
    assert isinstance(bare, Paged)
    bare.windows = None
    bare.append(k, v, plain, batch.kv_slots)
    assert torch.equal(kv[: rows.num_pages], plain[: rows.num_pages])
    assert not torch.equal(kv[rows.num_pages :], plain[rows.num_pages :])


def test_less_than_no_window_is_refused() -> None:
    with pytest.raises(ValueError, match="less than none"):
        Windows(-1, 16)
