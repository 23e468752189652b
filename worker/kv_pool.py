"""The KV pool: for each layer one tensor of fixed-size pages."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels.kv.format import DENSE, KVFormat, dense_rows
from kernels.kv.format import page_bytes as layer_page_bytes
from models.spec import ModelSpec
from scheduler.plan import PageCopy


def page_bytes(
    spec: ModelSpec,
    page_size: int,
    dtype: torch.dtype,
    formats: Sequence[KVFormat] | None = None,
) -> int:
    """Bytes of one page over all layers: keys and values. `formats`: of the layers' pages, dense
    if nothing is said."""
    heads, dim = spec.num_kv_heads, spec.head_dim
    layers = formats or [DENSE] * spec.num_layers
    return sum(layer_page_bytes(layer, heads, page_size, dim, dtype) for layer in layers)


def window_bytes(
    spec: ModelSpec,
    dense_pages: int,
    page_size: int,
    dtype: torch.dtype,
    formats: Sequence[KVFormat],
) -> int:
    """Bytes of the dense pages behind those of the layers that have windows."""
    heads, dim = spec.num_kv_heads, spec.head_dim
    return sum(
        dense_rows(layer, dense_pages, heads, page_size, dim, dtype)
        * layer_page_bytes(layer, heads, page_size, dim, dtype)
        for layer in formats
    )


def allocate_pool(
    spec: ModelSpec,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    formats: Sequence[KVFormat] | None = None,
    dense_pages: int = 0,
) -> list[Tensor]:
    """Per layer [num_pages, *page_shape], see `kernels.kv.format.KVFormat`. `formats`: of the
    layers' pages, dense if nothing is said. Layers with windows have room for `dense_pages` dense
    ones behind.

    Zero, so that a padded read of a page never written is finite.
    """
    pool, heads, dim = [], spec.num_kv_heads, spec.head_dim
    for layer in formats or [DENSE] * spec.num_layers:
        rows = num_pages + dense_rows(layer, dense_pages, heads, page_size, dim, dtype)
        shape = (rows, *layer.page_shape(heads, page_size, dim))
        kind = layer.pool_dtype(dtype)
        if device.type == "cpu":
            pool.append(_mapped_zeros(shape, kind))
        else:
            pool.append(torch.zeros(shape, dtype=kind, device=device))
    return pool


def allocate_host_pool(kv: Sequence[Tensor], pages: int) -> list[Tensor]:
    """`pages` pages of the same layout in host memory, page-locked where the pool is on a GPU so
    that copies need not be waited for."""
    shapes = [(pages, *layer.shape[1:]) for layer in kv]
    return [
        torch.zeros(shape, dtype=layer.dtype, pin_memory=True)
        if layer.is_cuda
        else _mapped_zeros(shape, layer.dtype)
        for shape, layer in zip(shapes, kv, strict=True)
    ]


def copy_pages(
    source: Sequence[Tensor], target: Sequence[Tensor], copies: Iterable[PageCopy]
) -> None:
    """Copies pages from one pool to another, in the order of the device's work.

    On a GPU the copies stand in the stream of the steps, so nothing has to be waited for, but
    nothing overlaps either; that path has not run on a GPU yet.
    """
    for copy in copies:
        for old, new in zip(source, target, strict=True):
            new[copy.target].copy_(old[copy.source], non_blocking=True)


def copy_halves(kv: Sequence[Tensor], copies: Iterable[PageCopy]) -> None:
    """Copies halves of a pool's pages to other halves: 2 * page, or 2 * page + 1."""
    halves = [layer.view(2 * layer.shape[0], layer.shape[1] // 2) for layer in kv]
    copy_pages(halves, halves, copies)


def _mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until a page is touched, where `torch.zeros` writes them all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
