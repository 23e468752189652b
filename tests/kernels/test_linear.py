"""The forms of a linear layer compute the same thing, each with the property it is there for."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from kernels.linear.dense import DenseLinear
from kernels.linear.invariant import InvariantLinear
from kernels.linear.packed import PackedLinear, packing_works
from kernels.linear.prepare import prepare_linears

packs = pytest.mark.skipif(
    not packing_works(torch.float32), reason="this build of torch has no oneDNN"
)
SHAPES = [(320, 1536), (64, 96), (33, 7), (4096, 48)]


def dense(inputs: int, outputs: int, bias: bool, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(inputs + outputs)
    layer = DenseLinear.empty(inputs, outputs, bias=bias, dtype=dtype)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) / inputs**0.5)
    return layer


class Model(nn.Module):
    """A list of blocks, one of them nested, as decoders have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(dense(16, 24, True, dtype))])
        self.head = dense(24, 40, False, dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](x))


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_equals_dense(shape: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    if not packing_works(dtype):
        pytest.skip(f"no {dtype} on this CPU")
    plain = dense(*shape, bias, dtype)
    packed = PackedLinear(plain)
    for rows in (1, 5, 32, 100):
        x = torch.randn(rows, shape[0], generator=torch.Generator().manual_seed(rows)).to(dtype)
        expected = x.double() @ plain.weight.double().T
        if plain.bias is not None:
            expected += plain.bias.double()
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(packed(x).double(), expected, atol=tolerance, rtol=tolerance)


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_invariant_rows_are_bitwise_alone(shape: tuple[int, int], bias: bool) -> None:
    layer = InvariantLinear(PackedLinear(dense(*shape, bias)))
    x = torch.randn(75, shape[0], generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    assert whole.shape == (75, shape[1])
    for start, stop in ((0, 1), (74, 75), (3, 5), (7, 40), (16, 32)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])
    shuffled = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x[shuffled]), whole[shuffled])


def test_invariant_over_dense_with_whole_columns() -> None:
    """Without oneDNN the property holds where the outputs are a multiple of 16."""
    layer = InvariantLinear(dense(320, 64, True))
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(0))
    whole = layer(x)
    for start, stop in ((0, 1), (39, 40), (3, 20)):
        assert torch.equal(layer(x[start:stop]), whole[start:stop])


@packs
@pytest.mark.parametrize("mode", ["packed", "invariant"])
def test_prepare_replaces_and_releases_every_layer(mode) -> None:
    model = Model(torch.float32)
    x = torch.randn(3, 16)
    before = model(x)
    weights = [weakref.ref(p) for name, p in model.named_parameters() if "weight" in name]
    assert prepare_linears(model, mode) == mode
    gc.collect()
    assert not any(isinstance(m, DenseLinear) for m in model.modules())
    assert all(ref() is None for ref in weights)
    torch.testing.assert_close(model(x), before)


def test_dense_changes_nothing() -> None:
    model = Model(torch.float32)
    assert prepare_linears(model, "dense") == "dense"
    assert sum(isinstance(m, DenseLinear) for m in model.modules()) == 2


def test_packing_falls_back_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.linear.prepare.packing_works", lambda _: False)
    model = Model(torch.float32)
    assert prepare_linears(model, "packed") == "dense"
    assert sum(isinstance(m, DenseLinear) for m in model.modules()) == 2
