"""The penalties as two Triton kernels: `processors.penalize` for a GPU.

They look at as many tokens as a history has, which only the device knows, and at the logits of
these alone. `_count` counts tokens of the output; in `_apply` whoever comes to a token first takes
its count away and changes its logit, so each is changed once, wherever it stands in the history.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch
from kernels.sampling.processors import History, Penalties

PARTS = 16  # programs a row
_TAKEN = tl.constexpr(-1)


def penalize(z: Tensor, rows: Tensor | None, history: History, by: Penalties) -> None:
    """As `processors.penalize`, for a contiguous z. Does not synchronise with the host."""
    count, vocab = len(history.slot), z.shape[1]
    counts = torch.zeros(count, vocab, dtype=torch.int32, device=z.device)
    table, slot = history.table, history.slot.contiguous()
    position, launch = history.position.contiguous(), penalize_launch()
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    _count[(count, PARTS)](
        counts,
        table,
        slot,
        position,
        history.prompt_len.contiguous(),
        vocab,
        table.stride(0),
        **launch.constants,
        **options,
    )
    _apply[(count, PARTS)](
        z,
        rows,
        counts,
        table,
        slot,
        position,
        by.repetition.contiguous(),
        by.frequency.contiguous(),
        by.presence.contiguous(),
        vocab,
        table.stride(0),
        **launch.constants,
        **options,
    )


def penalize_launch() -> Launch:
    return Launch({"parts": PARTS, "tile": 256}, warps=4, stages=1)


@triton.jit
def _count(
    counts: tl.tensor,  # [rows, vocab] int32, added to: occurrences in the output
    table: tl.tensor,  # [slots, width] int32
    slot: tl.tensor,  # [rows] int64
    position: tl.tensor,  # [rows] int64
    prompt_len: tl.tensor,  # [rows] int64
    vocab: tl.tensor,
    table_stride: tl.tensor,
    parts: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row, part = tl.program_id(0), tl.program_id(1)
    history = table + tl.load(slot + row) * table_stride
    end = tl.load(position + row).to(tl.int32)
    first = tl.load(prompt_len + row).to(tl.int32)
    for start in range(first + part * tile, end, parts * tile):
        at = start + tl.arange(0, tile)
        token = tl.load(history + at, mask=at < end, other=0)
        tl.atomic_add(counts + row.to(tl.int64) * vocab + token, 1, mask=at < end)


@triton.jit
def _apply(
    z: tl.tensor,  # [n, vocab] fp32, changed
    rows: tl.tensor | None,  # [rows] int64, rows of z; None: all
    counts: tl.tensor,  # [rows, vocab] int32; those of the history are used up
    table: tl.tensor,
    slot: tl.tensor,
    position: tl.tensor,
    repetition: tl.tensor,  # [rows] fp32
    frequency: tl.tensor,  # [rows] fp32
    presence: tl.tensor,  # [rows] fp32
    vocab: tl.tensor,
    table_stride: tl.tensor,
    parts: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row, part = tl.program_id(0), tl.program_id(1)
    history = table + tl.load(slot + row) * table_stride
    end = tl.load(position + row).to(tl.int32)
    z_row = row.to(tl.int64)
    if rows is not None:
        z_row = tl.load(rows + row)
    factor = tl.zeros((tile,), tl.float32) + tl.load(repetition + row)
    by_each, once = tl.load(frequency + row), tl.load(presence + row)
    for start in range(part * tile, end, parts * tile):
        at = start + tl.arange(0, tile)
        token = tl.load(history + at, mask=at < end, other=0)
        taken = tl.full((tile,), _TAKEN, tl.int32)
        here = counts + row.to(tl.int64) * vocab + token
        count = tl.atomic_xchg(here, taken, mask=at < end)
        first = (at < end) & (count != _TAKEN)
        x = tl.load(z + z_row * vocab + token, mask=first, other=0.0)
        x = tl.where(x > 0, tl.div_rn(x, factor), x * factor)
        x -= by_each * count.to(tl.float32)
        x -= once * (count > 0).to(tl.float32)
        tl.store(z + z_row * vocab + token, x, mask=first)
