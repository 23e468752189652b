"""When the end of a step is told."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event

import pytest

from scheduler.plan import StepResult
from worker.executor import ThreadExecutor


class Step:
    """A step that has computed."""

    def __init__(self, number: int) -> None:
        self._number = number

    def wait(self) -> None:
        pass

    def read(self) -> StepResult:
        return StepResult(self._number, (), 0.0)


def step(number: int, *before: Callable[[], object]) -> Callable[[], Step]:
    def begin() -> Step:
        for act in before:
            act()
        return Step(number)

    return begin


def test_a_step_is_told_when_the_next_one_computes() -> None:
    executor = ThreadExecutor(1)
    launched, prepared, computing, go_on = Event(), Event(), Event(), Event()
    first = executor.submit(step(1, launched.wait))
    second = executor.submit(step(2, prepared.set, go_on.wait, executor.computes, computing.set))
    launched.set()
    assert prepared.wait(5)
    assert not first.done()  # the second wants the interpreter
    go_on.set()
    assert computing.wait(5)
    assert first.done()
    assert second.wait().step == 2
    executor.close()


def test_a_step_that_nothing_waits_behind_is_told_at_once() -> None:
    executor = ThreadExecutor(1)
    for number in range(20):
        assert executor.submit(step(number)).wait().step == number
    executor.close()


def test_steps_that_never_compute_are_told_in_order() -> None:
    executor = ThreadExecutor(1)
    for number in range(0, 20, 2):
        pair = executor.submit(step(number)), executor.submit(step(number + 1))
        assert [pending.wait().step for pending in pair] == [number, number + 1]
    executor.close()


def test_a_step_that_fails_hides_no_other() -> None:
    def fail() -> None:
        raise OSError("no such device")

    executor = ThreadExecutor(1)
    launched = Event()
    first = executor.submit(step(1, launched.wait))
    second = executor.submit(step(2, fail))
    launched.set()
    assert first.wait().step == 1
    with pytest.raises(OSError, match="no such device"):
        second.wait()
    executor.close()


def test_a_launch_that_finds_it_idle_returns_when_the_step_computes() -> None:
    executor = ThreadExecutor(1)
    computing, go_on = Event(), Event()
    before = computing.set, executor.computes, go_on.wait
    for number in range(2):
        first = executor.submit(step(2 * number, *before))
        assert computing.is_set()
        computing.clear()
        second = executor.submit(step(2 * number + 1, *before))  # one runs: at once
        assert not computing.is_set()
        go_on.set()
        assert (first.wait().step, second.wait().step) == (2 * number, 2 * number + 1)
        computing.clear()
        go_on.clear()
    executor.close()


def test_a_launch_does_not_wait_long() -> None:
    executor = ThreadExecutor(1)
    go_on = Event()
    pending = executor.submit(step(1, go_on.wait))
    assert not pending.done()
    go_on.set()
    assert pending.wait().step == 1
    executor.close()
