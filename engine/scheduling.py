"""From the configuration to the scheduler with its parts: the worker's counterpart in build.py."""

from __future__ import annotations

import logging
from pathlib import Path

from engine.config import EngineConfig
from engine.errors import StartupError
from engine.history import history_file, keep, restore
from scheduler.admission import make_policy
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.step_cost import Profile, ProfileError, StepCost

log = logging.getLogger(__name__)


def build_scheduler(config: EngineConfig, limits: SchedulerConfig) -> Scheduler:
    """Raises `StartupError`, one sentence for a person, for whatever the user can mend."""
    schedule = config.schedule
    cost = step_cost(schedule.profile)
    log.debug("step times: %s", cost.label)
    policy = make_policy(
        schedule.policy, watermark=schedule.watermark, window=schedule.length_window
    )
    file = history_file(config)
    if policy.window is not None and file is not None:
        restore(policy.window, file)
    return Scheduler(limits, policy=policy, cost=cost)


def keep_history(config: EngineConfig, scheduler: Scheduler) -> None:
    """For the next start."""
    window, file = scheduler.policy.window, history_file(config)
    if window is not None and file is not None:
        keep(window, file)


def step_cost(file: str | None) -> StepCost:
    """What steps take by a profile, or as it is learnt while serving. Raises `StartupError`."""
    return StepCost.learning() if file is None else StepCost.from_profile(read_profile(Path(file)))


def read_profile(file: Path) -> Profile:
    """Raises `StartupError`."""
    try:
        return Profile.parse(file.read_text())
    except OSError as error:
        raise StartupError(f"the profile {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise StartupError(f"{file}: the profile is not text.") from None
    except ProfileError as error:
        raise StartupError(f"{file}: {error}.") from error
