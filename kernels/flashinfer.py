"""FlashInfer's attention over dense pages (Ye et al. 2025): the only importer of `flashinfer`.

Our pool's pages, [pages, 2, kv_heads, page_size, head_dim], are FlashInfer's "HND" layout as they
lie. What it wants of a step is planned once and used by all layers of one shape.

Planning cuts the work into pieces on the host, so it needs every row's length there: where the
batch does not bring them (`AttentionBatch.host`), two small tensors are read back, once a step,
which waits for all that was launched before. So no CUDA graph can capture it.

Never run with the real library: written after the source of 0.6.14, and tested with a stand-in that
computes by the very arguments it is given.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kernels.ops import AttentionBatch, AttentionLayer, HostRows

OLDEST = (0, 6, 14)
HEAD_DIMS = (64, 128, 256)
CAPABILITY = (8, 0)  # Ampere
WORKSPACE = 128 << 20  # bytes for the partial results of split rows, as FlashInfer recommends
TENSOR_CORE_GROUP = 4  # query heads of a KV head from which on decoding uses tensor cores


def probe(
    device: torch.device, dtype: torch.dtype, page_size: int, layers: Iterable[AttentionLayer]
) -> FlashInferAttention | str:
    """FlashInfer's attention for such layers of a model, or one sentence why it cannot be had.

    Runs a small step through it, so that whatever has to be compiled is compiled, or fails, now.
    """
    layers = list(layers)
    refused = _refused(device, dtype, {layer.head_dim for layer in layers})
    if refused is not None:
        return refused
    try:
        library = importlib.import_module("flashinfer")
    except Exception as error:  # whatever an installation that does not fit may raise
        if isinstance(error, ModuleNotFoundError) and error.name == "flashinfer":
            return "FlashInfer is not installed"
        return f"FlashInfer cannot be loaded ({_line(error)})"
    version = str(getattr(library, "__version__", "of unknown version"))
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if numbers < OLDEST:
        return f"FlashInfer {version} is older than {'.'.join(map(str, OLDEST))}"
    attention = FlashInferAttention(library, device)
    try:
        for layer in layers:
            _try_out(attention, layer, dtype, page_size, device)
    except Exception as error:
        return f"FlashInfer {version} fails on a trial step ({_line(error)})"
    return attention


def _refused(device: torch.device, dtype: torch.dtype, head_dims: Iterable[int]) -> str | None:
    if device.type != "cuda":
        return f"FlashInfer needs a CUDA GPU, and the device is {device.type}"
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return f"FlashInfer needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"FlashInfer computes in 16 bits, and the model in {str(dtype)[6:]}"
    for head_dim in head_dims:
        if head_dim not in HEAD_DIMS:
            return f"FlashInfer takes heads of {HEAD_DIMS} numbers, and the model's have {head_dim}"
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True, slots=True)
class PagedRows:
    """A step as FlashInfer wants it: lengths on the host, pages on the device."""

    query_starts: Tensor  # [rows + 1] int32
    page_starts: Tensor  # [rows + 1] int32, into `pages`
    pages: Tensor  # [page_starts[-1]] int32, row by row, without padding
    last_page: Tensor  # [rows] int32, positions in each row's last page, at least 1

    @classmethod
    def of(cls, batch: AttentionBatch, page_size: int) -> PagedRows:
        """Reads back what the batch does not bring along; see above."""
        host = batch.host or HostRows(batch.query_starts.cpu(), batch.kv_lengths.cpu())
        lengths = host.kv_lengths.clamp(min=1)
        counts = (lengths + (page_size - 1)) // page_size
        page_starts = torch.zeros(len(counts) + 1, dtype=torch.int32)
        page_starts[1:] = counts.cumsum(0)
        # The same on the device, where the table is.
        total, device = int(page_starts[-1]), batch.page_table.device
        count = (batch.kv_lengths.long().clamp(min=1) + (page_size - 1)) // page_size
        row = torch.repeat_interleave(count, output_size=total)
        column = torch.arange(total, device=device) - (count.cumsum(0) - count)[row]
        last_page = (lengths - 1) % page_size + 1
        lengths_on_host = [host.query_starts, page_starts, last_page.to(torch.int32)]
        if device.type == "cuda":
            lengths_on_host = [part.pin_memory() for part in lengths_on_host]
        query_starts, page_starts, last_page = lengths_on_host
        return cls(query_starts, page_starts, batch.page_table[row, column], last_page)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What one plan is made for, apart from the step. Layers that differ in nothing share it."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    window: int | None
    scale: float
    dtype: torch.dtype
    decoding: bool  # one query in every row


class FlashInferAttention:
    """Attention over dense pages of 16 bits. One thread uses it at a time."""

    name = "flashinfer"
    capturable = False

    def __init__(self, library: Any, device: torch.device) -> None:
        self._library = library
        self._device = device
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
        self._prefill_backend = "fa3" if hopper else "fa2"
        # One for all: plans run one behind the other. FlashInfer wants it zeroed before its use.
        self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers: dict[_Shape, _Wrapper] = {}
        self._batch: AttentionBatch | None = None  # of which the following are
        self._rows: dict[int, PagedRows] = {}  # by page size
        self._planned: set[_Shape] = set()

    def attend(self, q: Tensor, kv: Tensor, layer: AttentionLayer, batch: AttentionBatch) -> Tensor:
        """As `Ops.attend`; kv: [pages, 2, kv_heads, page_size, head_dim] of q's dtype."""
        if self._batch is not batch:
            self._batch, self._rows = batch, {}
            self._planned.clear()
        shape = _Shape(
            layer.num_heads,
            layer.num_kv_heads,
            layer.head_dim,
            kv.shape[3],
            layer.window,
            layer.scale,
            q.dtype,
            decoding=q.shape[0] == batch.page_table.shape[0] and batch.max_query == 1,
        )
        wrapper = self._wrappers.get(shape)
        if wrapper is None:
            wrapper = self._wrappers[shape] = self._wrapper(shape)
        if shape not in self._planned:
            if shape.page_size not in self._rows:
                self._rows[shape.page_size] = PagedRows.of(batch, shape.page_size)
            wrapper.plan(self._rows[shape.page_size])
            self._planned.add(shape)
        return wrapper.run(q.contiguous(), kv)

    def _wrapper(self, shape: _Shape) -> _Wrapper:
        if shape.decoding:
            made = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                kv_layout="HND",
                use_tensor_cores=shape.heads // shape.kv_heads >= TENSOR_CORE_GROUP,
                backend="fa2",
            )
        else:
            made = self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, kv_layout="HND", backend=self._prefill_backend
            )
        return _Wrapper(made, shape, self._device)


