"""Products of a few rows by a weight of 8, 6 or 4 bits (and fp8), as a Triton kernel.

When tokens are decoded, reading the weight is what takes the time, so it is read as it is packed,
once, and unpacked in registers. The transpose is computed, weight times x: the weight is then the
operand that a matrix product takes from registers. A program has some outputs and some rows, and
goes through the inputs group by group; a group's sum is scaled once, in fp32:

    sum over groups of scale * (codes . x - zero * sum(x))

Codes are made signed and left at the upper end of a byte: Triton turns int8 into bf16 by moving
bytes, and what they are too large by goes into the scale. Where a matrix has too few outputs to
occupy the device, its inputs are cut into splits, whose sums are added afterwards; how many there
are depends on the matrix alone, so that a row's sums have the same order in any batch.

Not run on hardware yet: it compiles for sm_90 and is tested under Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.kv.triton_launch import Launch
from kernels.linear.formats import Fp8Format, IntFormat, QuantizedWeight
from kernels.linear.quantized import reference_product
from kernels.triton_bytes import shift

# Beyond so many rows arithmetic takes the time: dequantising tiles for a dense product is better.
MOST_ROWS = 64
TILE_OUTPUTS = 64
WHOLE_ROW_TILE = 128  # inputs at a time where the row has one scale
SMALLEST_RUN = 16  # inputs: what a matrix product takes
PROGRAMS = 264  # two for each multiprocessor of an H200
SPLIT_GROUPS = 4  # a split has at least as many


def takes(weight: QuantizedWeight) -> bool:
    """Whether the kernel multiplies by such a weight."""
    group = weight.form.group
    if group is None:
        return True
    return group & (group - 1) == 0 and group // _runs(weight) >= SMALLEST_RUN


def product(x: Tensor, weight: QuantizedWeight) -> Tensor:
    """See `kernels.linear.quantized.Product`. Does not synchronise with the host."""
    rows = x.shape[0]
    if rows > MOST_ROWS:
        return reference_product(x, weight)
    return multiply(x, weight, splits(weight))


def multiply(x: Tensor, weight: QuantizedWeight, parts: int) -> Tensor:
    """x: [rows, in]; `parts`: splits of the inputs. [rows, out] of x's dtype."""
    rows, inputs = x.shape
    x = x.contiguous()
    launch = product_launch(weight, rows)
    outputs, groups = weight.scales.shape
    kind = x.dtype if parts == 1 else torch.float32
    out = torch.empty(parts, rows, outputs, dtype=kind, device=x.device)
    tiles = triton.cdiv(inputs, int(launch.constants["group"]))
    low = weight.planes[0]
    _multiply[
        (
            triton.cdiv(outputs, TILE_OUTPUTS),
            triton.cdiv(rows, int(launch.constants["tile_rows"])),
            parts,
        )
    ](
        x,
        low,
        weight.planes[-1],
        weight.scales,
        low if weight.zeros is None else weight.zeros,
        out,
        rows,
        inputs,
        outputs,
        groups,
        triton.cdiv(tiles, parts),
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out[0] if parts == 1 else out.sum(0).to(x.dtype)


def splits(weight: QuantizedWeight) -> int:
    """Of the inputs, so that there are programs enough."""
    tiles = -(-weight.inputs // (weight.form.group or WHOLE_ROW_TILE))
    wanted = PROGRAMS // max(triton.cdiv(weight.outputs, TILE_OUTPUTS), 1)
    return max(min(wanted, tiles // SPLIT_GROUPS), 1)


def product_launch(weight: QuantizedWeight, rows: int) -> Launch:
    """How the kernel is compiled for a step of so many rows. Raises ValueError if it takes no such
    weight."""
    if not takes(weight):
        raise ValueError(f"this kernel does not take {weight.form.name}")
    constants: dict[str, int | float] = {
        "bits": _bits(weight),
        "group": weight.form.group or WHOLE_ROW_TILE,
        "whole_row": weight.form.group is None,
        "has_zeros": weight.zeros is not None,
        "tile_outputs": TILE_OUTPUTS,
        "tile_rows": 16 if rows <= 16 else 32 if rows <= 32 else 64,
    }
    return Launch(constants, 4, 3)


def _bits(weight: QuantizedWeight) -> int:
    """Of a code; nought for fp8."""
    if isinstance(weight.form, Fp8Format):
        return 0
    assert isinstance(weight.form, IntFormat)
    return weight.form.bits


def _runs(weight: QuantizedWeight) -> int:
    """That a group's inputs are cut into by packing."""
    return {4: 2, 6: 4}.get(_bits(weight), 1)


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    x: tl.tensor,  # [rows, inputs]
    low: tl.tensor,  # [outputs, bytes] uint8, or fp8: codes, or the lower four bits of six
    high: tl.tensor,  # [outputs, bytes] uint8: the upper two bits of six
    scales: tl.tensor,  # [outputs, groups] floating
    zeros: tl.tensor,  # [outputs, groups] uint8
    out: tl.tensor,  # [splits, rows, outputs], written
    rows: tl.tensor,
    inputs: tl.tensor,
    outputs: tl.tensor,
    groups: tl.tensor,
    split_tiles: tl.tensor,  # tiles of `group` inputs in a split
    bits: tl.constexpr,  # 0: fp8
    group: tl.constexpr,  # inputs of a tile
    whole_row: tl.constexpr,  # one scale for all of a row's inputs
    has_zeros: tl.constexpr,
    tile_outputs: tl.constexpr,
    tile_rows: tl.constexpr,
) -> None:
    output = tl.program_id(0) * tile_outputs + tl.arange(0, tile_outputs)
    row = tl.program_id(1) * tile_rows + tl.arange(0, tile_rows)
    part = tl.program_id(2)
    known, wanted = output < outputs, row < rows
    # What lies behind the last output and row reads the last one's and is not written.
    output_at = tl.minimum(output, outputs - 1).to(tl.int64)
    x_at = x + tl.minimum(row, rows - 1).to(tl.int64)[None, :] * inputs
    runs: tl.constexpr = 2 if bits == 4 else 4 if bits == 6 else 1
    run: tl.constexpr = group // runs
    # Codes are signed, and larger than `code - middle` by this.
    up: tl.constexpr = 16 if bits == 4 else 4 if bits == 6 else 1
    middle: tl.constexpr = 8 if bits == 4 else 32 if bits == 6 else 128
    low_width: tl.constexpr = group if runs == 1 else group // 2  # bytes of a group
    low_at = low + (output_at * (inputs // group * low_width if runs > 1 else inputs))[:, None]
    high_at = high + (output_at * (inputs // 4))[:, None]
    inner = tl.arange(0, run)

    sums = tl.zeros((tile_outputs, tile_rows), tl.float32)
    first = part * split_tiles
    last = tl.minimum(first + split_tiles, tl.cdiv(inputs, group))
    for tile in range(first, last):
        begin = tile * group
        found = tl.zeros((tile_outputs, tile_rows), tl.float32)
        total = tl.zeros((tile_rows,), tl.float32)
        for r in tl.static_range(runs):
            at = begin + r * run + inner
            inside = at < inputs  # only of fp8 and 8 bits a tile may be cut off
            rest = tl.load(x_at + at[:, None], mask=inside[:, None], other=0.0)
            if bits == 0:
                codes = tl.load(low_at + at[None, :], mask=inside[None, :], other=0.0)
            elif bits == 8:
                codes = tl.load(low_at + at[None, :], mask=inside[None, :], other=128) ^ 128
                codes = codes.to(tl.int8, bitcast=True)
            elif bits == 4:
                codes = tl.load(low_at + tile * low_width + inner[None, :])
                upper = shift(codes, 4) if r == 0 else codes
                codes = ((upper & 240) ^ 128).to(tl.int8, bitcast=True)
            else:
                codes = tl.load(low_at + tile * low_width + (r % 2) * run + inner[None, :])
                lower = shift(codes, 2 if r < 2 else -2) & 60
                upper = shift(tl.load(high_at + tile * run + inner[None, :]), 6 - 2 * r) & 192
                codes = ((upper | lower) ^ 128).to(tl.int8, bitcast=True)
            # fp32 is multiplied in three parts of tf32, which loses next to nothing.
            found = tl.dot(codes.to(rest.dtype), rest, acc=found, input_precision="tf32x3")
            if has_zeros:
                total += tl.sum(rest.to(tl.float32), 0)
        if whole_row and not has_zeros:
            sums += found
        else:
            number = output_at * groups + (0 if whole_row else tile)
            scale = tl.load(scales + number).to(tl.float32) * (1.0 / up)
            if has_zeros:
                zero = tl.load(zeros + number).to(tl.float32) - middle
                found -= (zero * up)[:, None] * total[None, :]
            sums += found * scale[:, None]
    if whole_row and not has_zeros:
        scale = tl.load(scales + output_at * groups).to(tl.float32) * (1.0 / up)
        sums *= scale[:, None]
    out_at = out + (part * rows + row).to(tl.int64)[None, :] * outputs + output[:, None]
    tl.store(out_at, sums.to(out.dtype.element_ty), mask=known[:, None] & wanted[None, :])
