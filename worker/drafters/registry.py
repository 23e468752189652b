"""The drafters by name. Configuration names are compared here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

from worker.drafters.base import Drafter
from worker.drafters.lookup import LookupDrafter
from worker.drafters.recycling import RecyclingDrafter
from worker.drafters.suffix import SuffixDrafter

MODEL = "model"  # the one that needs a checkpoint
COARSE = "coarse"  # the target, by the upper halves of its own pages
COMPUTING = (MODEL, COARSE)  # forwards of a model, not looking up of text

# Those that need nothing but the text.
MODEL_FREE: dict[str, Callable[[], Drafter]] = {
    "suffix": SuffixDrafter,
    "lookup": LookupDrafter,
    "recycling": RecyclingDrafter,
}

NAMES = (*MODEL_FREE, *COMPUTING)
