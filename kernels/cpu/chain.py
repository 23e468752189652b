"""Drafts of a small model in one native call; see `native/chain.cpp`."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_double, c_int64, c_void_p, pointer
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.cpu.decoder import NativeDecoder, Projection, projection
from kernels.cpu.library import Library
from kernels.cpu.linear import NativeLinear
from kernels.ops import AttentionBatch


@dataclass(frozen=True, slots=True)
class ChainRows:
    """The sequences that draft. Parameters as in kernels/sampling/reference.py, of all slots."""

    slot: Tensor  # [rows] int64
    length: Tensor  # [rows] int64, known tokens: the position of the first draft
    most: Tensor  # [rows] int64, at least 1
    page_table: Tensor  # [rows, pages] int32, up to the last draft
    temperature: Tensor  # [slots] float32, 0 is greedy
    log_min_p: Tensor  # [slots] float32, -inf is off
    top_k: Tensor  # [slots] int64
    top_p: Tensor  # [slots] float64
    seed: Tensor  # [slots] int64
    choice: Tensor  # [slots] int64


class NativeChain:
    """Several tokens for each of several sequences, one after the other, by the target's noise.

    What is drawn, and what the pool holds afterwards, is what forwards and draws one by one give.
    """

    def __init__(self, library: Library, decoder: NativeDecoder, head: NativeLinear) -> None:
        self._run = library.draft_chain
        self._decoder = decoder
        self._kept = head
        self._head = projection(head)

    def draft(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor,
        rows: ChainRows,
        least: float,
        vocab_size: int,
        others: bool = False,
    ) -> tuple[list[list[int]], list[list[float]], list[list[int]]]:
        """Tokens and confidences of each row; with `others`, the tokens that would be drawn if
        those could not be, else nothing.

        ids, batch: the first forward, whose first rows are those that draft; read: [rows] int64,
        the last token of each. A row stops once it has its most, or once the product of its
        confidences falls below `least`. Ids from `vocab_size` on are not drawn.
        """
        count = rows.length.shape[0]
        width = int(rows.most.max())
        step, _hidden = self._decoder.step(ids, batch, kv, read, count)  # kept until it has run
        tokens = torch.empty(count, width, dtype=torch.int64)
        confidence = torch.empty(count, width)
        counts = torch.empty(count, dtype=torch.int64)
        second = torch.empty(count, width, dtype=torch.int64) if others else None
        columns = (
            rows.slot,
            rows.length,
            rows.most,
            rows.temperature,
            rows.log_min_p,
            rows.top_k,
            rows.top_p,
            rows.seed,
            rows.choice,
        )
        chain = _Chain(
            pointer(self._head),
            *(column.data_ptr() for column in columns),
            rows.page_table.data_ptr(),
            rows.page_table.stride(0),
            count,
            width,
            vocab_size,
            least,
            tokens.data_ptr(),
            confidence.data_ptr(),
            None if second is None else second.data_ptr(),
            counts.data_ptr(),
        )
        threads = torch.get_num_threads()
        self._run(byref(self._decoder.structure), byref(step), byref(chain), threads)
        made = counts.tolist()

        def cut(values: Tensor | None) -> list[list[Any]]:
            rows = [[]] * count if values is None else values.tolist()
            return [row[:n] for row, n in zip(rows, made, strict=True)]

        return cut(tokens), cut(confidence), cut(second)


class _Chain(Structure):
    _fields_: ClassVar = [
        ("head", POINTER(Projection)),
        ("slot", c_void_p),
        ("length", c_void_p),
        ("most", c_void_p),
        ("temperature", c_void_p),
        ("log_min_p", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("seed", c_void_p),
        ("choice", c_void_p),
        ("page_table", c_void_p),
        ("table_stride", c_int64),
        ("rows", c_int64),
        ("width", c_int64),
        ("vocab", c_int64),
        ("least", c_double),
        ("tokens", c_void_p),
        ("confidence", c_void_p),
        ("others", c_void_p),
        ("counts", c_void_p),
    ]
