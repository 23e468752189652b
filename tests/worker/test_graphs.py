"""Recorded steps against the runner they record, bit for bit; the recording is a closure."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest
import torch
from torch import Tensor

from kernels.ops import AttentionBatch
from kernels.torch_ops import TorchOps
from tests.e2e.test_exactness import SPEC, VOCAB, decoder
from tests.worker.late import Again
from worker.graphs import Bucket, Buckets, GraphRunner, StaticStep, graph_bytes
from worker.kv_pool import allocate_pool
from worker.runner import EagerRunner

CPU = torch.device("cpu")
PAGE = 4
BUCKETS = Buckets(tokens=(1, 2, 4, 8, 24), queries=(1, 4), pages=(5, 20))
PAGES = 300


def ragged(rng: random.Random, counts: list[int]) -> tuple[Tensor, AttentionBatch]:
    """A step of rows with so many tokens, anywhere in sequences of any length."""
    table, positions, slots, rows, lengths = [], [], [], [], []
    free = list(range(1, PAGES))
    rng.shuffle(free)
    longest = 0
    for row, count in enumerate(counts):
        length = rng.randrange(count, rng.choice((20, 80)) + 1)
        longest = max(longest, length)
        pages = [free.pop() for _ in range(-(-length // PAGE))]
        table.append(pages)
        lengths.append(length)
        for position in range(length - count, length):
            positions.append(position)
            slots.append(pages[position // PAGE] * PAGE + position % PAGE)
            rows.append(row)
    width = -(-longest // PAGE)
    padded = [pages + [0] * (width - len(pages)) for pages in table]
    batch = AttentionBatch(
        positions=torch.tensor(positions),
        token_rows=torch.tensor(rows),
        query_starts=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        kv_lengths=torch.tensor(lengths, dtype=torch.int32),
        page_table=torch.tensor(padded, dtype=torch.int32),
        kv_slots=torch.tensor(slots),
        max_query=max(counts),
        max_kv=longest,
    )
    return torch.tensor([rng.randrange(VOCAB) for _ in positions]), batch


class Both:
    """A runner, and the same one recorded, each with a pool of its own that began alike."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        pools = [allocate_pool(SPEC, PAGES, PAGE, torch.float32, CPU) for _ in range(2)]
        for ours, theirs in zip(*pools, strict=True):
            ours.normal_()
            theirs.copy_(ours)
        self.plain_kv, self.kv = pools
        self.plain = EagerRunner(decoder(), TorchOps())
        self.step = StaticStep(BUCKETS, PAGE, SPEC.hidden_size, torch.float32, CPU)
        self.capture = Again()
        inner = EagerRunner(decoder(), TorchOps())
        self.recorded = GraphRunner(inner, self.kv, BUCKETS, self.step, self.capture)

    def check(self, ids: Tensor, batch: AttentionBatch, read: Tensor | None = None) -> None:
        with torch.inference_mode():
            wanted = self.plain.forward(ids, batch, self.plain_kv, read)
            found = self.recorded.forward(ids, batch, self.kv, read)
            assert torch.equal(found, wanted)
            assert torch.equal(self.recorded.logits(found), self.plain.logits(wanted))
        for ours, theirs in zip(self.kv, self.plain_kv, strict=True):
            assert torch.equal(ours[1:], theirs[1:])  # page 0 is anybody's
            assert ours[0].isfinite().all()


def test_random_decode_steps() -> None:
    rng, both = random.Random(0), Both()
    for _ in range(60):
        both.check(*ragged(rng, [1] * rng.randrange(1, 25)))
    assert both.capture.replayed == 60
    assert 5 <= both.capture.recorded <= len(BUCKETS.tokens) * len(BUCKETS.pages)


def test_random_verification_steps() -> None:
    rng, both = random.Random(1), Both()
    for _ in range(60):
        counts = [rng.randrange(1, 5)]
        while sum(counts) + 4 <= rng.randrange(1, 25):
            counts.append(rng.randrange(1, 5))
        both.check(*ragged(rng, counts))
    assert both.capture.replayed == 60


