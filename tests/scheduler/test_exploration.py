"""What finding out whether drafts pay may take."""

from __future__ import annotations

from random import Random

from scheduler.exploration import (
    DECISION,
    DECISION_SHARE,
    EARLY,
    PROBE_SHARE,
    SAVED_DECISIONS,
    Exploration,
)


def test_neither_probes_nor_decisions_take_more_than_their_share() -> None:
    """Probes that take ten times what they are predicted to take, too."""
    rng, exploration = Random(1), Exploration()
    passed = probes = decisions = early = 0.0
    for step in range(20_000):
        seconds = rng.uniform(1e-3, 5e-3)
        exploration.earn(seconds)
        passed += seconds
        early += EARLY * seconds / (step + 1)
        if exploration.decide():
            decisions += DECISION
        price = rng.uniform(0.1e-3, 1e-3)
        if exploration.probe(price):
            took = rng.choice((0.5, 1.0, 10.0)) * price
            exploration.charge(took)
            probes += took
    assert early < 0.1 * PROBE_SHARE * passed
    assert 0.9 * PROBE_SHARE * passed < probes < PROBE_SHARE * passed + early + 0.01
    saved = SAVED_DECISIONS * DECISION
    assert 0.9 * DECISION_SHARE * passed < decisions <= DECISION_SHARE * passed + saved


def test_a_few_decisions_are_saved_up() -> None:
    exploration = Exploration()
    exploration.earn(100.0)
    assert [exploration.decide() for _ in range(SAVED_DECISIONS + 1)] == [True] * 2 + [False]
