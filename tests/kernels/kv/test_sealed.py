"""Sealed pages as a format: what is appended in any steps, against pages encoded as a whole, and
attention over both kinds of pages, against all values held."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from torch import Tensor

from kernels.attention.paged import attend_reference
from kernels.kv.format import dense_rows
from kernels.kv.presets import LayerPages, layer_formats, packed_format
from kernels.kv.sealed import Sealed, SealedPage
from kernels.kv.windows import DensePages, Windows
from kernels.ops import AttentionLayer
from kernels.torch_ops import TorchOps
from tests.kernels.batches import Rows
from tests.kernels.test_attention import TOLERANCE, layer
from tests.kernels.test_windows import attend_both

UNTOUCHED = 0x3A  # pages that nobody owns hold what this pattern of bits stands for

Span = tuple[int, int, int]


class Case:
    """A format of random sizes, sequences of random lengths, their pages and their tokens."""

    def __init__(self, seed: int) -> None:
        self.rng, self.g = Random(seed), torch.Generator().manual_seed(seed)
        pick = self.rng.choice
        self.group, self.heads = pick([8, 16, 32]), pick([1, 2])
        self.size, self.dim = self.group * pick([1, 2, 3]), self.group * pick([1, 2, 4])
        self.dim = max(self.dim, 16)
        self.dtype = pick([torch.float32, torch.bfloat16, torch.float16])
        self.windows = Windows(pick([0, 5, 40]), self.size * pick([1, 2]))
        mean = torch.randn(self.heads, self.dim, generator=self.g)
        self.form = Sealed(
            *(self.heads, self.size, self.dim, self.windows),
            group=self.group,
            key_mean=pick([None, mean]),
        )
        self.lengths = [self.rng.randrange(1, 6 * self.size) for _ in range(pick([1, 3]))]
        # Room for drafts behind the end.
        self.rows = Rows.shuffled([n + 2 * self.size for n in self.lengths], self.size, self.g)
        self.texts = [self.tokens(n) for n in self.lengths]

    def tokens(self, count: int) -> Tensor:
        """Keys and values, [2, count, kv_heads, head_dim]."""
        drawn = torch.randn(2, count, self.heads, self.dim, generator=self.g)
        return (drawn * torch.rand(count, 1, 1, generator=self.g) * 3).to(self.dtype)

    def pool(self) -> Tensor:
        form, count = self.form, self.rows.num_pages
        behind = dense_rows(form, count, self.heads, self.size, self.dim, self.dtype)
        shape = (count + behind, *form.page_shape(self.heads, self.size, self.dim))
        return torch.full(shape, UNTOUCHED, dtype=torch.uint8)

    def append(self, kv: Tensor, spans: Sequence[Span], parts: Sequence[Tensor]) -> None:
        """With a few tokens of padding, which go to the first places of both null pages."""
        batch, joined = self.rows.step(spans), torch.cat(list(parts), dim=1)
        assert batch.copies is not None
        padding = torch.zeros(self.rng.randrange(3), dtype=torch.int64)
        joined = torch.cat([joined, self.tokens(len(padding))], dim=1)
        copies = DensePages(
            batch.copies.table, torch.cat([batch.copies.slots, padding]), batch.copies.count
        )
        self.form.append(*joined, kv, torch.cat([batch.kv_slots, padding]), copies)

    def steps(self, most: int) -> Iterator[list[Span]]:
        """Of up to `most` tokens of each sequence, until all have come."""
        done = [0] * len(self.lengths)
        while unfinished := [i for i, n in enumerate(self.lengths) if done[i] < n]:
            chosen = self.rng.sample(unfinished, self.rng.randrange(1, len(unfinished) + 1))
            spans = []
            for i in chosen:
                end = min(done[i] + self.rng.randrange(1, most + 1), self.lengths[i])
                spans.append((i, done[i], end))
                done[i] = end
            yield spans

    def full(self) -> Iterator[tuple[int, Tensor]]:
        """Pages whose positions have all come, and their keys and values, as those of `tokens`."""
        for i, length in enumerate(self.lengths):
            for place in range(length // self.size):
                at = slice(place * self.size, (place + 1) * self.size)
                yield int(self.rows.page_table[i, place]), self.texts[i][:, at]

    def sealed(self, part: Tensor) -> Tensor:
        """The reference: a whole page, by itself."""
        turned = (x.to(self.dtype).transpose(0, 1) for x in self.form.turned(*part))
        return SealedPage(self.heads, self.size, self.dim, self.group).encode(*turned)


seeds = pytest.mark.parametrize("seed", range(12))


@seeds
def test_pages_are_what_they_are_as_a_whole(seed: int) -> None:
    """Bit for bit, token by token and in any chunks, beside other sequences; nothing else changes,
    the null page least of all."""
    case = Case(seed)
    pools = []
    for most in (1, 3, 1000):
        kv = case.pool()
        for spans in case.steps(most):
            case.append(kv, spans, [case.texts[i][:, start:end] for i, start, end in spans])
        pools.append(kv[: case.rows.num_pages])
    expected = torch.full_like(pools[0], UNTOUCHED)
    for page, part in case.full():
        expected[page] = case.sealed(part)
    assert (expected != UNTOUCHED).any() == any(n >= case.size for n in case.lengths)
    for found in pools:
        assert torch.equal(found, expected)


@seeds
def test_rejected_drafts_leave_nothing(seed: int) -> None:
    """Drafts may fill pages, which are sealed then, and are written over."""
    case = Case(seed)
    kv = case.pool()
    for spans in case.steps(case.size):
        drafted, parts = [], []
        for i, start, end in spans:
            drafts = case.rng.randrange(2 * case.size)
            drafted.append((i, start, end + drafts))
            parts.append(torch.cat([case.texts[i][:, start:end], case.tokens(drafts)], dim=1))
        case.append(kv, drafted, parts)
    for page, part in case.full():
        assert torch.equal(kv[page], case.sealed(part))


def test_the_first_positions_once_more_do_not_seal() -> None:
    """As a worker computes sinks again behind a cached prefix: dense copies alone are written."""
    case = Case(0)
    kv, count = case.pool(), 2 * case.size
    copies = DensePages(torch.zeros(1, 1), case.size + torch.arange(count), case.rows.num_pages)
    case.form.append(*case.tokens(count), kv, torch.arange(count) % case.size, copies)
    assert (kv[: case.rows.num_pages] == UNTOUCHED).all()
    assert (kv[case.rows.num_pages :] != UNTOUCHED).any()


def brute_force(case: Case, q: Tensor, i: int, start: int, shape: AttentionLayer) -> Tensor:
    """q: [queries, heads, head_dim] of sequence i at `start`, ... One softmax over all values."""
    form, size, length = case.form, case.size, start + len(q)
    dense = [x.to(case.dtype).float() for x in form.turned(*case.texts[i][:, :length])]
    packed = [x.clone() for x in dense]
    for place in range(length // size):
        at = slice(place * size, (place + 1) * size)
        page = SealedPage(case.heads, size, case.dim, case.group)
        for of, found in zip(packed, page.decode(case.sealed(case.texts[i][:, at])), strict=True):
            of[at] = found.transpose(0, 1)
    out = attend_both(form.turn(q).float(), dense, packed, shape, start, case.windows)
    return form.turn_back(out)


@seeds
@pytest.mark.parametrize("window", [None, 50])
def test_attention_matches_brute_force(seed: int, window: int | None) -> None:
    """Each step reads what it has appended itself: rows behind a page's end read it sealed."""
    case = Case(100 + seed)
    shape = replace(layer(2 * case.heads, case.heads, case.dim, window), kv=case.form)
    kv, ops = case.pool(), TorchOps()
    tolerance = {"atol": 3 * TOLERANCE[case.dtype], "rtol": 3 * TOLERANCE[case.dtype]}
    for spans in case.steps(case.rng.choice([2, 200])):
        batch = case.rows.step(spans)
        part = torch.cat([case.texts[i][:, start:end] for i, start, end in spans], dim=1)
        ops.append(*part, shape, kv, batch)
        q = torch.randn(len(batch.positions), 2 * case.heads, case.dim, generator=case.g)
        q = q.to(case.dtype)
        counts = [end - start for _, start, end in spans]
        rows = zip(q.split(counts), spans, strict=True)
        expected = torch.cat([brute_force(case, x, i, start, shape) for x, (i, start, _) in rows])
        for found in (ops.attend(q, kv, shape, batch), attend_reference(q, kv, shape, batch)):
            torch.testing.assert_close(found.float(), expected, **tolerance)


