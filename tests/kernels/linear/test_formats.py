"""Weights in few bits: what packing, rounding and the plain products must keep."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import quantized, scaled
from kernels.linear.choose import choose_product, quantized_linear
from kernels.linear.dense import DenseLinear
from kernels.linear.formats import FP8, Fp8Format, IntFormat, QuantizedWeight, WeightFormat, join
from kernels.linear.quantized import (
    QuantizedLinear,
    SplitLinear,
    parameter_count,
    reference_product,
    weight_bytes,
)

FORMATS: list[WeightFormat] = [
    IntFormat(8, None),
    IntFormat(8, 128),
    IntFormat(8, None, zero_point=True),
    IntFormat(6, 64),
    IntFormat(6, 128),
    *(IntFormat(4, group, zero) for group in (32, 64, 128) for zero in (False, True)),
    Fp8Format(None),
    Fp8Format(128),
]
each_format = pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)


def matrix(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    """With outputs of very different sizes, one of zeros, and a column that stands out."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=g) * torch.logspace(-3, 3, outputs)[:, None]
    weight[:, 3] *= 8
    weight[outputs // 2] = 0.0
    return weight


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("seed", range(5))
def test_codes_survive_packing(bits: int, seed: int) -> None:
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    group = rng.choice([8, 32, 64, 128])
    outputs, groups = rng.randint(1, 40), rng.randint(1, 5)
    codes = torch.randint(1 << bits, (outputs, groups * group), generator=g).to(torch.uint8)
    form = IntFormat(bits, group)
    weight = form.weight(codes, torch.ones(outputs, groups))
    assert torch.equal(form.codes(weight), codes)
    assert sum(plane.nbytes for plane in weight.planes) * 8 == codes.numel() * bits


def test_where_the_halves_of_a_group_lie() -> None:
    """The layout that kernels read, and that int6 checkpoints are stored in."""
    codes = torch.arange(64).to(torch.uint8)[None]
    low, high = IntFormat(6, 64).weight(codes, torch.ones(1, 1)).planes
    for byte in range(32):
        assert int(low[0, byte]) == (byte & 15) | ((byte + 32) & 15) << 4
    for byte in range(16):
        parts = [(byte + 16 * i) >> 4 for i in range(4)]
        assert int(high[0, byte]) == sum(part << 2 * i for i, part in enumerate(parts))


@each_format
def test_no_number_is_off_by_more_than_half_a_step(form: WeightFormat) -> None:
    weight = matrix(24, 256)
    found = form.quantize(weight)
    off = (found.dequantize() - weight).abs()
    step = found.scales.float().repeat_interleave(form.group or 256, 1)
    if isinstance(form, Fp8Format):
        # Three bits behind the point, and below the smallest normal number steps of 2**-9.
        assert (off <= torch.maximum(weight.abs() / 16, step / 512) * 1.0001).all()
    else:
        # The scale is rounded to bf16, which moves the largest code by 2**-9 of itself.
        assert isinstance(form, IntFormat)
        # A rounded zero point may push the numbers at one end half a step further.
        most = 1.0 if form.zero_point else 0.5
        assert (off <= step * (most + 2.0 ** (form.bits - 9) + 1e-4)).all()
    assert (found.dequantize()[12] == 0).all()


@each_format
def test_parts_of_outputs_are_parts(form: WeightFormat) -> None:
    weight = matrix(20, 256)
    whole = form.quantize(weight)
    first, second = form.quantize(weight[:13]), form.quantize(weight[13:])
    joined = join([first, second])
    assert joined is not None
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert torch.equal(whole.rows(5, 9).dequantize(), whole.dequantize()[5:9])


def test_what_is_not_alike_is_not_joined() -> None:
    weight = matrix(8, 256)
    four, eight = IntFormat(4, 64).quantize(weight), IntFormat(8, 64).quantize(weight)
    turned = IntFormat(4, 64).weight(
        IntFormat(4, 64).codes(four), four.scales, order=torch.arange(255, -1, -1)
    )
    assert join([four, eight]) is None
    assert join([four, turned]) is None
    assert join([turned, turned]) is not None
    assert join([four, IntFormat(4, 64).quantize(weight[:, :128])]) is None


@each_format
@pytest.mark.parametrize("tile", [256, 1000, 1 << 22])
def test_the_product_is_that_of_the_numbers(
    form: WeightFormat, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "TILE", tile)
    weight = form.quantize(matrix(24, 256))
    bias = torch.randn(24, generator=torch.Generator().manual_seed(1))
    layer = quantized_linear(weight, bias, torch.float32)
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(2))
    expected = F.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-3, rtol=1e-4)
    assert layer(x.bfloat16()[:, :0]).shape == (2, 0, 24)


