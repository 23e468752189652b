"""What `kernels.flashinfer` tells the library about a step, by a stand-in that computes from it.

The stand-in has the signatures of FlashInfer 0.6.14, refuses what the library refuses, and attends
row by row over exactly the pages and lengths it was given. The real library has not run here.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels import flashinfer
from kernels.attention.paged import attend_reference
from kernels.flashinfer import FlashInferAttention, PagedRows, probe
from kernels.ops import AttentionBatch, AttentionLayer, HostRows
from tests.kernels.batches import Rows

CPU = torch.device("cpu")


class Wrapper:
    """What both of the library's wrappers check and compute."""

    plans = 0

    def __init__(self, workspace: Tensor, kv_layout: str, backend: str) -> None:
        assert workspace.dtype == torch.uint8
        assert not workspace.any()
        assert kv_layout == "HND"
        assert backend in ("fa2", "fa3")

    def note(
        self, starts, kv_starts, pages, last_page, shape, *, sm_scale, window_left, q_data_type,
        kv_data_type,
    ) -> None:  # fmt: skip
        Wrapper.plans += 1
        for part in (starts, kv_starts, pages, last_page):
            assert part.dtype == torch.int32
        for part in (starts, kv_starts, last_page):
            assert part.device.type == "cpu", "would be read back"
        assert starts[0] == kv_starts[0] == 0
        assert (starts.diff() >= 0).all()
        assert (kv_starts.diff() > 0).all(), "no row is empty"
        assert len(starts) == len(kv_starts) == len(last_page) + 1
        assert kv_starts[-1] == len(pages)
        assert ((last_page >= 1) & (last_page <= shape[3])).all()
        assert (pages >= 0).all()
        self.starts, self.kv_starts, self.pages, self.last_page = (
            starts,
            kv_starts,
            pages,
            last_page,
        )
        self.shape, self.scale, self.left = shape, sm_scale, window_left
        self.dtypes = (q_data_type, kv_data_type)

    def run(self, q: Tensor, kv: Tensor) -> Tensor:
        heads, kv_heads, head_dim, page_size = self.shape
        assert (q.dtype, kv.dtype) == self.dtypes
        assert q.is_contiguous()
        assert q.shape == (int(self.starts[-1]), heads, head_dim)
        assert kv.shape[1:] == (2, kv_heads, page_size, head_dim)
        out = torch.empty_like(q)
        for row in range(len(self.last_page)):
            first, behind = self.starts[row : row + 2].tolist()
            pages = self.pages[self.kv_starts[row] : self.kv_starts[row + 1]].long()
            length = (len(pages) - 1) * page_size + int(self.last_page[row])
            # [2, kv_heads, length, head_dim], a copy for each query head
            stored = kv[pages].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length].float()
            keys, values = stored.repeat_interleave(heads // kv_heads, dim=1)
            # The last query stands at the row's last position.
            at = torch.arange(length - (behind - first), length)[:, None]
            hidden = torch.arange(length) > at
            if self.left >= 0:
                hidden |= torch.arange(length) < at - self.left
            scores = q[first:behind].transpose(0, 1).float() @ keys.mT * self.scale
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            out[first:behind] = (weights @ values).transpose(0, 1).to(q.dtype)
        return out


class Decode(Wrapper):
    def __init__(self, workspace, kv_layout="NHD", use_tensor_cores=False, backend="auto") -> None:
        super().__init__(workspace, kv_layout, backend)
        self.tensor_cores = use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
        window_left=-1, q_data_type="float16", kv_data_type=None, sm_scale=None,
    ) -> None:  # fmt: skip
        assert self.tensor_cores == (num_qo_heads // num_kv_heads >= 4)
        self.note(
            torch.arange(len(last_page_len) + 1, dtype=torch.int32),
            *(indptr, indices, last_page_len, (num_qo_heads, num_kv_heads, head_dim, page_size)),
            sm_scale=sm_scale,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )


class Prefill(Wrapper):
    def __init__(self, workspace, kv_layout="NHD", backend="auto") -> None:
        super().__init__(workspace, kv_layout, backend)

    def plan(
        self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads,
        num_kv_heads, head_dim_qk, page_size, causal=False, sm_scale=None, window_left=-1,
        q_data_type="float16", kv_data_type=None,
    ) -> None:  # fmt: skip
        assert causal
        self.note(
            *(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len),
            (num_qo_heads, num_kv_heads, head_dim_qk, page_size),
            sm_scale=sm_scale,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
        )


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(
        __version__="0.6.14",
        BatchDecodeWithPagedKVCacheWrapper=Decode,
        BatchPrefillWithPagedKVCacheWrapper=Prefill,
    )
    monkeypatch.setitem(sys.modules, "flashinfer", made)
    monkeypatch.setattr(flashinfer, "WORKSPACE", 1024)
    monkeypatch.setattr(Wrapper, "plans", 0)
    return made


def layer(heads: int = 4, kv_heads: int = 2, window: int | None = None) -> AttentionLayer:
    return AttentionLayer(heads, kv_heads, 64, 0.11, None, window=window)


def pool(rows: Rows, shape: AttentionLayer, g: torch.Generator) -> Tensor:
    size = (rows.num_pages, 2, shape.num_kv_heads, rows.page_size, shape.head_dim)
    return torch.randn(size, generator=g).bfloat16()


def with_host(batch: AttentionBatch) -> AttentionBatch:
    return replace(batch, host=HostRows(batch.query_starts.clone(), batch.kv_lengths.clone()))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("on_host", [False, True])
def test_any_step_is_what_the_reference_computes(
    seed: int, on_host: bool, library: SimpleNamespace
) -> None:
    g = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    page_size = pick(1, 8, 16)
    shape = layer(*pick((4, 2), (8, 2), (3, 3)), window=pick(None, 1, 7, 40))
    lengths = [pick(1, page_size, page_size + 1, 3 * page_size, 77) for _ in range(pick(1, 3, 5))]
    rows = Rows.shuffled(lengths, page_size, g)
    kv, attention = pool(rows, shape, g), FlashInferAttention(library, CPU)
    for counts in ((1,), (1, 4, 30)):  # decoding, then a ragged step
        spans = [(i, max(n - pick(*counts), 0), n) for i, n in enumerate(lengths)]
        batch = rows.step(spans)
        batch = with_host(batch) if on_host else batch
        q = torch.randn(len(batch.positions), shape.num_heads, 64, generator=g).bfloat16()
        found = attention.attend(q, kv, shape, batch)
        expected = attend_reference(q, kv, shape, batch)
        torch.testing.assert_close(found, expected, atol=1.6e-2, rtol=1.6e-2)


def test_pages_and_lengths_of_a_step(library: SimpleNamespace) -> None:
    table = torch.tensor([[5, 3, 0], [7, 0, 0], [2, 9, 4]], dtype=torch.int32)
    batch = Rows(8, table).step([(0, 15, 16), (1, 0, 3), (2, 10, 17)])
    rows = PagedRows.of(batch, 8)
    assert rows.pages.tolist() == [5, 3, 7, 2, 9, 4]
    assert rows.page_starts.tolist() == [0, 2, 3, 6]
    assert rows.last_page.tolist() == [8, 3, 1]
    assert rows.query_starts.tolist() == [0, 1, 4, 11]


def test_lengths_the_host_knows_are_not_read_back(
    library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = with_host(Rows(8, torch.tensor([[1, 2]], dtype=torch.int32)).step([(0, 8, 9)]))
    monkeypatch.setattr(Tensor, "cpu", lambda self: pytest.fail("read back"))
    assert PagedRows.of(batch, 8).pages.tolist() == [1, 2]
    with pytest.raises(pytest.fail.Exception, match="read back"):
        PagedRows.of(replace(batch, host=None), 8)


def test_layers_share_a_plan_and_steps_do_not(library: SimpleNamespace) -> None:
    g = torch.Generator().manual_seed(1)
    rows = Rows.shuffled([30, 20], 16, g)
    narrow, wide, windowed = layer(), layer(8, 2), layer(window=5)
    pools = {id(shape): pool(rows, shape, g) for shape in (narrow, wide, windowed)}
    attention = FlashInferAttention(library, CPU)
    for step, plans in ((rows.step([(0, 29, 30)]), 3), (rows.step([(0, 28, 30)]), 6)):
        for _ in range(2):
            for shape in (narrow, wide, windowed, replace(narrow)):
                kv = pools.get(id(shape), pools[id(narrow)])
                q = torch.randn(len(step.positions), shape.num_heads, 64, generator=g).bfloat16()
                found = attention.attend(q, kv, shape, step)
                expected = attend_reference(q, kv, shape, step)
                torch.testing.assert_close(found, expected, atol=1.6e-2, rtol=1.6e-2)
        assert Wrapper.plans == plans


def ask(dtype: torch.dtype = torch.bfloat16, head_dim: int = 64) -> FlashInferAttention | str:
    return probe(CPU, dtype, 16, [replace(layer(), head_dim=head_dim)])


def test_no_gpu() -> None:
    assert ask() == "FlashInfer needs a CUDA GPU, and the device is cpu"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gpu:
        type = "cuda"

    refused = flashinfer._refused
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flashinfer, "_refused", lambda _, *rest: refused(Gpu(), *rest))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_what_it_does_not_take(library: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(ask(), FlashInferAttention)
    assert Wrapper.plans == 2, "a decoding step and one with a chunk were tried"
    assert "computes in 16 bits, and the model in float32" in str(ask(torch.float32))
    assert "the model's have 80" in str(ask(head_dim=80))
    library.__version__ = "0.6.9.post1"
    assert ask() == "FlashInfer 0.6.9.post1 is older than 0.6.14"
    library.__version__ = "0.7.2.post1"
    assert isinstance(ask(), FlashInferAttention)
    monkeypatch.setattr(Prefill, "plan", lambda *_, **__: 1 / 0)
    assert ask() == "FlashInfer 0.7.2.post1 fails on a trial step (division by zero)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ask() == "FlashInfer needs a GPU of compute capability 8.0"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_installation_that_is_not_there_or_broken(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert ask() == "FlashInfer is not installed"
    (tmp_path / "flashinfer.py").write_text("raise OSError('libcudart.so.13: no such file')")
    monkeypatch.delitem(sys.modules, "flashinfer")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ask() == "FlashInfer cannot be loaded (libcudart.so.13: no such file)"
