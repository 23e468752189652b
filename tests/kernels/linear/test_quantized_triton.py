"""The Triton product by weights of few bits against the torch form: on a GPU, or interpreted."""

import dataclasses
import os
import random

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 from the start", allow_module_level=True)
pytest.importorskip("triton")

from kernels.interpreter import mend
from kernels.linear import quantized_triton
from kernels.linear.formats import Fp8Format, IntFormat, QuantizedWeight, WeightFormat
from kernels.linear.quantized import reference_product
from tests.kernels.linear.test_formats import FORMATS

mend()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAKEN = [*FORMATS, Fp8Format(64), IntFormat(8, 32), IntFormat(6, 128, zero_point=True)]
each_format = pytest.mark.parametrize("form", TAKEN, ids=lambda form: form.name)


def random_weight(form: WeightFormat, outputs: int, inputs: int, seed: int) -> QuantizedWeight:
    g = torch.Generator().manual_seed(seed)
    made = form.quantize(torch.randn(outputs, inputs, generator=g) + 0.2)
    planes = tuple(plane.to(DEVICE) for plane in made.planes)
    zeros = None if made.zeros is None else made.zeros.to(DEVICE)
    return dataclasses.replace(made, planes=planes, scales=made.scales.to(DEVICE), zeros=zeros)


def check(
    weight: QuantizedWeight, rows: int, dtype: torch.dtype, parts: int, seed: int = 0
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, weight.inputs, generator=g).to(DEVICE, dtype)
    expected = x.float() @ weight.dequantize().T
    found = quantized_triton.multiply(x, weight, parts)
    assert found.dtype == dtype
    size = expected.abs().max()
    within = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(found.float() / size, expected / size, atol=within, rtol=within)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_rows(form: WeightFormat, dtype: torch.dtype) -> None:
    check(random_weight(form, 80, 512, 0), 5, dtype, 1)


@pytest.mark.parametrize("seed", range(16))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    form = TAKEN[seed % len(TAKEN)]
    inputs = (form.group or rng.choice([16, 40, 128, 200])) * rng.randint(1, 9)
    weight = random_weight(form, rng.choice([1, 16, 63, 64, 65, 150]), inputs, seed)
    rows = rng.choice([1, 2, 15, 16, 17, 33, 64])
    check(weight, rows, torch.float32, rng.choice([1, 1, 2, 3, 7]), seed)


def test_a_row_does_not_depend_on_its_batch() -> None:
    weight = random_weight(IntFormat(4, 64), 70, 512, 0)
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    whole = quantized_triton.product(x, weight)
    torch.testing.assert_close(quantized_triton.product(x[7:8], weight)[0], whole[7])


def test_many_rows_go_the_dense_way(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(IntFormat(4, 64), 70, 128, 0)
    x = torch.randn(quantized_triton.MOST_ROWS + 1, 128).to(DEVICE)
    monkeypatch.setattr(quantized_triton, "multiply", None)
    assert torch.equal(quantized_triton.product(x, weight), reference_product(x, weight))


def test_splits_occupy_the_device_and_have_work() -> None:
    def of(outputs: int, inputs: int) -> int:
        codes = torch.empty(outputs, inputs, dtype=torch.uint8, device="meta")
        scales: Tensor = torch.empty(outputs, inputs // 128, device="meta")
        weight = QuantizedWeight(IntFormat(4, 128), inputs, (codes,), scales)
        return quantized_triton.splits(weight)

    assert of(24576, 4096) == 1
    assert of(4096, 4096) == 4
    assert of(1024, 4096) == 8
    assert of(64, 256) == 1


@pytest.mark.parametrize("form", [IntFormat(6, 32), IntFormat(4, 16), IntFormat(8, 48)])
def test_what_it_does_not_take(form: WeightFormat) -> None:
    weight = random_weight(form, 16, 96, 0)
    assert not quantized_triton.takes(weight)
    with pytest.raises(ValueError, match="does not take"):
        quantized_triton.multiply(torch.ones(1, 96, device=DEVICE), weight, 1)
