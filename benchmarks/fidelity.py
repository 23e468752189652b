"""Simulated against real: the same traces through the server and through the simulator.

1. `foresight profile` measures the idle machine, unless a profile is given.
2. A burst of chat requests, served and simulated: the time from its first arrival to its last end,
   real over simulated, is how much slower steps are while HTTP, the engine's loop and this client
   share the machine with them.
3. Each trace is played at 1.2 times the load that the simulator says an oracle sustains with steps
   so much slower, so that the targets bind; no result of a real run has a part in that choice.
4. What came of it, arrivals and lengths, is simulated with the server's limits, policy and targets,
   and with no past lengths known, as in the server. How much slower steps are is taken from the
   run itself, second by second, as the server tells it (`step_seconds` of /load): a machine shared
   with others is not as fast in one second as in the next, and where many requests come at once,
   they are what it is shared with. Results with the run's mean and with the burst's stand beside.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.local_server import LocalServer, local_server, model_flags, root
from benchmarks.replay import (
    POLL,
    Played,
    Scripted,
    Slowdown,
    learn,
    observed,
    simulated,
    watched,
    with_prompts,
    without,
)
from benchmarks.report import Row, table
from benchmarks.streaming import Endpoint
from benchmarks.workload import tokenized_text
from scheduler.admission import make_policy
from scheduler.capacity import Configuration, sustained_load
from scheduler.outcome import SimulationReport, Targets
from scheduler.plan import StepPlan
from scheduler.profile import Profile, StepShape
from scheduler.request import SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.simulate import simulate
from scheduler.step_cost import StepCost
from scheduler.trace import TraceRequest, at_rate
from scheduler.workloads import WORKLOADS

# A fifth and a third of the usual 10 s and 1.5 s: a run lasts half a minute, and targets that a
# queue cannot reach in that time would not bind.
TARGETS = Targets(ttft=2.0, mtpot=0.5)
OVERLOAD = 1.2  # times the load that the oracle sustains
ATTAINMENT = 0.9  # of requests within targets: what counts as sustained
TOLERANCE = 0.1
SAMPLE = 150  # requests of a trace to find that load, if they last as long as the run,
MOST_SAMPLED = 3000  # else more
BURST = 400  # requests: some seconds, so that starts and ends hardly count
WARM_UP = [TraceRequest(0.0, 32, 16, 64)] * 4
WARM_SECONDS = 2.0  # before the first request that counts
NATIVE_PATIENCE = 120.0  # seconds for the native kernels


@dataclass(frozen=True, slots=True)
class Setting:
    """The server's limits, all of them given as flags; the pool is small enough to bind."""

    model: Path = Path("assets/demo/target")
    num_pages: int = 161
    page_size: int = 16
    max_num_seqs: int = 32
    max_step_tokens: int = 256
    max_model_len: int = 2048
    seconds: float = 30.0  # of arrivals of each trace
    profile_seconds: float = 45.0
    threads: int | None = None  # of the worker; all cores, where none is said

    def model_flags(self, extra: Sequence[str]) -> list[str]:
        threads = [] if self.threads is None else ["--threads", str(self.threads)]
        return model_flags(self.model, [*threads, *extra])

    def config(self, targets: Targets) -> SchedulerConfig:
        def finite(seconds: float) -> float | None:
            return seconds if seconds < math.inf else None

        return SchedulerConfig(
            num_pages=self.num_pages,
            page_size=self.page_size,
            max_num_seqs=self.max_num_seqs,
            max_step_tokens=self.max_step_tokens,
            max_model_len=self.max_model_len,
            ttft_target=finite(targets.ttft),
            mtpot_target=finite(targets.mtpot),
        )

    def flags(self, targets: Targets, profile: Path, history: Path) -> list[str]:
        """The same for `foresight serve`; `history` is a file that is not there."""
        config = self.config(targets)
        out = self.model_flags(["--profile", str(profile), "--length-history", str(history)])
        for name in ("num_pages", "page_size", "max_num_seqs", "max_step_tokens", "max_model_len"):
            out += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
        for name in ("ttft_target", "mtpot_target"):
            value = getattr(config, name)
            out += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
        return out


@dataclass(frozen=True, slots=True)
class Shape:
    """A trace: a maker, a scale that makes a hundred requests and more fit the time, and how many
    of the maker's seconds are one of ours (bursts come every 50 of its seconds)."""

    workload: str
    scale: float
    hurry: float = 1.0

    def make(self, rate: float, count: int, longest: int) -> list[TraceRequest]:
        rng = np.random.default_rng(0)
        made = WORKLOADS[self.workload].make(rng, rate / self.hurry, count, self.scale)
        # As clients see to it, prompt and output fit the context.
        made = [
            replace(r, max_tokens=min(r.max_tokens, longest - r.prompt_tokens))
            for r in made
            if r.prompt_tokens + r.output_tokens < longest
        ]
        return at_rate(made, rate)


