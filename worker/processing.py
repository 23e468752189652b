"""Runs the logits processors over the rows that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.sampling import processors
from kernels.sampling.processors import History, Penalties
from kernels.sampling.upload import upload
from worker.sampling_state import Need, Rules, SlotSampling


@dataclass(frozen=True, slots=True)
class SampleRows:
    """Which slot and position each logits row is, and what it needs."""

    host_slots: Sequence[int]  # [n]
    slot: Tensor  # [n] int64, the same on the device
    position: Tensor  # [n] int64, the absolute index the new token will occupy
    needs: list[int]  # [n] `Need` bits
    union: int  # of all needs

    @staticmethod
    def of(
        slots: SlotSampling,
        host_slots: Sequence[int],
        position: Tensor,
        slot: Tensor | None = None,
    ) -> SampleRows:
        """slot: `host_slots` on the device, where they are already there."""
        needs = [slots.needs[slot] for slot in host_slots]
        union = 0
        for need in needs:
            union |= need
        if slot is None:
            slot = upload(host_slots, slots.device)
        return SampleRows(host_slots, slot, position, needs, union)

    def needing(self, need: Need) -> list[int]:
        """The rows with this need."""
        bit = int(need)
        return [row for row, own in enumerate(self.needs) if own & bit]


class Penalize(Protocol):
    """`processors.penalize`, or a faster form of it."""

    def __call__(self, z: Tensor, rows: Tensor | None, history: History, by: Penalties) -> None: ...


def process(
    z: Tensor, rows: SampleRows, slots: SlotSampling, table: Tensor, penalize: Penalize
) -> None:
    """Penalties, bias, allowed ids and bans, in this order, in place on z: [n, vocab] float32.

    table: [slots, max_len] int32, the token table. Does not synchronise with the host.
    """
    device = z.device

    def history(slot: Tensor, position: Tensor) -> History:
        return History(table, slot, position, slots.prompt_len[slot])

    def ruled(
        need: Need, column: Callable[[Rules], Tensor]
    ) -> tuple[list[int], list[Rules], Tensor, Tensor]:
        """Rows, their rules, and laid end to end the ids of `column` with the row of each."""
        members = rows.needing(need)
        rules = [slots.rules[rows.host_slots[row]] for row in members]
        parts = [column(rule) for rule in rules]
        row_of_id = [row for row, ids in zip(members, parts, strict=True) for _ in range(len(ids))]
        return members, rules, upload(row_of_id, device), torch.cat(parts)

    if rows.union & Need.PENALTIES:
        members = rows.needing(Need.PENALTIES)
        at, slot, position = None, rows.slot, rows.position
        if len(members) < len(z):
            at = upload(members, device)
            slot, position = slot[at], position[at]
        by = Penalties(slots.repetition[slot], slots.frequency[slot], slots.presence[slot])
        penalize(z, at, history(slot, position), by)
    if rows.union & Need.BIAS:
        _, rules, row_of_id, ids = ruled(Need.BIAS, lambda rule: rule.bias_ids)
        processors.add_bias(z, row_of_id, ids, torch.cat([rule.bias for rule in rules]))
    if rows.union & Need.ALLOWED:
        members, _, row_of_id, ids = ruled(Need.ALLOWED, lambda rule: rule.allowed_ids)
        processors.allow_only(z, upload(members, device), row_of_id, ids)
    if rows.union & Need.BAD_WORDS:
        members, rules, row_of_id, ids = ruled(Need.BAD_WORDS, lambda rule: rule.bad_last)
        length = max(rule.bad_prefixes.shape[1] for rule in rules)
        prefixes = torch.cat(
            [
                pad(rule.bad_prefixes, (length - rule.bad_prefixes.shape[1], 0), value=-1)
                for rule in rules
            ]
        )
        before = history(rows.slot, rows.position)
        complete = processors.ends_with(before, row_of_id, prefixes)
        processors.ban(z, row_of_id, ids, complete)
    if rows.union & Need.MIN_TOKENS:
        _, _, row_of_id, ids = ruled(Need.MIN_TOKENS, lambda rule: rule.stop_ids)
        early = rows.position - slots.prompt_len[rows.slot] < slots.min_tokens[rows.slot]
        processors.ban(z, row_of_id, ids, early[row_of_id])
