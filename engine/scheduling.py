"""From the configuration to the scheduler with its parts: the worker's counterpart in build.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from engine.config import EngineConfig, SpeculationConfig
from engine.errors import StartupError
from engine.history import history_file, keep, restore
from scheduler.admission import make_policy
from scheduler.allocation import Option
from scheduler.controller import Controller
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.speculation import DraftPolicy, FixedDrafts
from scheduler.step_cost import UNLIMITED, Profile, ProfileError, StepCost
from worker.drafters.registry import COARSE, COMPUTING, MODEL, NAMES

log = logging.getLogger(__name__)


def build_scheduler(
    config: EngineConfig, limits: SchedulerConfig, beside: float = 0.0
) -> Scheduler:
    """`beside`: see `worker.worker.WorkerFacts`.

    Raises `StartupError`, one sentence for a person, for whatever the user can mend.
    """
    schedule = config.schedule
    cost = step_cost(schedule.profile)
    log.debug("step times: %s", cost.label)
    policy = make_policy(
        schedule.policy, watermark=schedule.watermark, window=schedule.length_window
    )
    file = history_file(config)
    if policy.window is not None and file is not None:
        restore(policy.window, file)
    target, tokens = schedule.mtpot_target, limits.max_step_tokens
    drafts = draft_policy(config.speculation, cost, target, beside, tokens)
    return Scheduler(limits, drafts, policy, cost)


def drafter_names(config: SpeculationConfig) -> tuple[str, ...]:
    """The drafters that will be there, in order; the draft model only where there is one.

    Raises `StartupError`.
    """
    if not config.max_draft_tokens:
        return ()
    for name in config.drafters:
        if name not in NAMES:
            raise StartupError(f"there is no drafter {name!r}; there are {', '.join(NAMES)}.")
    if config.draft_model is not None and MODEL not in config.drafters and config.drafters:
        raise StartupError("a draft_model is given, but `model` is not among the drafters.")
    if config.draft_model is not None and COARSE in config.drafters:
        raise StartupError("of the drafters `model` and `coarse` only one can be used.")
    return tuple(n for n in config.drafters if n != MODEL or config.draft_model is not None)


def draft_policy(
    config: SpeculationConfig,
    cost: StepCost,
    mtpot_target: float | None = None,
    beside: float = 0.0,
    step_tokens: int = UNLIMITED,
) -> DraftPolicy:
    """How many tokens are guessed ahead. Raises `StartupError`."""
    names = drafter_names(config)
    if not names or not config.max_draft_tokens:
        return FixedDrafts()
    if config.fixed_draft_tokens is not None:
        most = min(config.fixed_draft_tokens, config.max_draft_tokens)
        ahead = config.draft_ahead == "on"
        return FixedDrafts(most, tuple(range(len(names))), names, ahead=ahead)
    mode = config.draft_ahead if beside else "off"
    expected = beside if mode == "auto" else 1.0  # where nobody chooses, nothing is expected
    options = options_of(names, mode)
    most = config.max_draft_tokens
    return Controller(options, names, most, cost, mtpot_target, expected, step_tokens)


def options_of(names: Sequence[str], ahead: str = "off") -> list[Option]:
    """The orders in which drafters may be asked: everyone's beginnings of the configured order,
    so that each may be the last one who is asked, and each alone. Those with a draft model may
    have it work ahead, see `SpeculationConfig.draft_ahead`."""
    orders = [tuple(range(i + 1)) for i in range(len(names))]
    orders += [(i,) for i in range(1, len(names))]
    options: list[Option] = []
    for order in orders:
        who = [names[i] for i in order]
        reads = MODEL in who
        can = reads and ahead != "off"
        if not (can and ahead == "on"):
            computes = any(name in COMPUTING for name in who)
            options.append(Option(order, computes, reads=reads))
        if can:
            options.append(Option(order, computes=True, ahead=True, reads=True))
    return options


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
