"""The KV pool: for each layer one tensor of fixed-size pages."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kernels.kv.format import DENSE, KVFormat, dense_rows
from kernels.kv.format import page_bytes as layer_page_bytes
from models.spec import ModelSpec
from scheduler.plan import PageCopy

POPULATE_WRITE = 23  # Linux's MADV_POPULATE_WRITE, since 5.14
AT_ONCE = 1 << 20  # bytes, so that nobody waits long who needs the core or the memory map
LAST = 19  # the niceness of a thread that others need not wait for


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


def populate(pool: Sequence[Tensor]) -> threading.Thread:
    """Takes the memory of a CPU's pool from the system in a thread that stands behind all others.

    Otherwise steps do it, whenever a page is written for the first time, and that goes on until
    every page was: a prefix cache takes new pages before it gives up old ones. What is in the pages
    stays. Ends early once the pool is gone, and where the system knows no such request.
    """
    layers = [weakref.ref(layer) for layer in pool if layer.device.type == "cpu"]
    thread = threading.Thread(target=_populate, args=(layers,), name="populate", daemon=True)
    thread.start()
    return thread


def _populate(layers: Sequence[weakref.ref[Tensor]]) -> None:
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise  # without the interpreter's lock
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LAST)
    for reference in layers:
        done, size = 0, AT_ONCE
        while done < size:
            layer = reference()
            if layer is None:
                return
            size = layer.nbytes
            if advise(layer.data_ptr() + done, min(size - done, AT_ONCE), POPULATE_WRITE):
                return
            done += AT_ONCE


def _mapped_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that cost nothing until a page is touched, where `torch.zeros` writes them all."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