def test_a_full_bucket_and_a_single_row() -> None:
    rng, both = random.Random(2), Both()
    for counts in ([1] * 8, [4, 4], [4], [4, 1, 3], [1], [4, 4, 4, 4, 4, 4]):
        both.check(*ragged(rng, counts))


def test_some_tokens_are_read() -> None:
    rng, both = random.Random(3), Both()
    ids, batch = ragged(rng, [3, 2, 1])
    both.check(ids, batch, torch.tensor([2, 4, 5]))


@pytest.mark.parametrize("counts", [[5, 1], [1] * 25])
def test_what_fits_no_bucket_is_not_recorded(counts: list[int]) -> None:
    both = Both()
    both.check(*ragged(random.Random(4), counts))
    assert both.capture.recorded == 0


def test_another_pool_is_not_the_recorded_one() -> None:
    both = Both()
    ids, batch = ragged(random.Random(5), [1, 1])
    with torch.inference_mode():
        both.recorded.forward(ids, batch, both.plain_kv)
    assert both.capture.recorded == 0


def test_pages_of_former_steps_do_not_show_in_padding() -> None:
    """A sequence of NaNs was in the buffers before: a padded read of its pages must not happen."""
    both = Both()
    ids, batch = ragged(random.Random(6), [1] * 8)
    both.check(ids, batch)
    for pages in (both.kv, both.plain_kv):
        for layer in pages:
            layer[batch.page_table[batch.page_table > 0].long()] = torch.nan
    free = sorted(set(range(1, PAGES)) - set(batch.page_table.flatten().tolist()))
    few = AttentionBatch(
        positions=torch.tensor([2, 5]),
        token_rows=torch.tensor([0, 1]),
        query_starts=torch.tensor([0, 1, 2], dtype=torch.int32),
        kv_lengths=torch.tensor([3, 6], dtype=torch.int32),
        page_table=torch.tensor([[free[0], 0], [free[1], free[2]]], dtype=torch.int32),
        kv_slots=torch.tensor([free[0] * PAGE + 2, free[2] * PAGE + 1]),
        max_query=1,
        max_kv=6,
    )
    with torch.inference_mode():
        assert both.recorded.forward(ids[:2], few, both.kv).isfinite().all()


def test_recording_beforehand_touches_the_null_page_alone() -> None:
    both, done = Both(), []
    both.recorded.record(list(BUCKETS.decoding(8)), done.append)
    assert done == list(range(1, 9))  # 1, 2, 4 and 8 tokens, two widths
    for ours, theirs in zip(both.kv, both.plain_kv, strict=True):
        assert torch.equal(ours[1:], theirs[1:])
    both.check(*ragged(random.Random(7), [1] * 5))
    assert both.capture.recorded == 8


def test_buckets_cover_every_step_and_waste_a_quarter_at_most() -> None:
    buckets = Buckets.of(rows=64, drafts=8, max_len=40_000, page_size=16)
    assert buckets.tokens[:7] == (1, 2, 4, 8, 16, 24, 32)
    assert buckets.tokens[-1] == 512
    assert buckets.queries == (1, 9)
    assert buckets.pages == (64, 256, 1024, 2500)
    for wanted in range(32, 513):
        assert min(n for n in buckets.tokens if n >= wanted) <= 1.25 * wanted
    assert list(Buckets.of(3, 0, 100, 16).decoding(3)) == [Bucket(n, 1, 7) for n in (3, 2, 1)]
    assert Buckets.of(1000, 0, 100, 16).tokens[-1] == 1000
    assert buckets.count == len(buckets.tokens) * 2 * 4


def test_memory_is_estimated_by_parts() -> None:
    buckets = Buckets(tokens=(1, 8), queries=(1,), pages=(16,))
    plain = 1000 + 8 * (64 + 32 + 12 + 64) + 2 * (4 << 20)
    assert graph_bytes(buckets, 1000, 32, 2) == plain
    assert graph_bytes(buckets, 1000, 32, 2, windows=True) == plain + 8 * (8 + 64)
