"""Triton's interpreter, mended for what the kernels do."""

from __future__ import annotations

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture
def mended_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps bf16 as uint16, which its products and its casts of integers take for
    numbers, and some versions cannot make a loop's bounds of numpy's newer arrays."""
    builder = interpreter.InterpreterBuilder
    dot, cast, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def wide(x):
        if x.dtype != tl.bfloat16:
            return x
        data = (x.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    def cast_by_way_of_fp32(self, x, to):
        if to.scalar == tl.bfloat16 and x.dtype.scalar != tl.float32:
            x = interpreter.TensorHandle(x.data.astype(np.float32), tl.float32)
        return cast(self, x, to)

    def patch_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    monkeypatch.setattr(
        builder, "create_dot", lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)
    )
    monkeypatch.setattr(builder, "cast_impl", cast_by_way_of_fp32)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_index)