def test_a_token_does_not_depend_on_its_step() -> None:
    """fp32: bitwise the same in one step with all others, in a chunk of any size, and alone."""
    length, size, form = 300, 32, Sealed(2, 32, 32, Windows(40, 64))
    shape, ops, g = replace(layer(4, 2, 32), kv=form), TorchOps(), torch.Generator().manual_seed(2)
    rows = Rows.shuffled([length, 90], size, g)
    q = torch.randn(length + 90, 4, 32, generator=g)
    k, v = torch.randn(2, length + 90, 2, 32, generator=g)
    behind = dense_rows(form, rows.num_pages, 2, size, 32, torch.float32)
    found = []
    for most in (length, 100, 17, 1):
        kv = torch.zeros(rows.num_pages + behind, *form.page_shape(2, size, 32), dtype=torch.uint8)
        out = []
        for start in range(0, length, most):
            stop = min(start + most, length)
            spans, at = [(0, start, stop)], torch.arange(start, stop)
            if stop == length:  # the other sequence comes with the last chunk
                spans.append((1, 0, 90))
                at = torch.arange(start, length + 90)
            batch = rows.step(spans)
            ops.append(k[at], v[at], shape, kv, batch)
            out.append(ops.attend(q[at], kv, shape, batch))
        found.append(torch.cat(out))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"page_size": 16},
            "groups of 32 tokens of a page, which has 16: set --page-size to",
        ),
        ({"head_dim": 80}, "oscar2 does not fit this model: 80 numbers do not make groups of 32"),
        ({"window": 0}, "read dense until they are full, .* leave --kv-window out"),
        ({"window": 0, "sink": 64}, "read dense until they are full"),
        ({"window": 48}, "a window of 48 tokens is no multiple of a page's 32"),
        ({"sink": -1}, "less than none"),
        ({"halves": True}, "only pages of int8n can be demoted, not those of oscar2"),
    ],
)
def test_what_cannot_be_sealed_is_refused_in_a_sentence(options: dict, sentence: str) -> None:
    sizes = {"num_layers": 6, "kv_heads": 2, "page_size": 32, "head_dim": 128}
    with pytest.raises(ValueError, match=sentence):
        layer_formats("oscar2", **{**sizes, **options})


def test_what_a_format_is_not_made_for() -> None:
    with pytest.raises(ValueError, match="blocks of 8 tokens are no pages of 16"):
        Sealed(1, 16, 16, Windows(0, 8), group=16)
    with pytest.raises(ValueError, match="blocks of 0 tokens"):
        Sealed(1, 16, 16, Windows(8, 0), group=16)
    form = packed_format("oscar2", LayerPages(2, 64, 128, windows=Windows(64, 64)))
    with pytest.raises(ValueError, match="made for heads, page size and head size"):
        form.page_shape(2, 32, 128)
    with pytest.raises(ValueError, match="not read without their dense windows"):
        form.coarse()


def test_a_window_of_one_page_unless_another_is_asked_for() -> None:
    asked = {None: 64, 64: 64, 128: 128}
    for window, block in asked.items():
        forms = layer_formats("oscar2", 6, 2, 64, 128, sink=20, window=window)
        assert [form.windows for form in forms] == [None, *[Windows(20, block)] * 4, None]
