"""`GraphRunner`: short steps recorded once as CUDA graphs and launched as one from then on.

A decode step of a large model is hundreds of small launches, which take the host longer than they
take the GPU. A graph repeats all of them at the cost of one, on the same tensors; so the step's
inputs are copied into buffers that stay, padded to one of a few sizes:

- tokens to a bucket, and the rows to as many as there are tokens. A padding token stands alone in a
  padding row, at position 0 of the null page; further padding rows hold no token;
- the page table to a bucket of widths, which is also the bound of all lengths;
- the longest row to 1 (decode), or to the most drafts and one (verification).

Whatever fits no bucket (prompts, most of all) runs launch by launch. The head stays outside: its
logits would be a large buffer for each bucket, for the sake of two launches.

The recording itself is a `Capture`, so that all of the rest runs in tests without a GPU. Not run on
one yet.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.cpu.chain import NativeChain
from kernels.kv.windows import DensePages
from kernels.ops import AttentionBatch
from worker.runner import Runner

# A longer step keeps the GPU busy for longer than its launches take.
MOST_TOKENS = 512
NARROWEST = 1024  # positions that the narrowest page table holds; each other holds four times more
# What the driver keeps for one graph of a few hundred kernels. An allowance, not measured.
GRAPH_BYTES = 4 << 20


class Capture(Protocol):
    """Records launches."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again whatever `run` does, to the same tensors, whatever they hold by then."""
        ...


class CudaCapture:
    """CUDA graphs that share one pool of memory: one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        # Once beforehand: kernels are compiled and libraries make their workspaces.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The waiter's thread may call CUDA meanwhile; that must not spoil the recording.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        return graph.replay


class Bucket(NamedTuple):
    """The size of one graph's step."""

    tokens: int  # and rows
    query: int  # tokens of the longest row
    pages: int  # width of the page table


