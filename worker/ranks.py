"""How the ranks of tensor parallelism keep step: rank 0 decides, the others follow.

Rank 0 is the whole worker: slots, drafters, sampler. What it sends is not the plan but what becomes
of it, the laid out batch of each forward, and the rows to make logits of. So the other ranks hold a
part of the model and their pages, and nothing else. They sample nothing and draft nothing: whatever
depends on time (how long drafting may take, kernels that become ready in the background) is decided
once, and no two ranks can come to differ about a token. The price is a broadcast of a few numbers a
token, once a forward, beside two sums of whole hidden states a layer.

Each act begins with a `Command` on a channel between the processes, which says the shapes, so that
a follower knows without waiting for its device what to launch; tensors then go through the process
group. Commands come in the order of the worker's thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from kernels.cpu.chain import NativeChain
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch
from models.parallel import Collective, CollectiveError
from scheduler.plan import PageCopy
from worker.kv_pool import copy_halves, copy_pages
from worker.runner import Runner


class Forward(msgspec.Struct, tag=True, frozen=True):
    """One ragged step, with the sizes of its batch; see `AttentionBatch`."""

    tokens: int
    rows: int
    pages: int  # columns of the page table
    max_query: int
    max_kv: int
    dense_pages: int = 0  # of the pool, where windows have any
    coarse: bool = False


class Logits(msgspec.Struct, tag=True, frozen=True):
    """So many rows of hidden states to the vocabulary."""

    rows: int


class Copies(msgspec.Struct, tag=True, frozen=True):
    """Pages to host memory, or back."""

    pages: list[tuple[int, int]]  # source, target
    to_host: bool


class Demotions(msgspec.Struct, tag=True, frozen=True):
    """Halves of pages to other halves."""

    halves: list[tuple[int, int]]  # source, target


Command = Forward | Logits | Copies | Demotions


# When a collective fails, so long at most it takes to hear which rank is gone.
LAST_WORDS_SECONDS = 2.0


class RankLostError(Exception):
    """The ranks cannot go on together. The message says why, for a person."""


class Followers(Protocol):
    """The other ranks, as rank 0 sees them."""

    @property
    def lost(self) -> Future[str]:
        """Resolves, in a sentence, when one of them is gone and no step can succeed any more."""
        ...

    def tell(self, command: Command) -> None:
        """Raises `RankLostError`."""
        ...

    def close(self) -> None:
        """Ends them. Nothing may be running."""
        ...


class Nobody:
    """There are no other ranks."""

    def __init__(self) -> None:
        self.lost: Future[str] = Future()  # never resolves

    def tell(self, command: Command) -> None:
        pass

    def close(self) -> None:
        pass


class LeadingRunner:
    """Rank 0's runner: has the followers compute their parts along with its own."""

    chain: NativeChain | None = None  # a chain of drafts is one call on one rank

    def __init__(
        self, inner: Runner, followers: Followers, collective: Collective, *, coarse: bool = False
    ) -> None:
        self.name = inner.name
        self._inner = inner
        self._followers = followers
        self._collective = collective
        self._coarse = coarse

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        with self._together():
            self._followers.tell(shape_of(ids, batch, coarse=self._coarse))
            self._collective.broadcast(packed(ids, batch))
            return self._inner.forward(ids, batch, kv, read)

    def logits(self, hidden: Tensor) -> Tensor:
        with self._together():
            self._followers.tell(Logits(len(hidden)))
            return self._inner.logits(self._collective.broadcast(hidden.contiguous()))

    def coarse(self) -> Runner:
        inner = self._inner.coarse()
        return LeadingRunner(inner, self._followers, self._collective, coarse=True)

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What fails because a rank is gone says so, instead of what the library noticed."""
        try:
            yield
        except CollectiveError as error:
            try:
                words = self._followers.lost.result(LAST_WORDS_SECONDS)
            except TimeoutError:
                raise error from None
            raise RankLostError(words) from error


class Follower:
    """Carries out rank 0's commands on this rank's part of the model and its pages."""

    def __init__(
        self,
        runner: Runner,
        kv: Sequence[Tensor],
        host: Sequence[Tensor],
        collective: Collective,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """kv, host: as the worker's; dtype: of hidden states."""
        self._runner = runner
        self._kv = kv
        self._host = host
        self._collective = collective
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device

    @cached_property
    def _coarse(self) -> Runner:
        """Made when it is first asked for: not all pages can be read so."""
        return self._runner.coarse()

    @torch.inference_mode()
    def obey(self, command: Command) -> None:
        match command:
            case Forward():
                size = packed_size(command)
                numbers = torch.empty(size, dtype=torch.int64, device=self._device)
                ids, batch = unpacked(self._collective.broadcast(numbers), command)
                runner = self._coarse if command.coarse else self._runner
                runner.forward(ids, batch, self._kv)
            case Logits(rows):
                shape = (rows, self._hidden_size)
                hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
                self._runner.logits(self._collective.broadcast(hidden))
            case Copies(pages, to_host):
                pools = (self._kv, self._host) if to_host else (self._host, self._kv)
                copy_pages(*pools, [PageCopy(*page) for page in pages])
            case Demotions(halves):
                copy_halves(self._kv, [PageCopy(*half) for half in halves])


def shape_of(ids: Tensor, batch: AttentionBatch, *, coarse: bool = False) -> Forward:
    rows, pages = batch.page_table.shape
    dense = 0 if batch.copies is None else batch.copies.count
    return Forward(len(ids), rows, pages, batch.max_query, batch.max_kv, dense, coarse)


def packed(ids: Tensor, batch: AttentionBatch) -> Tensor:
    """All that differs from step to step, in one tensor for one broadcast: int64
    [`packed_size(…)`]."""
    parts = [
        *(ids, batch.positions, batch.token_rows, batch.kv_slots),
        *(batch.query_starts, batch.kv_lengths, batch.page_table.flatten()),
    ]
    if batch.copies is not None:
        parts += [batch.copies.slots, batch.copies.table.flatten()]
    return torch.cat([part.long() for part in parts])


def packed_size(shape: Forward) -> int:
    return sum(_sizes(shape))


def unpacked(numbers: Tensor, shape: Forward) -> tuple[Tensor, AttentionBatch]:
    """The inverse of `packed`: ids and batch."""
    table_shape = shape.rows, shape.pages
    ids, positions, token_rows, kv_slots, query_starts, kv_lengths, table, *dense = numbers.split(
        _sizes(shape)
    )
    copies: DensePages | None = None
    if dense:
        slots, where = dense
        copies = DensePages(where.int().view(table_shape), slots, shape.dense_pages)
    return ids, AttentionBatch(
        positions=positions,
        token_rows=token_rows,
        query_starts=query_starts.int(),
        kv_lengths=kv_lengths.int(),
        page_table=table.int().view(table_shape),
        kv_slots=kv_slots,
        max_query=shape.max_query,
        max_kv=shape.max_kv,
        copies=copies,
    )


def _sizes(shape: Forward) -> list[int]:
    tokens, table = shape.tokens, shape.rows * shape.pages
    sizes = [tokens] * 4 + [shape.rows + 1, shape.rows, table]
    return [*sizes, tokens, table] if shape.dense_pages else sizes
