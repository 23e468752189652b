"""NativeLinear against fp64 arithmetic, and against itself with other rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.cpu.build import build, find_toolchain
from kernels.cpu.library import Library
from kernels.cpu.linear import NativeLinear

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module", params=["vectors", "tiles"])
def library(
    request: pytest.FixtureRequest,
    native_library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Library:
    """As built for this machine, and with AMX emulated, which takes another path."""
    if request.param == "tiles":
        toolchain = find_toolchain()
        emulating = replace(toolchain, flags=(*toolchain.flags, "-DNATIVE_EMULATED_TILES"))
        found = Library(str(build(tmp_path_factory.mktemp("tiles"), emulating)))
        assert found.has_tiles()
        return found
    return Library(str(native_library))


@DTYPES
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (6, 33), (64, 32), (130, 320), (320, 201)])
def test_linear_matches_wide_arithmetic(
    library: Library, dtype: torch.dtype, bias: bool, inputs: int, outputs: int
) -> None:
    g = torch.Generator().manual_seed(inputs)
    weight = torch.randn(outputs, inputs, generator=g).to(dtype)
    shift = torch.randn(outputs, generator=g).to(dtype) if bias else None
    layer = NativeLinear(library, weight, shift)
    for rows in (1, 2, 12, 13, 40, 97):
        x = torch.randn(rows, inputs, generator=g).to(dtype)
        exact = x.double() @ weight.double().T + (0 if shift is None else shift.double())
        bound = x.double().abs() @ weight.double().abs().T + 1
        wide = layer(x, wide=True)
        assert wide.dtype == torch.float32
        assert ((wide - exact).abs() / bound).max() < 1e-6
        assert torch.equal(layer(x), wide.to(dtype))


@DTYPES
def test_a_row_is_the_same_beside_any_others(
    library: Library, dtype: torch.dtype, threads: None
) -> None:
    g = torch.Generator().manual_seed(0)
    layer = NativeLinear(library, torch.randn(430, 256, generator=g).to(dtype))
    x = torch.randn(210, 256, generator=g).to(dtype)
    torch.set_num_threads(1)
    together = layer(x)
    for count in (1, 3):
        torch.set_num_threads(count)
        for rows in (1, 2, 3, 11, 12, 25, 210):
            for begin in range(0, 210, max(rows, 70)):
                assert torch.equal(layer(x[begin : begin + rows]), together[begin : begin + rows])


def test_a_weight_kept_in_bf16_gives_the_bits_of_fp32(library: Library) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(70, 130, generator=g).bfloat16().float()
    wide = weight.clone()
    wide[-1, 0] = 1 + 2**-20  # no bf16: the whole weight stays in fp32
    bias = torch.randn(70, generator=g)
    narrow, kept = NativeLinear(library, weight, bias), NativeLinear(library, wide, bias)
    assert narrow.packed.shape[0] * 2 == kept.packed.shape[0]
    for rows in (1, 5, 40):
        x = torch.randn(rows, 130, generator=g)
        assert torch.equal(narrow(x)[:, :-1], kept(x)[:, :-1])
    odd = NativeLinear(library, torch.ones(4, 3))
    assert torch.equal(odd(torch.ones(2, 3)), torch.full((2, 4), 3.0))


def test_leading_dimensions_and_strides(library: Library) -> None:
    g = torch.Generator().manual_seed(0)
    weight, x = (
        torch.randn(40, 16, generator=g),
        torch.randn(16, 5, 3, generator=g).permute(2, 1, 0),
    )
    found = NativeLinear(library, weight)(x)
    torch.testing.assert_close(found, x @ weight.T)
    assert NativeLinear(library, weight)(x[:0]).shape == (0, 5, 40)


def test_a_wrong_input_is_refused(library: Library) -> None:
    layer = NativeLinear(library, torch.zeros(4, 8))
    with pytest.raises(ValueError, match="8 features"):
        layer(torch.zeros(2, 6))
    with pytest.raises(ValueError, match="8 features"):
        layer(torch.zeros(2, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="even input"):
        NativeLinear(library, torch.zeros(4, 7, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="fp32"):
        NativeLinear(library, torch.zeros(4, 8, dtype=torch.float16))
