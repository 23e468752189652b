"""The C interface of the native kernels: `native/*.cpp`, as ctypes sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kernels.ops import AttentionBatch

TYPES = {torch.float32: 0, torch.bfloat16: 1}

# A signature is a letter an argument: i int, s size (int64), p pointer or None, f float.
_KINDS: dict[str, Any] = {"i": c_int, "s": c_int64, "p": c_void_p, "f": c_float}

Function = Callable[..., Any]


class Library:
    """Functions of a loaded library. The GIL is released while one runs."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file is no such library."""
        self._library = ctypes.CDLL(path)
        self.rms_norm = self._bind("native_rms_norm", "i ppp ss f i")
        self.add_rms_norm = self._bind("native_add_rms_norm", "i pppp ss f i")
        self.silu_mul = self._bind("native_silu_mul", "i pp ss i")
        self.rope_append = self._bind("native_rope_append", "i ppppp sss ppp ss ps pp f i")
        self.append = self._bind("native_append", "i pp ss ppp sss pp s i")
        self.attend = self._bind("native_attend", "i ppppp sss ppp ss ps s f s i")
        self.has_tiles = self._bind("native_has_tiles", "", "i")
        self.packed_bytes = self._bind("native_packed_bytes", "i ss", "s")
        self.pack = self._bind("native_pack", "i pp ss i")
        self.linear = self._bind("native_linear", "ii pppp sss i i")
        self.workspace_bytes = self._bind("native_workspace_bytes", "p s", "s")
        self.decoder_step = self._bind("native_decoder_step", "pp i")
        self.draft_chain = self._bind("native_draft_chain", "ppp i")
        self.usable = self._bind("native_usable", "pp ss i")
        self.sample = self._bind("native_sample", "ppp ss pppp ppp i")

    def _bind(self, name: str, arguments: str, result: str | None = None) -> Function:
        try:
            function = self._library[name]
        except AttributeError as error:
            raise OSError(f"{name} is missing from the library") from error
        function.argtypes = [_KINDS[kind] for kind in arguments if kind != " "]
        function.restype = _KINDS[result] if result else None
        return function


def type_of(*tensors: Tensor) -> int:
    """The kernels' number for the one dtype all tensors share. Raises ValueError."""
    dtype = tensors[0].dtype
    if dtype not in TYPES or any(t.dtype != dtype for t in tensors):
        raise ValueError(
            f"native kernels take all fp32 or all bf16, not {[t.dtype for t in tensors]}"
        )
    return TYPES[dtype]


def check_batch(batch: AttentionBatch) -> None:
    """Raises ValueError unless the arrays are laid out as the kernels read them."""
    table = batch.page_table
    if (
        batch.positions.dtype != torch.int64
        or batch.kv_slots.dtype != torch.int64
        or batch.query_starts.dtype != torch.int32
        or table.dtype != torch.int32
        or table.stride(1) != 1
    ):
        raise ValueError("positions and slots are int64, query starts and page tables int32")
    copies = batch.copies
    if copies is not None and (
        copies.slots.dtype != torch.int64
        or copies.table.dtype != torch.int32
        or copies.table.stride(1) != 1
    ):
        raise ValueError("slots of dense copies are int64, their tables int32")
