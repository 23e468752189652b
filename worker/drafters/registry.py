"""The drafters by name. Configuration names are compared here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

from worker.drafters.base import Drafter

MODEL = "model"  # the one that needs a checkpoint

# Those that need nothing but the text.
MODEL_FREE: dict[str, Callable[[], Drafter]] = {}

NAMES = (*MODEL_FREE, MODEL)
