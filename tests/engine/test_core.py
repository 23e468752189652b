"""The loop: order of launching and settling, aborts, deadlines, drain, several API processes."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from engine.core import EngineCore
from engine.messages import Abort, Dead, Drain, Hello, Ready, Rejected, Step, Submit
from engine.transport import LocalEngineTransport
from scheduler.profile import Profile, StepShape
from scheduler.request import FinishReason, Request, SamplingParams
from scheduler.scheduler import Scheduler
from scheduler.step_cost import StepCost
from tests.engine.workers import FACTS, ThreadedWorker, scheduler_config
from tests.fakes import Script


class Client:
    """Collects what one API process is sent."""

    def __init__(self, transport: LocalEngineTransport, identity: bytes = b"a") -> None:
        self.messages: list = []
        self._transport, self._identity = transport, identity
        transport.connect(identity, self.messages.append)

    def send(self, message) -> None:
        self._transport.post(self._identity, message)

    def outputs(self, request_id: str, choice: int = 0):
        return [
            output
            for message in self.messages
            if isinstance(message, Step)
            for output in message.outputs
            if (output.request_id, output.choice) == (request_id, choice)
        ]

    def tokens(self, request_id: str, choice: int = 0) -> tuple[int, ...]:
        return tuple(t for output in self.outputs(request_id, choice) for t in output.tokens)

    def finishes(self, request_id: str, choice: int = 0):
        return [o.finish for o in self.outputs(request_id, choice) if o.finish is not None]


class Engine:
    """A core driven by hand; steps end when the gate is released, or at once without one."""

    def __init__(
        self, gated=False, step_seconds=0.0, raise_at=None, clock=time.monotonic, **config
    ) -> None:
        self.gate = threading.Semaphore(0) if gated else None
        self.worker = ThreadedWorker(step_seconds, gate=self.gate, raise_at=raise_at)
        self.scheduler = Scheduler(scheduler_config(**config))
        self.transport = LocalEngineTransport()
        self.steps_ended = 0
        self.core = EngineCore(self.scheduler, self.worker, self.transport, FACTS, clock)

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.transport.wake()  # so that a turn without news does not block
            self.core.turn()

    def finish_step(self) -> None:
        """Lets one step end and gives the loop the turn that settles it."""
        self.gate.release()
        self.worker.launched[self.steps_ended].wait()
        self.steps_ended += 1
        self.turns(1)

    def run_until(self, finished) -> None:
        deadline = time.monotonic() + 10
        while not finished():
            assert time.monotonic() < deadline, "the loop does not end"
            self.core.turn()

    def close(self) -> None:
        if self.gate is not None:
            self.gate.release(10_000)
        self.worker.close()


@pytest.fixture
def make():
    made: list[Engine] = []

    def build(**options) -> Engine:
        made.append(Engine(**options))
        return made[-1]

    yield build
    for engine in made:
        engine.close()


def request(name: str = "r", prompt=(1, 2, 3), max_tokens: int = 6, n: int = 1, **changes):
    params = SamplingParams(max_tokens=max_tokens, seed=3)
    return Request(name, tuple(prompt), params, arrival=time.monotonic(), n=n, **changes)


def test_next_step_is_launched_before_the_result_is_read(make):
    engine = make(gated=True)
    client = Client(engine.transport)
    client.send(Submit(request()))
    engine.turns(1)
    # Step 0 has not ended, yet step 1 is with the worker; no third one.
    assert engine.worker.log == [("launch", 0), ("launch", 1)]
    engine.turns(3)
    assert engine.worker.log == [("launch", 0), ("launch", 1)]
    assert client.messages == []
    engine.finish_step()
    assert engine.worker.log == [("launch", 0), ("launch", 1), ("done", 0), ("launch", 2)]
    assert len(client.tokens("r")) == 1


def test_a_step_is_planned_when_the_one_before_is_nearly_over(make):
    """Who arrives while it runs is in the next one, not in the one after. With a step's time known:
    a second. The loop wakes up for it by itself."""
    now = [0.0]
    engine = make(gated=True, clock=lambda: now[0])
    engine.scheduler.cost = StepCost.from_profile(Profile(((StepShape(1, 1, 1), 1.0),)))
    client = Client(engine.transport)
    client.send(Submit(request("first")))
    engine.turns(2)
    assert engine.worker.log == [("launch", 0)]
    assert engine.core._patience() == pytest.approx(0.7)
    now[0] = 0.69
    client.send(Submit(request("second")))
    engine.turns(1)
    assert engine.worker.log == [("launch", 0)]
    now[0] = 0.71
    engine.turns(2)
    assert engine.worker.log == [("launch", 0), ("launch", 1)]
    assert engine.core._patience() is None
    now[0] = 1.0
    engine.finish_step()
    assert engine.core._patience() == pytest.approx(0.7, abs=0.02)
    engine.finish_step()
    assert len(client.tokens("first")) == 2
    assert len(client.tokens("second")) == 1, "it was in the second step"
    # The step has ended before it was expected to: the next one starts at once.
    assert engine.worker.log[-2:] == [("done", 1), ("launch", 2)]


@pytest.mark.parametrize("count", [1, 5])
def test_outputs_are_those_of_plain_decoding(make, count):
    engine = make()
    client = Client(engine.transport)
    wanted = [request(f"r{i}", prompt=range(1, 4 + 7 * i), n=1 + i % 2) for i in range(count)]
    for each in wanted:
        client.send(Submit(each))
    engine.run_until(lambda: all(client.finishes(r.id, r.n - 1) for r in wanted))
    for each in wanted:
        for choice in range(each.n):
            tokens, reason = Script().answer(each, choice)
            assert client.tokens(each.id, choice) == tokens
            assert [f.reason for f in client.finishes(each.id, choice)] == [reason]
    engine.turns(2)
    engine.scheduler.check()
    assert not engine.scheduler.has_work()


def test_one_message_per_settled_step(make):
    engine = make(gated=True)
    client = Client(engine.transport)
    for i in range(4):
        client.send(Submit(request(f"r{i}")))
    engine.turns(1)
    for steps in range(1, 5):
        engine.finish_step()
        assert len(client.messages) == steps
    assert len(client.messages[-1].outputs) == 4
    assert client.messages[-1].step_tokens == 4
    assert client.messages[-1].load.running == 4


def test_chunks_without_output_still_tell_of_progress(make):
    engine = make(gated=True, max_step_tokens=8, max_num_seqs=8)
    client = Client(engine.transport)
    client.send(Submit(request(prompt=range(1, 33))))
    engine.turns(1)
    engine.finish_step()
    assert [message.outputs for message in client.messages] == [()]
    assert client.messages[0].step_tokens == 8


def test_abort_counts_before_the_step_it_races_settles(make):
    engine = make(gated=True)
    client = Client(engine.transport)
    client.send(Submit(request()))
    engine.turns(1)
    engine.finish_step()
    seen = client.tokens("r")
    client.send(Abort("r"))
    engine.finish_step()  # ends with the abort already in the inbox
    assert client.tokens("r") == seen
    assert [finish.reason for finish in client.finishes("r")] == [FinishReason.ABORT]
    engine.finish_step()
    engine.turns(1)
    assert not engine.scheduler.has_work()
    engine.scheduler.check()
    client.send(Abort("r"))  # once more, and of something unknown
    client.send(Abort("nobody"))
    engine.turns(1)
    assert len(client.finishes("r")) == 1


def test_messages_are_heard_though_every_step_is_done_at_once(make):
    """A turn that settled as long as something was done would never end."""

    class Done:
        def __init__(self, result):
            self._result = result

        def wait(self):
            return self._result

        def done(self):
            return True

        def notify(self, callback):
            callback()

    engine = make()
    scripted = engine.worker.scripted
    engine.worker.launch = lambda plan: Done(scripted.execute(plan))
    client = Client(engine.transport)
    client.send(Submit(request(max_tokens=400)))
    engine.turns(5)
    client.send(Abort("r"))
    engine.turns(1)
    assert client.finishes("r")[0].reason is FinishReason.ABORT
    assert len(client.tokens("r")) < 10


def test_stop_found_on_text_is_a_natural_end_of_one_choice(make):
    engine = make()
    client = Client(engine.transport)
    client.send(Submit(request(n=2, max_tokens=300)))
    engine.run_until(lambda: len(client.tokens("r", 0)) > 3)
    client.send(Abort("r", 0, FinishReason.STOP, tokens_kept=2))
    engine.run_until(lambda: client.finishes("r", 1))
    (finish,) = client.finishes("r", 0)
    assert (finish.reason, finish.completion_tokens) == (FinishReason.STOP, 2)
    assert client.finishes("r", 1)[0].reason is FinishReason.LENGTH


def test_overdue_request_is_ended_on_the_engines_clock(make):
    engine = make(step_seconds=0.01)
    client = Client(engine.transport)
    arrival = 1000.0  # another clock: only the difference counts
    client.send(Submit(replace(request(max_tokens=400), arrival=arrival, deadline=arrival + 0.1)))
    started = time.monotonic()
    engine.run_until(lambda: client.finishes("r"))
    assert 0.1 <= time.monotonic() - started < 1.0
    assert client.finishes("r")[0].reason is FinishReason.TIMEOUT


def test_what_another_engine_had_accepted_keeps_its_age_and_its_tokens(make):
    engine = make(max_queued_requests=1, max_num_seqs=1)
    client = Client(engine.transport)
    wanted = request(max_tokens=6, n=3)
    answers = [Script().answer(wanted, choice)[0] for choice in range(3)]
    resumed = replace(wanted, arrival=1000.0, produced=(answers[0][:4], None, ()))
    for name in ("r", "s", "t"):  # more than may wait, but they were taken once
        client.send(Submit(replace(resumed, id=name), 50.0))
    client.send(Submit(replace(resumed, id="late", deadline=1049.9), 50.0))
    engine.run_until(lambda: client.finishes("t", 2) and client.finishes("late", 2))
    assert not any(isinstance(message, Rejected) for message in client.messages)
    for name in ("r", "s", "t"):
        assert client.tokens(name, 0) == answers[0][4:]
        assert client.tokens(name, 2) == answers[2]
        assert client.outputs(name, 1) == []
        for choice in (0, 2):
            (finish,) = client.finishes(name, choice)
            assert finish.completion_tokens == 6
            assert finish.finished - finish.arrival > 50.0
    for choice in (0, 2):
        (finish,) = client.finishes("late", choice)
        assert finish.reason is FinishReason.TIMEOUT


def test_refusals(make):
    engine = make(max_queued_requests=1, max_num_seqs=1, max_model_len=64)
    client = Client(engine.transport)
    client.send(Submit(request("long", prompt=range(1, 70))))
    client.send(Submit(request("a")))
    client.send(Submit(request("a")))
    client.send(Submit(request("b")))
    engine.turns(1)
    refused = {(m.request_id, m.code) for m in client.messages if isinstance(m, Rejected)}
    assert refused == {
        ("long", "context_length_exceeded"),
        ("a", "invalid"),
        ("b", "queue_full"),
    }
    (full,) = [m for m in client.messages if isinstance(m, Rejected) and m.code == "queue_full"]
    assert full.retry_after >= 1.0
    engine.run_until(lambda: client.finishes("a"))
    assert client.tokens("a") == Script().answer(request("a"))[0]


def test_an_idle_hour_does_not_make_retry_after_long(make):
    now = [0.0]
    engine = make(clock=lambda: now[0], max_num_seqs=1, max_queued_requests=1)
    client = Client(engine.transport)
    for i in range(30):
        client.send(Submit(request(str(i))))
        engine.run_until(lambda i=i: client.finishes(str(i)))
        now[0] += 3600.0
    for name in ("running", "waiting", "refused"):
        client.send(Submit(request(name, max_tokens=400)))
        engine.turns(1)
    (refused,) = [m for m in client.messages if isinstance(m, Rejected)]
    assert (refused.request_id, refused.retry_after) == ("refused", 1.0)


def test_a_request_that_would_miss_its_target_is_refused_and_taken_later(make):
    engine = make(step_seconds=0.002, max_num_seqs=1)
    client = Client(engine.transport)
    for i in range(30):
        client.send(Submit(request(str(i))))
        engine.run_until(lambda i=i: client.finishes(str(i)))
    for i in range(20):
        client.send(Submit(request(f"long{i}", max_tokens=100)))
    client.send(Submit(request("late", ttft_target=0.05)))
    client.send(Submit(request("patient", ttft_target=500.0)))
    engine.turns(2)
    (refused,) = [m for m in client.messages if isinstance(m, Rejected)]
    assert (refused.request_id, refused.code) == ("late", "ttft_target")
    assert 1.0 <= refused.retry_after <= 60.0
    assert engine.scheduler.load().predicted_wait > 0.05
    for i in range(20):
        client.send(Abort(f"long{i}"))
    engine.run_until(lambda: client.finishes("patient"))
    client.send(Submit(request("late", ttft_target=0.05)))
    engine.run_until(lambda: client.finishes("late"))


def test_drain_refuses_finishes_and_ends(make):
    engine = make()
    client = Client(engine.transport)
    client.send(Submit(request("a", max_tokens=20)))
    client.send(Drain(30.0))
    client.send(Submit(request("b")))
    engine.core.run()
    assert client.tokens("a") == Script().answer(request("a", max_tokens=20))[0]
    assert [m.code for m in client.messages if isinstance(m, Rejected)] == ["draining"]


def test_drain_deadline_aborts_the_rest(make):
    engine = make(gated=True)
    client = Client(engine.transport)
    client.send(Submit(request("a", n=2)))
    engine.turns(1)
    client.send(Drain(0.05))
    engine.core.run()
    assert client.finishes("a", 0)[0].reason is FinishReason.ABORT
    assert client.finishes("a", 1)[0].reason is FinishReason.ABORT


def test_api_processes_share_an_engine_even_with_equal_ids(make):
    engine = make()
    first, second = Client(engine.transport, b"a"), Client(engine.transport, b"b")
    for client in (first, second):
        client.send(Hello())
    first.send(Submit(request("same", prompt=(1, 2))))
    second.send(Submit(request("same", prompt=(3, 4), max_tokens=30)))
    engine.run_until(lambda: first.finishes("same"))
    second.send(Abort("same"))
    engine.run_until(lambda: second.finishes("same"))
    assert first.tokens("same") == Script().answer(request(prompt=(1, 2)))[0]
    expected = Script().answer(request(prompt=(3, 4), max_tokens=30))[0]
    assert second.tokens("same") == expected[: len(second.tokens("same"))]
    assert isinstance(first.messages[0], Ready)
    assert first.messages[0].facts == FACTS


def test_requests_of_a_lost_api_process_are_aborted(make):
    engine = make()
    gone, there = Client(engine.transport, b"gone"), Client(engine.transport, b"there")
    gone.send(Submit(request("x", max_tokens=400)))
    there.send(Submit(request("y", max_tokens=400)))
    engine.run_until(lambda: gone.tokens("x"))
    engine.transport.disconnect(b"gone")
    engine.run_until(lambda: engine.scheduler.load().running == 1)
    there.send(Abort("y"))
    engine.run_until(lambda: there.finishes("y"))
    engine.run_until(lambda: not engine.scheduler.has_work())
    engine.scheduler.check()


def test_worker_fault_ends_the_loop_and_is_announced(make):
    engine = make(raise_at=2)
    client = Client(engine.transport)
    client.send(Submit(request(max_tokens=50)))
    with pytest.raises(RuntimeError, match="scripted fault"):
        engine.core.run()
    engine.core.announce_death("a fault")
    assert client.messages[-1] == Dead("a fault")


def test_the_last_message_of_an_idle_engine_shows_no_page_held(make):
    """The step in flight when a sequence ends keeps its pages fenced; its end is told too."""
    engine = make()
    client = Client(engine.transport)
    client.send(Hello())
    prompt = tuple(range(40))
    whole = Request("whole", prompt, SamplingParams(max_tokens=30, seed=1), 0.0)
    client.send(Submit(whole))
    engine.run_until(lambda: client.finishes("whole"))
    stop = frozenset(client.tokens("whole")[9:10])
    stopped = replace(whole, id="stopped", params=replace(whole.params, stop_token_ids=stop))
    client.send(Submit(stopped))
    engine.run_until(lambda: client.finishes("stopped"))
    assert client.finishes("stopped")[0].reason is FinishReason.STOP
    engine.run_until(lambda: not engine.scheduler.has_work())
    assert client.messages[-1].load.pages_held == 0
