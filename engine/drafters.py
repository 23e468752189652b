"""The drafters of a worker: loaded, checked against the target, and put together."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig, SpeculationConfig
from engine.cuda import Recording, as_it_is, can_be_recorded
from engine.errors import StartupError
from engine.scheduling import drafter_names
from models.decoder import Decoder
from models.errors import CheckpointError
from models.loader import load_decoder
from models.spec import ModelSpec
from models.weights import resolve_checkpoint
from worker.beside import Beside
from worker.device import Device
from worker.drafters.base import Drafter
from worker.drafters.model import ModelDrafter
from worker.drafters.outcomes import MOST_BRANCHES
from worker.drafters.registry import COARSE, COMPUTING, MODEL, MODEL_FREE
from worker.drafting import Drafting
from worker.kv_pool import allocate_pool, populate
from worker.runner import Runner
from worker.sampler import Sampler
from worker.slots import SlotTable

log = logging.getLogger(__name__)

# Working ahead is not tried where verifying would take more than so many times as long beside it,
# that is, on fewer than three CPU threads: drafting would have to take half of the time to pay.
MOST_SLOWDOWN = 1.5
# Of the draft model's pool, for what is written ahead: a branch of it takes two.
SPARE_PAGES = 2 * MOST_BRANCHES


@dataclass(frozen=True, slots=True)
class Draft:
    """A loaded model, draft model or target, as a drafter needs it."""

    runner: Runner
    spec: ModelSpec
    dtype: torch.dtype
    parameters: int


def load_draft(
    config: EngineConfig, target: Path, dtype: torch.dtype, device: Device, max_model_len: int
) -> Callable[[], Decoder] | None:
    """What loads the draft model; None where there is none. Raises `StartupError`."""
    name = config.speculation.draft_model
    if name is None or MODEL not in drafter_names(config.speculation):
        return None
    try:
        folder = resolve_checkpoint(name)
    except CheckpointError as error:
        raise StartupError(f"the draft model: {error}") from error
    _check_vocabulary(target, folder)

    def load() -> Decoder:
        draft = load_decoder(
            folder, dtype=dtype, device=device.torch_device, max_model_len=max_model_len
        )
        if draft.spec.max_position < max_model_len:
            raise StartupError(
                f"the draft model reads {draft.spec.max_position:,} positions, the target "
                f"{max_model_len:,}: lower --max-model-len or take another."
            )
        return draft

    return load


def build_drafting(
    config: SpeculationConfig,
    slots: SlotTable,
    sampler: Sampler,
    draft: Draft | None,
    target: Draft,
    kv: Sequence[Tensor],
    num_pages: int,
    step_tokens: int,
    record: Recording = as_it_is,
) -> Drafting | None:
    """None where nobody guesses. `target`: the model that is served, `kv` its pool of `num_pages`
    pages. `record`: of the draft model's steps."""
    names = drafter_names(config)
    if not names:
        return None
    model: ModelDrafter | None = None
    beside = _beside(config, slots.tokens.device)
    if draft is not None:
        device = slots.tokens.device
        spare = SPARE_PAGES if beside is not None else 0
        own = allocate_pool(draft.spec, num_pages + spare, slots.page_size, draft.dtype, device)
        populate(own)
        model = ModelDrafter(
            # Nothing may be recorded on one thread while another computes.
            record(draft.runner, own, draft.spec, draft.dtype)
            if beside is None and can_be_recorded(draft.runner)
            else draft.runner,
            own,
            slots,
            sampler,
            draft.parameters,
            draft.spec.vocab_size,
            step_tokens,
            spare_pages=range(num_pages, num_pages + spare),
        )
    elif COARSE in names:
        model = ModelDrafter(
            target.runner.coarse(),
            kv,
            slots,
            sampler,
            target.parameters,
            target.spec.vocab_size,
            step_tokens,
            coarse=True,
        )
    drafters: list[Drafter] = []
    for name in names:
        if name in COMPUTING:
            assert model is not None
            drafters.append(model)
        else:
            drafters.append(MODEL_FREE[name]())
    return Drafting(slots, drafters, model, beside)


def _beside(config: SpeculationConfig, device: torch.device) -> Beside | None:
    """Where the draft model works ahead, if it can and may. Raises `StartupError`."""
    drafts, wanted = MODEL in drafter_names(config), config.draft_ahead
    if wanted != "off" and drafts and Beside.possible(device):
        beside = Beside(device)
        # On a GPU, where it has never run, it has to be asked for.
        if wanted == "on" or (device.type == "cpu" and beside.slowdown <= MOST_SLOWDOWN):
            return beside
        beside.close()
    if wanted == "on":
        raise StartupError(
            "draft_ahead: on needs a draft model and a second CPU thread for it, or a GPU."
        )
    return None


def _check_vocabulary(target: Path, draft: Path) -> None:
    """A draft is a token id: both models must mean the same by it."""
    ours, theirs = _vocabulary(target), _vocabulary(draft)
    if ours is None or theirs is None:
        missing = target if ours is None else draft
        raise StartupError(
            f"{missing} has no tokenizer.json to tell whether target and draft model share a "
            "vocabulary."
        )
    if ours != theirs:
        raise StartupError(
            f"the draft model {draft} has another tokenizer than the target: its tokens would mean "
            "something else."
        )


def _vocabulary(folder: Path) -> Any:
    """What decides which text a token id stands for."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
    except (OSError, ValueError):
        return None
    added = [(token["id"], token["content"]) for token in tokenizer.get("added_tokens", ())]
    return tokenizer.get("model", {}).get("vocab"), sorted(added)
