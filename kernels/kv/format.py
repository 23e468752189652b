"""`KVFormat`: how keys and values lie in a page, and how attention gets them back.

A format is chosen once, at start-up, for each layer. It is handed to the operators with the layer;
the model's code never looks at it. A token's codes depend on that token's key and value alone, or,
where pages are sealed, on those of its page, and nobody reads them before that is full. So pages
can be shared, prompts cut anywhere and drafts overwritten, as with dense pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from kernels.kv import dense
from kernels.kv.windows import DensePages, Windows


class KVFormat(Protocol):
    """One layer's pages. `kv` below is the layer's pool, [pages, *page_shape]."""

    @property
    def name(self) -> str:
        """With everything in it that the bytes of a page depend on, but the model."""
        ...

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]: ...

    def pool_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Of the pool's elements, for a model that computes in `dtype`."""
        ...

    @property
    def windows(self) -> Windows | None:
        """What is read dense although it is packed."""
        ...

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        kv_slots: Tensor,
        copies: DensePages | None = None,
    ) -> None:
        """k, v: [tokens, kv_heads, head_dim] after the rotary embedding; kv_slots: [tokens], page *
        page_size + offset; copies: where there are windows. Writes `kv` in place. Tokens of a page
        come in the order of their positions, some of the latest perhaps once more."""
        ...

    def gather(self, kv: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        """pages: [rows, n] int64 -> keys and values as they are stored, turned: each [rows,
        kv_heads, n * page_size, head_dim] floats."""
        ...

    def dense(self, kv: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        """The pool's `count` dense pages, laid out as `Dense`'s."""
        ...

    def turn(self, q: Tensor) -> Tensor:
        """q: [..., head_dim] -> queries whose products with stored keys are those with the keys,
        but for what is the same for all keys of a query."""
        ...

    def turn_back(self, out: Tensor) -> Tensor:
        """Weighted sums of stored values, [..., head_dim] -> those of the values."""
        ...

    def page_size(self, kv: Tensor) -> int:
        """Positions in a page of this pool."""
        ...

    def coarse(self) -> KVFormat:
        """The same pages, read with fewer bits where that is possible. Writes no dense copies, and
        reads none, so a step need not say where they lie. Raises ValueError where pages cannot be
        read without them."""
        ...


class Dense:
    """Keys and values as the model computes them: pages of [2, kv_heads, page_size, head_dim]."""

    name = "dense"
    windows: Windows | None = None

    def page_shape(self, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, ...]:
        return (2, kv_heads, page_size, head_dim)

    def pool_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def append(
        self,
        k: Tensor,
        v: Tensor,
        kv: Tensor,
        kv_slots: Tensor,
        copies: DensePages | None = None,
    ) -> None:
        dense.append(k, v, kv, kv_slots)

    def gather(self, kv: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
        return dense.gather(kv, dense.page_rows(pages, kv))

    def dense(self, kv: Tensor, count: int, dtype: torch.dtype) -> Tensor:
        return kv

    def turn(self, q: Tensor) -> Tensor:
        return q

    def turn_back(self, out: Tensor) -> Tensor:
        return out

    def page_size(self, kv: Tensor) -> int:
        return int(kv.shape[3])

    def coarse(self) -> KVFormat:
        return self


DENSE = Dense()


def page_bytes(
    layer: KVFormat, kv_heads: int, page_size: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of one page of one layer of a model that computes in `dtype`."""
    shape = torch.Size(layer.page_shape(kv_heads, page_size, head_dim))
    return shape.numel() * layer.pool_dtype(dtype).itemsize


def dense_rows(
    layer: KVFormat,
    count: int,
    kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> int:
    """Pages behind all others of a layer's pool for `count` dense ones; 0 without windows."""
    if layer.windows is None:
        return 0
    size = count * page_bytes(DENSE, kv_heads, page_size, head_dim, dtype)
    return -(-size // page_bytes(layer, kv_heads, page_size, head_dim, dtype))


def windows_of(formats: Iterable[KVFormat]) -> Windows | None:
    """Those of a model's layers, which are the same in all that have any."""
    return next((form.windows for form in formats if form.windows is not None), None)
