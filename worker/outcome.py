"""`Outcome`: what one forward has committed, in host memory as soon as its step is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from scheduler.plan import Row, RowResult
from scheduler.request import TokenLogprob
from worker.drafting import Drafting
from worker.sampler import Sampled
from worker.slots import SlotTable

NOT_FINITE = "the model produced logits that are not finite"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the rows of one forward. Its tensors are in host memory, see `Transfer.fetch`."""

    rows: Sequence[Row]
    prompt_logprobs: Mapping[int, tuple[TokenLogprob, ...]]  # by row
    sampling: Sequence[int] = ()  # the rows that sample
    starts: Sequence[int] = (0,)  # [sampling rows + 1] logits rows of each
    sampled: Sampled | None = None  # None: no row does

    def read(self, slots: SlotTable, drafting: Drafting | None) -> list[RowResult]:
        """One result per row, in order. Tells `slots` and `drafting` what was committed."""
        results = [
            RowResult(prompt_logprobs=self.prompt_logprobs.get(i, ()))
            for i in range(len(self.rows))
        ]
        if self.sampled is None:
            return results
        tokens, finite = self.sampled.tokens.tolist(), self.sampled.finite.tolist()
        none = [0] * len(self.sampling)
        accepted = self.sampled.accepted
        kept = none if accepted is None else accepted.tolist()
        spans = pairwise(self.starts)
        for i, (start, end), matched in zip(self.sampling, spans, kept, strict=True):
            row, committed = self.rows[i], slice(start, start + matched + 1)
            slots.bound[row.slot] -= row.drafts - matched
            if not all(finite[committed]):
                results[i] = RowResult(error=NOT_FINITE)
                continue
            result = results[i]
            result.tokens = tuple(tokens[committed])
            result.logprobs = self.sampled.logprobs_of(committed)
            result.proposed = end - start - 1
            if drafting is not None:
                drafted = drafting.committed(row.slot, tokens[start:end], matched)
                if drafted is not None:
                    result.drafter = drafted.drafter
                    result.confidence = tuple(drafted.guess.confidence)
        return results
