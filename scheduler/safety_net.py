"""`SafetyNet`: ends drafting for a while where it was slower than plain decoding."""

from __future__ import annotations

PATIENCE = 64  # steps with drafts that are looked at together
TOLERATED = 0.98  # of what plain decoding would have brought: such counts are noisy
PAUSE = 64  # plans without drafts after a loss; doubled each time in a row
LONGEST_PAUSE = 8 * PAUSE


class SafetyNet:
    """Counts the tokens of steps with drafts, and those that plain decoding would have brought in
    their time."""

    def __init__(self) -> None:
        self._steps = 0
        self._tokens = self._plain = 0.0
        self._pause = PAUSE

    def saw(self, tokens: int, plain: float) -> int:
        """A step with drafts. Returns for how many plans there should be none: mostly 0."""
        self._steps += 1
        self._tokens += tokens
        self._plain += plain
        if self._steps < PATIENCE:
            return 0
        lost = self._tokens < TOLERATED * self._plain
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE) if lost else PAUSE
        self._steps, self._tokens, self._plain = 0, 0.0, 0.0
        return pause if lost else 0