def test_columns_in_an_order_of_their_own() -> None:
    g = torch.Generator().manual_seed(0)
    form, order = IntFormat(4, 32), torch.randperm(128, generator=g)
    plain = matrix(16, 128)
    stored = form.quantize(plain[:, order])
    weight = form.weight(form.codes(stored), stored.scales, order=order)
    assert torch.equal(weight.dequantize()[:, order], stored.dequantize())
    x = torch.randn(5, 128, generator=g)
    layer = quantized_linear(weight, None, torch.float32)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, atol=1e-2, rtol=1e-4)


def test_split_projections_stand_side_by_side() -> None:
    weight = matrix(24, 128)
    first = DenseLinear(nn.Parameter(weight[:8], requires_grad=False))
    second = QuantizedLinear(IntFormat(8, None).quantize(weight[8:]), None, reference_product)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    found = SplitLinear([first, second])(x)
    assert torch.equal(found, torch.cat([first(x), second(x)], -1))


def test_a_model_weighs_what_its_codes_weigh() -> None:
    layer = quantized_linear(IntFormat(4, 128).quantize(matrix(64, 256)), None, torch.float32)
    assert weight_bytes(layer) == 64 * 256 // 2 + 64 * 2 * 2
    assert parameter_count(layer) == 64 * 256


@pytest.mark.parametrize(("bits", "group"), [(3, 128), (4, None), (6, None), (4, 12)])
def test_formats_there_are_not(bits: int, group: int | None) -> None:
    with pytest.raises(ValueError, match="bits"):
        IntFormat(bits, group)


def test_inputs_that_are_not_whole_groups() -> None:
    with pytest.raises(ValueError, match="100 inputs are not whole groups of 64"):
        IntFormat(4, 64).quantize(torch.zeros(4, 100))
    with pytest.raises(ValueError, match="do not fit"):
        IntFormat(8, 64).weight(torch.zeros(4, 128, dtype=torch.uint8), torch.ones(4, 1))


def fp8_rows(outputs: int, inputs: int) -> QuantizedWeight:
    g = torch.Generator().manual_seed(0)
    return Fp8Format(None).quantize(torch.randn(outputs, inputs, generator=g))


def test_rows_are_quantised_by_their_own_scale() -> None:
    x = matrix(6, 64)
    codes, scales = scaled.quantize_rows(x)
    assert codes.dtype == FP8
    assert codes.float().isfinite().all()
    torch.testing.assert_close(codes.float() * scales, x, atol=0.0, rtol=2**-4 + 1e-6)


@pytest.mark.skipif(
    not scaled.takes(fp8_rows(32, 64), torch.bfloat16), reason="this torch has no fp8 product here"
)
def test_the_fp8_product_is_that_of_the_codes() -> None:
    weight = fp8_rows(32, 64)
    x = matrix(6, 64).bfloat16()
    codes, scales = scaled.quantize_rows(x)
    expected = (codes.float() * scales) @ weight.dequantize().T
    found = scaled.scaled_product(x, weight)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=1e-3, rtol=2e-2)


def test_what_the_fp8_product_does_not_take() -> None:
    assert not scaled.takes(fp8_rows(32, 64), torch.float32)
    assert not scaled.takes(fp8_rows(24, 64), torch.bfloat16)
    assert not scaled.takes(IntFormat(8, None).quantize(matrix(32, 64)), torch.bfloat16)
    assert choose_product(fp8_rows(32, 64), torch.bfloat16) is reference_product
