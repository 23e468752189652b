"""The C interface of the native kernels: `native/ops.cpp`, as ctypes sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1}

_POINTER, _SIZE = c_void_p, c_int64

Function = Callable[..., Any]


class Library:
    """Functions of a loaded library. The GIL is released while one runs."""

    def __init__(self, path: str) -> None:
        """Raises OSError if the file is no such library."""
        self._library = ctypes.CDLL(path)
        self.rms_norm = self._bind(
            "native_rms_norm", [c_int, *[_POINTER] * 3, *[_SIZE] * 2, c_float, c_int]
        )
        self.add_rms_norm = self._bind(
            "native_add_rms_norm", [c_int, *[_POINTER] * 4, *[_SIZE] * 2, c_float, c_int]
        )
        self.silu_mul = self._bind("native_silu_mul", [c_int, *[_POINTER] * 2, *[_SIZE] * 2, c_int])
        self.rope_append = self._bind(
            "native_rope_append",
            [c_int, *[_POINTER] * 3, *[_SIZE] * 3, *[_POINTER] * 2, *[_SIZE] * 2]
            + [_POINTER, _SIZE, *[_POINTER] * 2, c_float, c_int],
        )
        self.append = self._bind(
            "native_append",
            [c_int, *[_POINTER] * 2, *[_SIZE] * 2, _POINTER, *[_SIZE] * 3, _POINTER, _SIZE, c_int],
        )
        self.attend = self._bind(
            "native_attend",
            [c_int, *[_POINTER] * 3, *[_SIZE] * 3, *[_POINTER] * 3, *[_SIZE] * 3]
            + [c_float, _SIZE, c_int],
        )
        self.packed_bytes = self._bind("native_packed_bytes", [c_int, _SIZE, _SIZE], _SIZE)
        self.pack = self._bind("native_pack", [c_int, *[_POINTER] * 2, *[_SIZE] * 2, c_int])
        self.linear = self._bind(
            "native_linear", [c_int, *[_POINTER] * 4, *[_SIZE] * 3, c_int, c_int]
        )

    def _bind(self, name: str, arguments: list[Any], result: Any = None) -> Function:
        try:
            function = self._library[name]
        except AttributeError as error:
            raise OSError(f"{name} is missing from the library") from error
        function.argtypes = arguments
        function.restype = result
        return function


def type_of(*tensors: Tensor) -> int:
    """The kernels' number for the one dtype all tensors share. Raises ValueError."""
    dtype = tensors[0].dtype
    if dtype not in TYPES or any(t.dtype != dtype for t in tensors):
        raise ValueError(
            f"native kernels take all fp32 or all bf16, not {[t.dtype for t in tensors]}"
        )
    return TYPES[dtype]
