"""A worker for tests of the loop and of real engine processes: the scripted one, on a thread.

Processes are told what to do through the model's name: `scripted?step_seconds=0.01&raise_at=5`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import parse_qs

from engine.config import EngineConfig
from engine.errors import StartupError
from engine.messages import EngineFacts
from scheduler.plan import StepPlan, StepResult
from scheduler.request import SchedulerConfig
from tests.fakes import ScriptedWorker

VOCAB = 50
PAGE_SIZE = 4
NUM_PAGES = 1025
BUILDER = "tests.engine.workers:build"


def scheduler_config(**changes) -> SchedulerConfig:
    known = {
        "num_pages": NUM_PAGES,
        "page_size": PAGE_SIZE,
        "max_num_seqs": 16,
        "max_step_tokens": 64,
        "max_model_len": 512,
    }
    return SchedulerConfig(**{**known, **changes})


FACTS = EngineFacts(
    max_model_len=512,
    vocab_size=VOCAB,
    num_pages=NUM_PAGES,
    page_size=PAGE_SIZE,
    max_num_seqs=16,
    max_logprobs=20,
    device="scripted",
    dtype="none",
)


class FutureStep:
    def __init__(self, future: Future[StepResult]) -> None:
        self._future = future

    def wait(self) -> StepResult:
        return self._future.result()

    def done(self) -> bool:
        return self._future.done()

    def notify(self, callback: Callable[[], None]) -> None:
        self._future.add_done_callback(lambda _: callback())


@dataclass(frozen=True)
class Facts:
    vocab_size: int = VOCAB
    max_model_len: int = 512
    num_pages: int = NUM_PAGES
    page_size: int = PAGE_SIZE
    device: str = "scripted"
    dtype: str = "none"
    drafters: tuple[str, ...] = ()
    beside: float = 0.0


class ThreadedWorker:
    """Runs the scripted steps in order on a thread of its own, `step_seconds` each.

    With a `gate`, each step waits for one `gate.release()` first. A prompt with the token `poison`
    kills the process.
    """

    def __init__(
        self,
        step_seconds: float = 0.0,
        gate: threading.Semaphore | None = None,
        raise_at: int | None = None,
        kill_at: int | None = None,
        hang_at: int | None = None,
        poison: int | None = None,
        vocab_size: int = VOCAB,
    ) -> None:
        self.lost: Future[str] = Future()
        self.facts = Facts(vocab_size)  # its own tokens are below VOCAB whatever it claims
        self.scripted = ScriptedWorker(num_pages=NUM_PAGES, page_size=PAGE_SIZE)
        self.log: list[tuple[str, int]] = []
        self.launched: list[FutureStep] = []
        self._step_seconds = step_seconds
        self._gate = gate
        self._raise_at, self._kill_at, self._hang_at = raise_at, kill_at, hang_at
        self._poison = poison
        self._pool = ThreadPoolExecutor(max_workers=1)

    def launch(self, plan: StepPlan) -> FutureStep:
        self.log.append(("launch", plan.step))
        self.launched.append(FutureStep(self._pool.submit(self._execute, plan)))
        return self.launched[-1]

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _execute(self, plan: StepPlan) -> StepResult:
        poisoned = any(row.chunk and self._poison in row.chunk for row in plan.rows)
        if plan.step == self._kill_at or poisoned:
            os.kill(os.getpid(), 9)
        if plan.step == self._hang_at:
            time.sleep(60)
        if self._gate is not None:
            self._gate.acquire()
        time.sleep(self._step_seconds)
        if plan.step == self._raise_at:
            raise RuntimeError("scripted fault")
        self.log.append(("done", plan.step))
        return self.scripted.execute(plan)


def model(**options: object) -> str:
    return "scripted?" + "&".join(f"{name}={value}" for name, value in options.items())


def build(
    config: EngineConfig, progress: Callable[[str], None]
) -> tuple[ThreadedWorker, SchedulerConfig]:
    options = {
        name: values[0] for name, values in parse_qs(config.model.model.partition("?")[2]).items()
    }
    progress("scripted")
    if "refuse" in options:
        raise StartupError(options["refuse"])
    if "crash" in options:
        raise RuntimeError(options["crash"])
    if "exit" in options:
        os._exit(int(options["exit"]))
    worker = ThreadedWorker(
        step_seconds=float(options.get("step_seconds", 0)),
        raise_at=int(options["raise_at"]) if "raise_at" in options else None,
        kill_at=int(options["kill_at"]) if "kill_at" in options else None,
        hang_at=int(options["hang_at"]) if "hang_at" in options else None,
        poison=int(options["poison"]) if "poison" in options else None,
        vocab_size=int(options.get("vocab_size", VOCAB)),
    )
    return worker, scheduler_config(max_queued_requests=config.schedule.max_queued_requests)
