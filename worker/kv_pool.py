"""The KV pool: for each layer one tensor of fixed-size pages."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from models.spec import ModelSpec


def page_bytes(spec: ModelSpec, page_size: int, dtype: torch.dtype) -> int:
    """Bytes of one page over all layers: keys and values."""
    per_layer = 2 * spec.num_kv_heads * page_size * spec.head_dim * dtype.itemsize
    return spec.num_layers * per_layer


def allocate_pool(
    spec: ModelSpec, num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Per layer [num_pages, 2, kv_heads, page_size, head_dim], see `kernels.ops.Ops.attend`.

    Zero, so that a padded read of a page never written is finite.
    """
    shape = (num_pages, 2, spec.num_kv_heads, page_size, spec.head_dim)
    if device.type != "cpu":
        return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(spec.num_layers)]
    return [_mapped_zeros(shape, dtype) for _ in range(spec.num_layers)]


def _mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until a page is touched, where `torch.zeros` writes them all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