class _Wrapper:
    """One of FlashInfer's, with what it has to be told every step."""

    def __init__(self, made: Any, shape: _Shape, device: torch.device) -> None:
        self._made, self._shape = made, shape
        # A plan is staged in one page-locked buffer, which must not be filled again before it was
        # copied to the device.
        self._copied = torch.cuda.Event() if device.type == "cuda" else None

    def plan(self, rows: PagedRows) -> None:
        shape = self._shape
        lengths = (rows.page_starts, rows.pages, rows.last_page)
        heads = (shape.heads, shape.kv_heads, shape.head_dim, shape.page_size)
        options = {
            "window_left": -1 if shape.window is None else shape.window - 1,
            "sm_scale": shape.scale,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.dtype,
        }
        if self._copied is not None:
            self._copied.synchronize()
        if shape.decoding:
            self._made.plan(*lengths, *heads, **options)
        else:
            self._made.plan(rows.query_starts, *lengths, *heads, causal=True, **options)
        if self._copied is not None:
            self._copied.record()

    def run(self, q: Tensor, kv: Tensor) -> Tensor:
        found: Tensor = self._made.run(q, kv)
        return found


def _try_out(
    attention: FlashInferAttention,
    layer: AttentionLayer,
    dtype: torch.dtype,
    page_size: int,
    device: torch.device,
) -> None:
    """A decoding step, then one with a chunk, over a pool of one page."""
    kv = torch.zeros(1, 2, layer.num_kv_heads, page_size, layer.head_dim, dtype=dtype).to(device)
    one = AttentionBatch(
        positions=torch.zeros(1, dtype=torch.int64, device=device),
        token_rows=torch.zeros(1, dtype=torch.int64, device=device),
        query_starts=torch.tensor([0, 1], dtype=torch.int32, device=device),
        kv_lengths=torch.ones(1, dtype=torch.int32, device=device),
        page_table=torch.zeros(1, 1, dtype=torch.int32, device=device),
        kv_slots=torch.zeros(1, dtype=torch.int64, device=device),
        max_query=1,
        max_kv=1,
    )
    for batch in (one, replace(one, max_query=2)):  # of bounds, the larger one may be too large
        q = torch.zeros(1, layer.num_heads, layer.head_dim, dtype=dtype, device=device)
        if not attention.attend(q, kv, layer, batch).isfinite().all():
            raise RuntimeError("its result is not finite")
