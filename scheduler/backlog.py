"""`Backlog`: what the waiting sequences will ask for, kept as running sums.

An arrival asks what is ahead of it; walking thousands of waiting sequences for each would cost more
than serving it. So sums are kept by class, which is a tenant's sequences of one priority.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from scheduler.fair_share import OUTPUT_WEIGHT, PROMPT_WEIGHT
from scheduler.request import Request
from scheduler.sequence import Phase, Sequence

_RATE = 0.02  # smoothing of the mean length, per answer
_FEW = 50  # answers after which a guess drawn from them counts half


@dataclass(slots=True)
class Work:
    """What some sequences still ask for, summed."""

    sequences: float = 0.0
    prompt: float = 0.0  # known tokens to compute
    output: float = 0.0  # tokens they will produce
    steps: float = 0.0  # steps that takes
    positions: float = 0.0  # KV positions each holds on average while it runs
    area: float = 0.0  # positions · steps, of each

    def add(self, other: Work, share: float = 1.0) -> None:
        self.sequences += share * other.sequences
        self.prompt += share * other.prompt
        self.output += share * other.output
        self.steps += share * other.steps
        self.positions += share * other.positions
        self.area += share * other.area

    @property
    def service(self) -> float:
        """What fair share will charge for it."""
        return PROMPT_WEIGHT * self.prompt + OUTPUT_WEIGHT * self.output


def work_of(prompt: int, held: int, output: float, pace: float) -> Work:
    """Of one sequence that has `prompt` tokens to compute and `held` positions before its next
    output, then produces `output` tokens at `pace` a step."""
    steps = output / pace
    positions = held + output / 2
    return Work(1.0, prompt, output, steps, positions, positions * steps)


@dataclass(slots=True)
class Answers:
    """What is known of the length of answers beyond each sequence's guess."""

    ends: int = 0
    mean: float = 1.0  # tokens, smoothed

    def add(self, tokens: int) -> None:
        self.ends += 1
        self.mean += max(_RATE, 1.0 / self.ends) * (tokens - self.mean)

    def left(self, sequence: Sequence, trust: float) -> float:
        """Output tokens a sequence is expected to produce yet; at least one.

        Guesses that were drawn from the past are far too long while there is little of it, and say
        less about a sequence than the mean does: `trust` is their share.
        """
        produced = sequence.output_len
        left: float = sequence.guess - produced
        # What outlived most of the mean tends to go on for a while.
        usual = min(max(self.mean - produced, self.mean / 3), sequence.cap - produced)
        if left <= 0:  # the policy guesses nothing
            left = usual
        elif sequence.levels:
            left = trust * left + (1.0 - trust) * usual
        return max(left, 1.0)

    @property
    def trust(self) -> float:
        """In the guesses of running sequences, which know what these have produced."""
        return self.ends / (self.ends + _FEW)


@dataclass(slots=True)
class _Class:
    work: Work = field(default_factory=Work)
    arrivals: float = 0.0  # arrival times, summed


class Backlog:
    """The sums. `add` and `remove` are called by the waiting queue."""

    __slots__ = ("_classes", "_entries", "answers")

    def __init__(self) -> None:
        self.answers = Answers()
        self._classes: dict[str, dict[int, _Class]] = {}  # by tenant, by priority
        self._entries: dict[Sequence, Work] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sequence: Sequence) -> None:
        work = _of_waiting(sequence, self.answers)
        self._entries[sequence] = work
        request = sequence.request
        tenant = self._classes.setdefault(request.tenant, {})
        into = tenant.setdefault(request.priority, _Class())
        into.work.add(work)
        into.arrivals += request.arrival

    def remove(self, sequence: Sequence) -> None:
        request = sequence.request
        tenant = self._classes[request.tenant]
        out_of = tenant[request.priority]
        out_of.work.add(self._entries.pop(sequence), -1.0)
        out_of.arrivals -= request.arrival
        if out_of.work.sequences < 0.5:  # none is left: rounding errors end with it
            del tenant[request.priority]
            if not tenant:
                del self._classes[request.tenant]

    def sequences(self) -> list[Sequence]:
        return list(self._entries)

    def renew(self) -> None:
        """Sums up again, for guesses of length have changed."""
        sequences = self.sequences()
        self._classes.clear()
        self._entries.clear()
        for sequence in sequences:
            self.add(sequence)

    def total(self) -> Work:
        work = Work()
        for tenant in self._classes:
            work.add(self._of_tenant(tenant))
        return work

    def ahead_of(
        self, request: Request, now: float, ageing: float, served: Callable[[str], int]
    ) -> Work:
        """What is admitted before a request that arrives now, if nobody arrives after it.

        Of its own tenant: those of its priority and of more urgent ones, and of less urgent ones
        those who have waited long enough to make up for it, as if arrivals were spread evenly. Of
        every other tenant: as much as it may have until its counter, `served`, has come to what
        this tenant's will be by then. Lengths are expected ones, so this is a smoothed account of
        turns that really go sequence by sequence.
        """
        own = Work()
        for priority, of_class in self._classes.get(request.tenant, {}).items():
            own.add(of_class.work, _share_ahead(of_class, priority - request.priority, now, ageing))
        ahead = Work()
        ahead.add(own)
        if len(self._classes) > (request.tenant in self._classes):
            until = own.service + served(request.tenant)
            for tenant in self._classes:
                if tenant != request.tenant:
                    work = self._of_tenant(tenant)
                    allowed = until - served(tenant)
                    ahead.add(work, min(max(allowed / work.service, 0.0), 1.0))
        return ahead

    def _of_tenant(self, tenant: str) -> Work:
        work = Work()
        for of_class in self._classes[tenant].values():
            work.add(of_class.work)
        return work

    def check(self, waiting: list[Sequence]) -> None:
        """Raises `AssertionError` unless it knows exactly these and its sums are right."""
        assert set(self._entries) == set(waiting)
        total, expected = self.total(), Work()
        for work in self._entries.values():
            expected.add(work)
        for name in Work.__slots__:
            have, want = getattr(total, name), getattr(expected, name)
            assert abs(have - want) <= 1e-6 * (1.0 + abs(want)), (name, have, want)


def _share_ahead(of_class: _Class, levels: int, now: float, ageing: float) -> float:
    """The share of a class that goes before a newcomer `levels` more urgent than it."""
    if levels <= 0:
        return 1.0
    mean_wait = now - of_class.arrivals / of_class.work.sequences
    return max(1.0 - levels * ageing / (2 * mean_wait), 0.0) if mean_wait > 0 else 0.0


def _of_waiting(sequence: Sequence, answers: Answers) -> Work:
    known, output = len(sequence.tokens), answers.left(sequence, 0.0)
    if sequence.phase is Phase.PARKED:  # shares the pages of its prompt
        return work_of(1, sequence.output_len, output, sequence.pace)
    return work_of(known, known, output, sequence.pace)
