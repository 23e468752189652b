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


@cache
def mend() -> None:
    """Corrects it for the whole process; a second call changes nothing.

    It keeps bf16 as uint16, which its products and its casts of integers take for numbers, and cuts
    numbers off where hardware rounds them to bf16; some versions cannot make a loop's bounds of
    numpy's newer arrays; and for every function that a kernel calls it replaces the whole language
    anew, which takes longer than most functions.
    """
    builder: Any = interpreter.InterpreterBuilder
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
    interpreter._patch_lang_tensor = patch_index
