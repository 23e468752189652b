"""The one sampler: logits rows to tokens.

A logits row is a (slot, position): `position` is the absolute index the new token will occupy and
`tokens[slot, :position]` of the token table its history. The token is a pure function of the row's
logits, the slot's parameters, the history and the position; neither the other rows of the batch
nor earlier calls have a say. The order is

    repetition, frequency and presence penalties -> logit bias -> allowed ids -> bad words ->
    min tokens -> temperature -> min-p -> top-k -> top-p -> argmax(z + g), ties to the lowest id

and greedy rows (temperature 0) end after min tokens with the argmax. Bad words look at the whole
history, the prompt included. See kernels/sampling/ for the definition of each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from kernels.sampling import pruned, reference
from kernels.sampling.accept import Drafts
from kernels.sampling.logprobs import RowLogprobs, row_logprobs
from kernels.sampling.reference import Chosen, Draws, NoiseKey, Truncation
from kernels.sampling.upload import upload
from scheduler.request import TokenLogprob
from worker.processing import Penalize, SampleRows, process
from worker.sampling_state import Need, SlotSampling


class Form(Protocol):
    """One implementation of the choice: kernels/sampling/reference.py, or a faster one."""

    @property
    def penalize(self) -> Penalize: ...

    def usable(self, logits: Tensor) -> Tensor: ...

    def choose(
        self,
        logits: Tensor,
        draws: Draws | None = None,
        raw_usable: Tensor | None = None,
        drafts: Drafts | None = None,
    ) -> Chosen: ...


@dataclass(frozen=True, slots=True)
class AskedLogprobs:
    """Log-probabilities of the rows that asked for them."""

    index: dict[int, int]  # logits row -> row of `values`
    top: list[int]  # how many top tokens each asked for
    values: RowLogprobs


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome for `n` logits rows, on the device until it is fetched."""

    tokens: Tensor  # [n] int64
    # [n] bool. False: the logits, raw or processed, held NaN or +inf, or nothing was left to choose
    # from (the model gave -inf throughout, or allowed ids and bans exclude everything). The row's
    # token is then 0 and its request should fail.
    finite: Tensor
    accepted: Tensor | None = None  # [sequences] int64, of the drafts that were to judge
    asked: AskedLogprobs | None = None

    def fetched(self, fetch: Callable[[Tensor], Tensor]) -> Sampled:
        """The same in host memory; see `Transfer.fetch`."""
        asked = self.asked
        if asked is not None:
            found = asked.values
            values = RowLogprobs(
                logprob=fetch(found.logprob),
                rank=fetch(found.rank),
                top_ids=fetch(found.top_ids),
                top_logprobs=fetch(found.top_logprobs),
            )
            asked = replace(asked, values=values)
        accepted = None if self.accepted is None else fetch(self.accepted)
        return Sampled(fetch(self.tokens), fetch(self.finite), accepted, asked)

    def logprobs_of(self, rows: slice) -> tuple[TokenLogprob, ...]:
        """One entry per row in `rows`; empty when they did not ask. Reads the values.

        The rows of a slice belong to one sequence, so either all of them asked or none.
        """
        if self.asked is None or rows.start not in self.asked.index:
            return ()
        start = self.asked.index[rows.start]
        chosen = slice(start, start + rows.stop - rows.start)
        return _token_logprobs(
            self.asked.values, chosen, self.tokens[rows].tolist(), self.asked.top[start]
        )


class Sampler:
    """Samples for the slots of one worker. Not thread-safe: the worker's thread owns it."""

    def __init__(self, slots: SlotSampling, tokens: Tensor) -> None:
        """tokens: [slots, max_len] int32, the token table; read at every call, never written."""
        self.slots = slots
        self._tokens = tokens
        # Compacting candidates needs shapes that depend on data, which is free on the CPU only.
        self._form: Form = pruned if slots.device.type == "cpu" else reference

    def use(self, form: Form) -> None:
        """Draws by another form from now on; as all give the same tokens, at any time."""
        self._form = form

    def sample(
        self,
        logits: Tensor,
        slots_of_rows: Sequence[int],
        positions: Tensor,
        device_slots: Tensor | None = None,
        drafts: Drafts | None = None,
    ) -> Sampled:
        """Chooses a token for each row.

        logits: [n, vocab] float32, contiguous, not written; slots_of_rows: n slots, on the host;
        positions: [n] int64 on the device; device_slots: the slots there, [n] int64, if they are;
        drafts: what the rows judge, if there are any.
        """
        rows = SampleRows.of(self.slots, slots_of_rows, positions, device_slots)
        chosen = self._choose(logits, rows, drafts)
        tokens = chosen.tokens
        asked = self._logprobs(logits, tokens, rows) if rows.union & Need.LOGPROBS else None
        return Sampled(tokens, chosen.usable, chosen.accepted, asked)

    def draw(
        self, logits: Tensor, slots_of_rows: Sequence[int], positions: Tensor, device_slots: Tensor
    ) -> Tensor:
        """`Sampled.tokens` alone."""
        rows = SampleRows.of(self.slots, slots_of_rows, positions, device_slots)
        return self._choose(logits, rows, None).tokens

    def prompt_logprobs(
        self, logits: Tensor, targets: Sequence[int], top: int
    ) -> list[TokenLogprob]:
        """About given tokens: logits [n, vocab] float32, one target id and one entry per row."""
        values = row_logprobs(logits, upload(list(targets), logits.device), top)
        return list(_token_logprobs(values, slice(0, len(targets)), targets, top))

    def _choose(self, logits: Tensor, rows: SampleRows, drafts: Drafts | None) -> Chosen:
        raw_usable = None
        if rows.union & Need.PROCESSING:
            raw_usable = self._form.usable(logits)
            logits = logits.clone()
            process(logits, rows, self.slots, self._tokens, self._form.penalize)
        return self._form.choose(logits, self._draws(rows), raw_usable, drafts)

    def _draws(self, rows: SampleRows) -> Draws | None:
        """None if all rows are greedy."""
        if not rows.union & Need.NOISE:
            return None
        slots, slot = self.slots, rows.slot
        limits = None
        if rows.union & Need.TRUNCATION:
            limits = Truncation(slots.log_min_p[slot], slots.top_k[slot], slots.top_p[slot])
        key = NoiseKey(slots.seed[slot], slots.choice[slot], rows.position)
        return Draws(slots.temperature[slot], key, limits)

    def _logprobs(self, logits: Tensor, tokens: Tensor, rows: SampleRows) -> AskedLogprobs:
        asked = rows.needing(Need.LOGPROBS)
        top = [self.slots.logprobs[rows.host_slots[row]] for row in asked]
        if len(asked) < len(rows.needs):
            at = upload(asked, logits.device)
            logits, tokens = logits[at], tokens[at]
        values = row_logprobs(logits, tokens, max(top))
        return AskedLogprobs({row: i for i, row in enumerate(asked)}, top, values)


def _token_logprobs(
    values: RowLogprobs, rows: slice, tokens: Sequence[int], top: int
) -> tuple[TokenLogprob, ...]:
    ids = values.top_ids[rows, :top].tolist()
    logprobs = values.top_logprobs[rows, :top].tolist()
    return tuple(
        TokenLogprob(token, logprob, rank, tuple(zip(row_ids, row_logprobs, strict=True)))
        for token, logprob, rank, row_ids, row_logprobs in zip(
            tokens,
            values.logprob[rows].tolist(),
            values.rank[rows].tolist(),
            ids,
            logprobs,
            strict=True,
        )
    )
