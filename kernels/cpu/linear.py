"""Linear layers on native code: the weight packed once, every row's result its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.cpu.library import Library, type_of


class NativeLinear(nn.Module):
    """`x W^T + b` for bf16 and fp32 on the CPU, accumulated in fp32.

    The result of a row is the same bits whatever rows stand beside it and however many threads
    work, so this is also the deterministic layer. The weight is kept in the kernels' packed layout
    only; an fp32 weight whose values are all bf16's, as those of a bf16 checkpoint are, is kept in
    bf16: half the memory to hold and to read, and the same bits out. Runs on
    `torch.get_num_threads()` threads; inference alone, no gradients.
    """

    packed: Tensor  # uint8
    bias: Tensor | None

    def __init__(self, library: Library, weight: Tensor, bias: Tensor | None = None) -> None:
        """weight: [out_features, in_features]; bias: [out_features] or None.

        Raises ValueError for other types than bf16 and fp32, and for an odd number of bf16
        input features.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self._type = type_of(weight)
        self._linear = library.linear
        if self.in_features * weight.element_size() % 4:
            raise ValueError(f"native linear layers need an even input, not {self.in_features}")
        weight = _narrowest(weight.detach().contiguous())
        self.weight_type = type_of(weight)
        size = library.packed_bytes(self.weight_type, self.out_features, self.in_features)
        packed = torch.empty(size, dtype=torch.uint8)
        library.pack(
            self.weight_type,
            weight.data_ptr(),
            packed.data_ptr(),
            self.out_features,
            self.in_features,
            torch.get_num_threads(),
        )
        self.register_buffer("packed", packed, persistent=False)
        bias = None if bias is None else bias.detach().to(self.dtype).contiguous()
        self.register_buffer("bias", bias, persistent=False)
        # Addresses are fixed from here on: reading them from the tensors costs a microsecond.
        self._packed_at = packed.data_ptr()
        self._bias_at = None if bias is None else bias.data_ptr()

    def forward(self, x: Tensor, wide: bool = False) -> Tensor:
        """x: [..., in_features] -> [..., out_features], in x's dtype, or fp32 if `wide`."""
        if x.dtype != self.dtype or x.shape[-1] != self.in_features:
            raise ValueError(f"expected {self.in_features} features of {self.dtype}, got {x.dtype}")
        x = x.contiguous()
        out = torch.empty(
            (*x.shape[:-1], self.out_features), dtype=torch.float32 if wide else x.dtype
        )
        self._linear(
            self._type,
            self.weight_type,
            self._packed_at,
            self._bias_at,
            x.data_ptr(),
            out.data_ptr(),
            x.numel() // self.in_features,
            self.out_features,
            self.in_features,
            wide,
            torch.get_num_threads(),
        )
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.dtype}"


def _narrowest(weight: Tensor) -> Tensor:
    """The weight in bf16 where that changes no value and the kernels can pair its columns."""
    if weight.dtype != torch.float32 or weight.shape[1] % 2:
        return weight
    narrow = weight.bfloat16()
    return narrow if torch.equal(narrow.float(), weight) else weight
