"""Triton's interpreter, mended: it runs the kernels on CPU tensors, for tests and checks alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter


def interpreted() -> bool:
    """Whether kernels defined from now on are interpreted: TRITON_INTERPRET, as Triton reads it."""
    return bool(triton.knobs.runtime.interpret)


_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
}


@cache
def mend() -> None:
    """Corrects it for the whole process; a second call changes nothing.

    It keeps bf16 as uint16, which its products and its casts of integers take for numbers, and cuts
    numbers off where hardware rounds them to bf16; it rounds to e4m3 without carrying, has no NaN
    there; some versions cannot make a loop's bounds of numpy's newer arrays; and for every function
    that a kernel calls it replaces the whole language anew, which takes longer than most functions.
    """
    builder: Any = interpreter.InterpreterBuilder
    convert = builder.create_fp_to_fp
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def wide(x: Any) -> Any:
        if x.dtype != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def rounded(self: Any, x: Any, to: Any) -> Any:
        if to.scalar != tl.bfloat16 or x.dtype.scalar == tl.bfloat16:
            return cast(self, x, to)
        number = torch.from_numpy(np.ascontiguousarray(x.data, dtype=np.float32))
        data = number.to(torch.bfloat16).view(torch.uint16).numpy().reshape(x.data.shape)
        return interpreter.TensorHandle(data, tl.bfloat16)

    def converted(self: Any, x: Any, to: Any, rounding: Any) -> Any:
        if tl.float8e4nv not in (x.dtype.scalar, to.scalar):
            return convert(self, x, to, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(x.data))
        number = bits.view(_TORCH[x.dtype.scalar]).float().to(_TORCH[to.scalar])
        held = {1: torch.uint8, 2: torch.uint16}.get(number.itemsize)  # as the interpreter keeps it
        if to.scalar != tl.float16 and held is not None:
            number = number.view(held)
        return interpreter.TensorHandle(number.numpy().reshape(x.data.shape), to.scalar)

    def patch_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__globals__.get("tl") is not tl:  # else the kernel's own start has replaced it
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
    builder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    builder.cast_impl = rounded
    builder.create_fp_to_fp = converted
    interpreter._patch_lang_tensor = patch_index