@dataclass(frozen=True, slots=True)
class Buckets:
    """The sizes there are, each ascending."""

    tokens: tuple[int, ...]
    queries: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def of(cls, rows: int, drafts: int, max_len: int, page_size: int) -> Buckets:
        """For steps of so many rows with up to `drafts` drafts each, and sequences of `max_len`."""
        most = min(rows * (1 + drafts), max(rows, MOST_TOKENS))
        # Eight apart at first, then by a quarter of the power of two below.
        tokens = [n for n in (1, 2, 4) if n < most]
        at = 8
        while at < most:
            tokens.append(at)
            at += max(8, (1 << at.bit_length() - 1) // 4)
        pages, widest = [], -(-max_len // page_size)
        width = -(-NARROWEST // page_size)
        while width < widest:
            pages.append(width)
            width *= 4
        queries = (1, 1 + drafts) if drafts else (1,)
        return cls((*tokens, most), queries, (*pages, widest))

    def fit(self, batch: AttentionBatch, page_size: int) -> Bucket | None:
        """The smallest that holds the step; None if none does."""
        tokens = _least(self.tokens, batch.positions.shape[0])
        query = _least(self.queries, batch.max_query)
        pages = _least(self.pages, -(-batch.max_kv // page_size))
        if tokens is None or query is None or pages is None:
            return None
        return Bucket(tokens, query, pages)

    @property
    def count(self) -> int:
        return len(self.tokens) * len(self.queries) * len(self.pages)

    def decoding(self, rows: int) -> Iterator[Bucket]:
        """Those that steps of up to `rows` rows without drafts need, the largest first."""
        for pages in reversed(self.pages):
            for tokens in reversed(self.tokens[: bisect.bisect_left(self.tokens, rows) + 1]):
                yield Bucket(tokens, 1, pages)


def _least(sizes: Sequence[int], wanted: int) -> int | None:
    at = bisect.bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else None


class StaticStep:
    """The tensors that graphs read and write, as large as the largest bucket."""

    def __init__(
        self,
        buckets: Buckets,
        page_size: int,
        hidden: int,
        dtype: torch.dtype,
        device: torch.device,
        dense_pages: int = 0,
    ) -> None:
        """`dense_pages`: of the pool, where its layers have windows."""
        most = buckets.tokens[-1]

        def zeros(size: int, kind: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        self.page_size = page_size
        self.ids = zeros(most, torch.int64)
        self.positions = zeros(most, torch.int64)
        self.token_rows = zeros(most, torch.int64)
        self.kv_slots = zeros(most, torch.int64)
        self.query_starts = zeros(most + 1, torch.int32)
        self.kv_lengths = zeros(most, torch.int32)
        self.page_table = zeros(most * buckets.pages[-1], torch.int32)  # of any bucket's shape
        self.copy_slots = zeros(most if dense_pages else 0, torch.int64)
        self.copy_table = zeros(self.page_table.shape[0] if dense_pages else 0, torch.int32)
        self.hidden = torch.zeros(most, hidden, dtype=dtype, device=device)
        self._dense_pages = dense_pages
        self._count = torch.arange(most + 1, dtype=torch.int32, device=device)

    def batch(self, bucket: Bucket) -> AttentionBatch:
        """The buffers as a step of that size."""
        n, copies = bucket.tokens, None
        if self._dense_pages:
            table = self._table(self.copy_table, bucket)
            copies = DensePages(table, self.copy_slots[:n], self._dense_pages)
        return AttentionBatch(
            positions=self.positions[:n],
            token_rows=self.token_rows[:n],
            query_starts=self.query_starts[: n + 1],
            kv_lengths=self.kv_lengths[:n],
            page_table=self._table(self.page_table, bucket),
            kv_slots=self.kv_slots[:n],
            max_query=bucket.query,
            max_kv=bucket.pages * self.page_size,
            copies=copies,
        )

    def fill(self, ids: Tensor, batch: AttentionBatch, bucket: Bucket) -> None:
        """Copies a step in and pads it."""
        tokens, rows = ids.shape[0], batch.kv_lengths.shape[0]
        self.ids[:tokens] = ids
        self.positions[:tokens] = batch.positions
        self.token_rows[:tokens] = batch.token_rows
        self.kv_slots[:tokens] = batch.kv_slots
        self.query_starts[: rows + 1] = batch.query_starts
        self.kv_lengths[:rows] = batch.kv_lengths
        self._fill_table(self.page_table, batch.page_table, bucket)
        if batch.copies is not None:
            self.copy_slots[:tokens] = batch.copies.slots
            self._fill_table(self.copy_table, batch.copies.table, bucket)
        self.pad(tokens, rows, bucket)

    def pad(self, tokens: int, rows: int, bucket: Bucket) -> None:
        """Makes the rest of the bucket padding."""
        n = bucket.tokens
        if tokens < n:
            self.ids[tokens:n] = 0
            self.positions[tokens:n] = 0
            self.kv_slots[tokens:n] = 0
            self.copy_slots[tokens:n] = 0
            # As there are no more rows than tokens, there are padding rows for all padding tokens.
            self.token_rows[tokens:n] = self._count[rows : rows + n - tokens]
        if rows < n:
            self.kv_lengths[rows:n] = 1
            # One token each while there are any, then rows without.
            ends = self._count[1 : n - rows + 1] + tokens
            self.query_starts[rows + 1 : n + 1] = ends.clamp_(max=n)

    def clear(self) -> None:
        """Every place of a table is the null page."""
        self.page_table.zero_()
        self.copy_table.zero_()

    def _fill_table(self, buffer: Tensor, pages: Tensor, bucket: Bucket) -> None:
        table = self._table(buffer, bucket)
        # What former steps have left there may be anybody's: padding is the null page alone.
        table.zero_()
        width = min(pages.shape[1], bucket.pages)
        table[: pages.shape[0], :width] = pages[:, :width]

    def _table(self, buffer: Tensor, bucket: Bucket) -> Tensor:
        return buffer[: bucket.tokens * bucket.pages].view(bucket.tokens, bucket.pages)


class GraphRunner:
    """A runner whose short steps are recorded. On the worker's thread, like any."""

    def __init__(
        self,
        runner: Runner,
        kv: Sequence[Tensor],
        buckets: Buckets,
        step: StaticStep,
        capture: Capture,
    ) -> None:
        """kv: the pool that the recorded steps are about; steps on any other are not recorded."""
        self.name = f"{runner.name}, CUDA graphs"
        self.chain: NativeChain | None = None
        self._runner = runner
        self._kv = kv
        self._buckets = buckets
        self._step = step
        self._capture = capture
        self._graphs: dict[Bucket, Callable[[], None]] = {}

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        """See `Runner.forward`. The result is overwritten by the next step."""
        bucket = self._buckets.fit(batch, self._step.page_size) if kv is self._kv else None
        if bucket is None:
            return self._runner.forward(ids, batch, kv, read)
        self._step.fill(ids, batch, bucket)
        self._graph(bucket)()
        hidden = self._step.hidden[: ids.shape[0]]
        return hidden if read is None else hidden[read]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._runner.logits(hidden)

    def coarse(self) -> Runner:
        return self._runner.coarse()

    def record(self, buckets: Sequence[Bucket], tell: Callable[[int], None]) -> None:
        """Records these now rather than at their first use; tells how many are done."""
        with torch.inference_mode():
            for done, bucket in enumerate(buckets, 1):
                self._step.clear()
                self._step.pad(0, 0, bucket)
                self._graph(bucket)
                tell(done)

    def _graph(self, bucket: Bucket) -> Callable[[], None]:
        """For what stands in the buffers, or any other step of that size."""
        graph = self._graphs.get(bucket)
        if graph is None:
            step, n = self._step, bucket.tokens

            def run() -> None:
                # A new batch each time: what operators derive from one and keep for all layers of
                # a step must be derived within the recording.
                hidden = self._runner.forward(step.ids[:n], step.batch(bucket), self._kv)
                step.hidden[:n] = hidden

            graph = self._graphs[bucket] = self._capture(run)
        return graph


def graph_bytes(
    buckets: Buckets, activations: int, hidden: int, dtype_bytes: int, *, windows: bool = False
) -> int:
    """Device memory that the graphs of all buckets will take, estimated: what one step of the most
    tokens needs (`activations`; the graphs share it), the buffers, and what the driver keeps."""
    most = buckets.tokens[-1]
    table = buckets.pages[-1] * 4
    copies = 8 + table if windows else 0
    buffers = most * (hidden * dtype_bytes + 4 * 8 + 3 * 4 + table + copies)
    return activations + buffers + buckets.count * GRAPH_BYTES
