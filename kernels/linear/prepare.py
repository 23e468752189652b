"""Chooses the form of a loaded model's linear layers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from kernels.linear.dense import DenseLinear
from kernels.linear.invariant import InvariantLinear
from kernels.linear.packed import PackedLinear, packing_works
from kernels.linear.quantized import QuantizedLinear

LinearMode = Literal["dense", "packed", "invariant"]


def isolate_rows(model: nn.Module) -> None:
    """Makes every `QuantizedLinear` below `model` an `InvariantLinear`, for deterministic serving.

    Dense layers are left to `prepare_linears` and to native code, which have their own ways.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, QuantizedLinear):
                setattr(parent, name, InvariantLinear(child))


def prepare_linears(model: nn.Module, mode: LinearMode) -> LinearMode:
    """Replaces every `DenseLinear` below `model`; returns the mode that was possible.

    - dense: left as they are (CUDA, or nothing better).
    - packed: oneDNN's layout. Where torch or the CPU cannot, the layers stay dense.
    - invariant: a row's result does not depend on the batch, for deterministic serving.

    Weights are replaced one at a time and the originals released, so that the model's memory does
    not double; the one exception is a tied head, whose embedding is still read row by row.
    """
    if mode == "dense":
        return mode
    packs: dict[torch.dtype, bool] = {}
    replaced = False
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, DenseLinear):
                continue
            dtype, device = child.weight.dtype, child.weight.device.type
            if dtype not in packs:
                packs[dtype] = device == "cpu" and packing_works(dtype)
            layer: nn.Module = PackedLinear(child) if packs[dtype] else child
            if mode == "invariant":
                layer = InvariantLinear(layer)
            setattr(parent, name, layer)
            replaced = replaced or layer is not child
    return mode if replaced else "dense"
