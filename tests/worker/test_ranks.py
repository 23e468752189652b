"""What rank 0 sends, and what a rank finds of the machine."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from torch import Tensor

from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.scales import HeadScales
from kernels.kv.windows import DensePages
from models.parallel import Shard
from tests.kernels.batches import Rows
from worker import device
from worker.device import DeviceError, resolve_device
from worker.ranks import (
    Command,
    Copies,
    Demotions,
    Forward,
    Logits,
    packed,
    packed_size,
    shape_of,
    unpacked,
)


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_arrives_as_it_was(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 70, (4,), generator=g).tolist()
    rows = Rows.shuffled(lengths, 8, g)
    spans = [(row, length // 3, length) for row, length in enumerate(lengths)]
    batch = rows.step(spans)
    ids = torch.randint(1000, (len(batch.positions),), generator=g)
    assert batch.copies is not None
    for sent in (batch, dataclasses.replace(batch, copies=None)):
        shape = shape_of(ids, sent)
        numbers = packed(ids, sent)
        assert numbers.shape == (packed_size(shape),)
        found_ids, found = unpacked(numbers, shape)
        assert torch.equal(found_ids, ids)
        same_fields(found, sent)


def same_fields(found: object, sent: object) -> None:
    for field in dataclasses.fields(sent):  # type: ignore[arg-type]
        ours, theirs = getattr(found, field.name), getattr(sent, field.name)
        if isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype, field.name
            assert torch.equal(ours, theirs), field.name
        elif isinstance(theirs, DensePages):
            same_fields(ours, theirs)
        else:
            assert ours == theirs, field.name


def test_commands_cross_between_processes_on_one_line() -> None:
    forward, copies = Forward(9, 2, 3, 8, 40, 12, coarse=True), Copies([(3, 1)], True)
    for command in (forward, Logits(4), copies, Demotions([(6, 3)])):
        line = msgspec.json.encode(command)
        assert b"\n" not in line
        assert msgspec.json.decode(line, type=Command) == command


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError) as error:
        resolve_device("cuda", 0, 4)
    assert str(error.value) == "4 ranks need as many GPUs; torch finds 2."


def test_each_rank_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = type("Facts", (), {"name": "some GPU", "total_memory": 80})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    assert resolve_device("auto", 1, 2).torch_device == torch.device("cuda", 1)


def test_ranks_on_a_cpu_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_host_memory", lambda: 9000)
    one, third = resolve_device("cpu"), resolve_device("cpu", 1, 3)
    assert one.available_memory() == 9000
    assert third.available_memory() == 3000
    assert one.pool_cap is not None
    assert third.pool_cap == one.pool_cap // 3


@pytest.mark.parametrize(("heads", "size"), [(4, 2), (4, 4), (2, 4), (1, 3)])
def test_a_rank_gets_the_calibration_of_its_heads(heads: int, size: int) -> None:
    means = torch.randn(3, heads, 8)
    scales = HeadScales(*torch.arange(2 * 3 * heads).view(2, 3, heads))
    whole = Calibration("int4h", (1,), means, Balance.nothing(means.shape), scales)
    held: list[set[int]] = []
    for rank in range(size):
        part = whole.part(*Shard(rank, size).kv_piece(heads))
        assert part.kv_format == "int4h"
        assert part.eight_bit_layers == (1,)
        mine = [
            i
            for i in range(heads)
            if any(torch.equal(means[:, i], h) for h in part.key_means.unbind(1))
        ]
        assert len(mine) == part.key_means.shape[1]
        assert part.scales is not None
        assert torch.equal(part.scales.keys, scales.keys[:, mine])
        assert torch.equal(part.scales.values, scales.values[:, mine])
        held.append(set(mine))
    assert set().union(*held) == set(range(heads))
    # Query heads come in order, so a rank's KV heads must be those its queries belong to.
    queries = 4 * heads * size
    for rank in range(size):
        own = range(rank * queries // size, (rank + 1) * queries // size)
        assert {query * heads // queries for query in own} == held[rank]
