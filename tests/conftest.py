"""Without a GPU, Triton runs its kernels in its interpreter; that is said before it is loaded."""

from __future__ import annotations

import os
import shutil

if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
