"""Output lengths kept in a file between two starts, so that the forecast is warm at once."""

from __future__ import annotations

import json
import logging
import os
from hashlib import sha256
from pathlib import Path

from engine.config import EngineConfig
from scheduler.lengths import LengthWindow

log = logging.getLogger(__name__)


def history_file(config: EngineConfig) -> Path | None:
    """Where the lengths of this model's answers are kept; None: nowhere."""
    if config.schedule.length_history is not None:
        return Path(config.schedule.length_history)
    if config.device.cache_dir is None:
        return None
    model = config.model.model
    name = f"{Path(model).name}-{sha256(model.encode()).hexdigest()[:8]}.json"
    return Path(config.device.cache_dir) / "lengths" / name


def restore(window: LengthWindow, file: Path) -> None:
    """Fills the window from the file. What cannot be read costs a warm start, not the start."""
    try:
        window.restore(json.loads(file.read_text()))
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError) as error:
        log.warning("past output lengths in %s are ignored: %s", file, error)
    else:
        log.debug("%d past output lengths from %s", len(window), file)


def keep(window: LengthWindow, file: Path) -> None:
    """Writes the window in one piece: another reader sees the old file or the new one."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(window.state()))
        draft.replace(file)
    except OSError as error:
        log.warning("output lengths cannot be kept in %s: %s", file, error)