TRACES = {
    "chat": Shape("chat", 0.4),
    "bursts": Shape("bursts", 0.2, hurry=5.0),
    "decode-heavy": Shape("decode-heavy", 0.06),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure_profile(setting: Setting, file: Path) -> None:
    """`foresight profile` with the server's rows and steps and a pool of its default size."""
    flags = setting.model_flags(["--output", str(file)])
    flags += ["--seconds", str(setting.profile_seconds)]
    flags += ["--max-num-seqs", str(setting.max_num_seqs)]
    flags += ["--max-step-tokens", str(setting.max_step_tokens)]
    done = subprocess.run(
        [sys.executable, "-m", "cli", "profile", *flags], cwd=root, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"foresight profile failed:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
    say("\n".join(line for line in done.stdout.splitlines() if "relative error" in line))


def scaled(profile: Profile, factor: float) -> Profile:
    """All steps slower by that factor."""
    points = tuple((shape, seconds * factor) for shape, seconds in profile.points)
    return replace(profile, points=points)


class SlowedMachine:
    """What steps take on a machine that is slower than in its profile, by more or less in time."""

    def __init__(self, profile: Profile, slowdown: Slowdown) -> None:
        self._cost = StepCost.from_profile(profile)
        self._slowdown = slowdown
        self._factor = slowdown.at(0.0)

    def planned(self, _: StepPlan, now: float) -> None:
        """What is asked from here on is asked at that time."""
        self._factor = self._slowdown.at(now)

    def seconds(self, shape: StepShape) -> float:
        return self._cost.seconds(shape) * self._factor

    def copy_seconds(self, pages: int) -> float:
        return self._cost.copy_seconds(pages) * self._factor


def simulate_trace(
    trace: Sequence[TraceRequest],
    setting: Setting,
    targets: Targets,
    profile: Profile,
    slowdown: Slowdown,
) -> SimulationReport:
    """The scheduler is given the profile as the server was, and learns that steps are slower."""
    scheduler = Scheduler(
        setting.config(targets), policy=make_policy(), cost=StepCost.from_profile(profile)
    )
    machine = SlowedMachine(profile, slowdown)
    return simulate(trace, scheduler, machine, targets, interval=POLL, on_plan=machine.planned)


def oracle_load(
    shape: Shape, setting: Setting, targets: Targets, profile: Profile, factor: float
) -> float:
    """Requests per second that an oracle sustains in simulation."""
    cost = scaled(profile, factor)
    configuration = Configuration(
        shape.workload,
        setting.config(targets),
        lambda: StepCost.from_profile(cost),
        lambda truth: make_policy("oracle", truth=truth),
    )
    count = SAMPLE
    while True:
        trace = shape.make(1.0, count, setting.max_model_len)
        load = sustained_load(trace, configuration, targets, ATTAINMENT)
        needed = math.ceil(min(load * setting.seconds, MOST_SAMPLED))
        if needed <= count:
            return load
        count = max(needed, 2 * count)  # a few arrivals at once would not wait for long at all


class Laboratory:
    """A server that texts are learnt from, asleep while others are measured."""

    def __init__(self, learner: LocalServer, setting: Setting, profile: Path, folder: Path) -> None:
        self._learner = learner
        self._tree = learner.tree
        self._setting = setting
        self._profile = profile
        self._folder = folder
        endpoint = Endpoint.parse(learner.url)
        self._vocabulary = sorted(set(tokenized_text(endpoint, "m", 4000)))
        self._runs = self._scripts = 0

    def learnt(self, trace: Sequence[TraceRequest]) -> list[Scripted]:
        """What is to be sent: some requests that warm a server up, then the trace. Untimed."""
        self._scripts += 1
        later = [replace(r, arrival=r.arrival + WARM_SECONDS) for r in trace]
        script = with_prompts([*WARM_UP, *later], self._vocabulary, self._scripts)
        return learn(Endpoint.parse(self._learner.url), "m", script)

    def play(
        self, script: Sequence[Scripted], targets: Targets
    ) -> tuple[list[TraceRequest], Played]:
        """A new server plays it. What was sent, all of it, and what came of all but the warm-up."""
        self._runs += 1
        self._tree.stop()
        try:
            played = self._timed(script, targets)
        finally:
            self._tree.resume()
        pairs = list(zip(script, played.fates, strict=True))
        elsewhere = sum(
            fate.tokens != item.request.output_tokens for item, fate in pairs if not fate.refused
        )
        lag = max(fate.arrival - item.request.arrival for item, fate in pairs)
        failures = [fate.failed for fate in played.fates if fate.failed]
        say(
            f"  {len(script)} requests; sent late by at most {lag * 1e3:.0f} ms; "
            f"{elsewhere} ended elsewhere than when learnt; {len(failures)} failed"
            + (f": {failures[0]}" if failures else "")
        )
        return observed(script, played), without(played, len(WARM_UP))

    def _timed(self, script: Sequence[Scripted], targets: Targets) -> Played:
        history = self._folder / f"lengths-{self._runs}.json"
        flags = self._setting.flags(targets, self._profile, history)
        with local_server(*flags) as server:
            server.native_seconds(NATIVE_PATIENCE)
            endpoint = Endpoint.parse(server.url)
            bodies = [endpoint.post("/v1/completions", item.body("m")) for item in script]
            arrivals = [item.request.arrival for item in script]
            return asyncio.run(watched(endpoint, bodies, arrivals, WARM_SECONDS))


@contextmanager
def laboratory(setting: Setting, profile: Path) -> Iterator[Laboratory]:
    flags = setting.model_flags(["--max-model-len", str(setting.max_model_len)])
    with tempfile.TemporaryDirectory() as folder, local_server(*flags) as learner:
        learner.native_seconds(NATIVE_PATIENCE)
        yield Laboratory(learner, setting, profile, Path(folder))


def simulated_figures(
    sent: Sequence[TraceRequest],
    setting: Setting,
    targets: Targets,
    profile: Profile,
    slowdown: Slowdown,
) -> dict[str, float]:
    """Of the requests that count."""
    report = simulate_trace(sent, setting, targets, profile, slowdown)
    return without(simulated(report, WARM_SECONDS, sent[-1].arrival), len(WARM_UP)).figures(targets)


def calibrate(
    lab: Laboratory, script: Sequence[Scripted], setting: Setting, profile: Profile
) -> float:
    """How much slower steps are in a loaded server than in the profile."""
    sent, played = lab.play(script, Targets())
    real = played.figures(Targets())
    virtual = simulated_figures(sent, setting, Targets(), profile, Slowdown(1.0))
    factor = real["seconds"] / virtual["seconds"]
    say(
        f"burst: {real['seconds']:.2f} s served, {virtual['seconds']:.2f} s simulated, "
        f"factor {factor:.3f}; {real['output tok/s']:.0f} tok/s"
    )
    return factor


def burst(setting: Setting) -> list[TraceRequest]:
    """Chat requests that all come at once."""
    made = TRACES["chat"].make(1.0, BURST, setting.max_model_len)
    return [replace(request, arrival=0.0) for request in made]


def overload(
    name: str, setting: Setting, targets: Targets, profile: Profile, factor: float
) -> list[TraceRequest]:
    """The trace at more than an oracle sustains."""
    load = oracle_load(TRACES[name], setting, targets, profile, factor)
    say(f"{name}: an oracle sustains {load:.2f} requests/s")
    rate = OVERLOAD * load
    return TRACES[name].make(rate, math.ceil(rate * setting.seconds), setting.max_model_len)


def fidelity(setting: Setting, profile_file: Path, names: Sequence[str]) -> list[Row]:
    """Prints a table for each trace; rows with the ratios."""
    profile = Profile.parse(profile_file.read_text())
    with laboratory(setting, profile_file) as lab:
        factor = calibrate(lab, lab.learnt(burst(setting)), setting, profile)
        out = [Row("step time in the server / in the profile", factor)]
        for name in names:
            script = lab.learnt(overload(name, setting, TARGETS, profile, factor))
            sent, played = lab.play(script, TARGETS)
            out += judge(name, setting, sent, played, profile, factor)
    return out


def judge(
    name: str,
    setting: Setting,
    sent: Sequence[TraceRequest],
    played: Played,
    profile: Profile,
    factor: float,
) -> list[Row]:
    real = played.figures(TARGETS)
    slowdown = played.slowdown

    def simulated_with(steps: Slowdown) -> dict[str, float]:
        return simulated_figures(sent, setting, TARGETS, profile, steps)

    say(f"{name}: steps took {slowdown.mean:.3f} times the profile's")
    return [
        Row(f"{name}: step time / profile's", slowdown.mean),
        *compare(
            name,
            real,
            simulated_with(slowdown),
            {
                "mean of the run": simulated_with(Slowdown(slowdown.mean)),
                "mean of the burst": simulated_with(Slowdown(factor)),
            },
        ),
    ]


def compare(
    name: str,
    real: dict[str, float],
    virtual: dict[str, float],
    others: Mapping[str, dict[str, float]],
) -> list[Row]:
    """`virtual` with steps as slow as in each second of the run, `others` with other ones."""
    worlds = (real, virtual, *others.values())
    lines = [(what, *(f"{figures[what]:.3g}" for figures in worlds)) for what in real]
    header = (name, "server", "simulated", *others)
    print(table(header, lines) + "\n", flush=True)
    goodput, output = "goodput requests/s", "output tok/s"
    ratio = virtual[goodput] / real[goodput] if real[goodput] else math.nan
    return [
        Row(f"{name}: goodput simulated / real, away from 1", abs(ratio - 1), TOLERANCE, "at most"),
        Row(f"{name}: goodput simulated / real", ratio),
        *(
            Row(
                f"{name}: goodput simulated / real, {steps}",
                figures[goodput] / real[goodput] if real[goodput] else math.nan,
            )
            for steps, figures in others.items()
        ),
        Row(f"{name}: output tok/s simulated / real", virtual[output] / real[output]),
        Row(f"{name}: requests within targets, real", real["within targets"]),
        Row(f"{name}: requests within targets, simulated", virtual["within targets"]),
        Row(f"{name}: pages in use, real", real["pages in use"]),
        Row(f"{name}: pages in use, simulated", virtual["pages in use"]),
    ]
