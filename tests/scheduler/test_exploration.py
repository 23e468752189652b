"""What finding out whether drafts pay may take."""

from __future__ import annotations

from random import Random

from scheduler.exploration import (
    DECISION,
    DECISION_SHARE,
    EARLY_DECISIONS,
    EARLY_PROBES,
    PROBE_SHARE,
    SAVED_DECISIONS,
    Exploration,
)


def test_neither_probes_nor_decisions_take_more_than_their_share() -> None:
    """Probes that take ten times what they are predicted to take, too."""
    rng, exploration = Random(1), Exploration()
    passed = probes = decisions = early = 0.0  # `early`: seconds, if all of a step were for it
    for step in range(20_000):
        seconds = rng.uniform(1e-3, 5e-3)
        exploration.earn(seconds)
        passed += seconds
        early += seconds / (step + 1)
        if exploration.decide():
            decisions += DECISION
        price = rng.uniform(0.1e-3, 1e-3)
        if exploration.probe(price):
            took = rng.choice((0.5, 1.0, 10.0)) * price
            exploration.charge(took)
            probes += took
    assert early < 1e-3 * passed
    most = PROBE_SHARE * passed + EARLY_PROBES * early + 0.01
    assert 0.9 * PROBE_SHARE * passed < probes < most
    saved = SAVED_DECISIONS * DECISION
    assert 0.9 * DECISION_SHARE * passed < decisions
    assert decisions <= DECISION_SHARE * passed + EARLY_DECISIONS * early + saved


def test_a_few_decisions_are_saved_up() -> None:
    exploration = Exploration()
    exploration.earn(100.0)
    assert [exploration.decide() for _ in range(SAVED_DECISIONS + 1)] == [True] * 2 + [False]
