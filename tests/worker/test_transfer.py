"""What is sent arrives whole and in order, and no buffer is filled while it is being copied."""

from __future__ import annotations

import random

import pytest
import torch

from worker.transfer import FIRST_CAPACITY, HostTransfer, Staging

CPU = torch.device("cpu")


class Event:
    """Notes when it is waited for."""

    made: list[Event]

    def __init__(self) -> None:
        self.recorded = self.waited = 0
        Event.made.append(self)

    def record(self) -> None:
        self.recorded += 1

    def synchronize(self) -> None:
        self.waited += 1


def staging(buffers: int) -> Staging:
    Event.made = []
    return Staging(CPU, Event, buffers)


@pytest.mark.parametrize("kind", ["host", "staging"])
def test_parts_arrive_as_they_are(kind: str) -> None:
    sender = HostTransfer() if kind == "host" else staging(2)
    rng = random.Random(0)
    for _ in range(30):
        parts = [
            [rng.randrange(-(2**62), 2**62) for _ in range(rng.randrange(9))]
            for _ in range(rng.randrange(1, 6))
        ]
        found = sender.send(*parts, range(3), (7,))
        assert [part.tolist() for part in found] == [*parts, [0, 1, 2], [7]]
        assert all(part.dtype == torch.int64 for part in found)


def test_more_than_a_buffer_holds() -> None:
    (found,) = staging(1).send(range(FIRST_CAPACITY + 5))
    assert torch.equal(found, torch.arange(FIRST_CAPACITY + 5))


def test_buffers_take_turns_and_are_waited_for_before_they_are_filled_again() -> None:
    sender = staging(3)
    sent = [sender.send([i])[0] for i in range(7)]
    assert [event.recorded for event in Event.made] == [3, 2, 2]
    assert [event.waited for event in Event.made] == [3, 2, 2]
    assert [int(x) for x in sent] == list(range(7))  # what was sent is not the buffer


def test_a_step_on_the_host_lasts_until_it_is_read() -> None:
    span = HostTransfer().begin()
    span.end()
    span.wait()
    first = span.seconds()
    assert 0.0 <= first <= span.seconds()
