"""Tensor parallelism (Shoeybi et al. 2019, Megatron-LM): one model divided among ranks.

Queries, keys and values, gate and up are divided by their outputs, so that a rank has whole heads
and whole neurons; the output and down projections by their inputs, so that what ranks compute has
to be summed: twice a layer. Embedding and head are divided by the vocabulary, and each expert over
all ranks, like an MLP. Norms and the router are small, and every rank has them.

A module that needs the other ranks is handed the `Collective` when it is built. Nothing here reads
a global group, and with one rank (`ALONE`) nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear.dense import DenseLinear
from models.errors import CheckpointError
from models.spec import ModelSpec


class CollectiveError(Exception):
    """A rank is gone, or did not come in time. The message is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What a rank holds of a tensor: `start` to before `stop` of `full` along `dim`."""

    dim: int
    start: int
    stop: int
    full: int

    @classmethod
    def piece(cls, dim: int, index: int, pieces: int, size: int) -> Cut:
        """Piece `index` of `pieces` of `size` each."""
        return cls(dim, index * size, (index + 1) * size, pieces * size)

    @property
    def index(self) -> tuple[slice, ...]:
        """To be applied to the whole tensor."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of a model: that of `rank` among `size`."""

    rank: int = 0
    size: int = 1

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The sizes of the part. The vocabulary and the hidden size stay those of the whole.

        Raises `CheckpointError` for a model that cannot be divided so.
        """
        if self.size == 1:
            return whole
        if not whole.native:
            raise CheckpointError(
                f"a {whole.model_type} model runs through the transformers library, which is not "
                "divided among ranks: serve it without --tensor-parallel-size."
            )
        heads = self._share(whole.num_heads, "attention heads")
        moe = whole.moe
        if moe is not None:
            size = self._share(moe.intermediate_size, "neurons of an expert")
            moe = replace(moe, intermediate_size=size)
        kv_heads = whole.num_kv_heads
        if kv_heads % self.size and self.size % kv_heads:
            raise CheckpointError(
                f"{kv_heads} KV heads can be neither divided among {self.size} ranks nor "
                "given to groups of them."
            )
        plain = moe is None or len(moe.layers) < whole.num_layers
        inner = whole.intermediate_size
        return replace(
            whole,
            num_heads=heads,
            num_kv_heads=kv_heads // self.kv_piece(kv_heads)[1],
            intermediate_size=self._share(inner, "neurons of the MLP") if plain else inner,
            moe=moe,
        )

    def kv_piece(self, kv_heads: int) -> tuple[int, int]:
        """Which piece of how many this rank has of the KV heads: ranks share one where there are
        fewer heads than ranks."""
        pieces = min(self.size, kv_heads)
        return self.rank * pieces // self.size, pieces

    def vocabulary(self, size: int) -> tuple[Cut, int]:
        """This rank's rows of embedding and head, and how many every rank makes room for: the last
        ranks may have fewer."""
        room = -(-size // self.size)
        start = min(self.rank * room, size)
        return Cut(0, start, min(start + room, size), size), room

    def _share(self, count: int, of: str) -> int:
        if count % self.size:
            raise CheckpointError(f"{count} {of} cannot be divided among {self.size} ranks.")
        return count // self.size


class Collective(Protocol):
    """What ranks do together. Every rank calls the same in the same order.

    All raise `CollectiveError`.
    """

    shard: Shard

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks, on each of them the same bits. May write `x`."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`; the others bring a tensor of its shape and dtype, which is written."""
        ...

    def gather(self, x: Tensor, width: int) -> Tensor:
        """x: [rows, room] -> the ranks' columns side by side, the first `width` of them, on rank 0;
        elsewhere something nobody should read."""
        ...

    def lookup(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of a table that is divided by rows; ids: [tokens] -> [tokens, hidden]."""
        ...


class Alone:
    """One rank has everything."""

    shard = Shard()

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        return x

    def lookup(self, ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(ids, table)


ALONE = Alone()


class TorchCollective:
    """By a process group of torch.distributed: gloo on CPUs, NCCL on GPUs (which has never run).

    The sum's order is the library's, and may depend on the size of the step.
    """

    def __init__(self, group: Any, shard: Shard) -> None:
        """group: a `torch.distributed.ProcessGroupGloo` or `ProcessGroupNCCL`, whose own methods
        are called, so that it need not be the process's default group."""
        self.shard = shard
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        self._run(self._group.allreduce, [x])
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        self._run(self._group.broadcast, [x])  # from rank 0
        return x

    def gather(self, x: Tensor, width: int) -> Tensor:
        x = x.contiguous()
        if self.shard.rank:
            self._run(self._group.gather, [], [x])
            return x
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        self._run(self._group.gather, [parts], [x])
        return torch.cat(parts, -1)[:, :width].contiguous()

    def lookup(self, ids: Tensor, table: Tensor) -> Tensor:
        local = ids - self.shard.rank * table.shape[0]
        outside = (local < 0) | (local >= table.shape[0])
        found = F.embedding(local.masked_fill(outside, 0), table)
        # All but one summand are zero, so the sum is exact.
        return self.all_reduce(found.masked_fill_(outside[:, None], 0.0))

    @staticmethod
    def _run(operation: Callable[..., Any], *arguments: Any) -> None:
        try:
            operation(*arguments).wait()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise CollectiveError(f"the ranks lost touch with each other: {reason}") from error


class OrderedCollective(TorchCollective):
    """Sums in the order of the ranks, whatever the size of the step: for deterministic serving.

    It moves `size / 2` times the bytes of a ring's sum and needs memory for all parts.
    """

    def all_reduce(self, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        self._run(self._group.allgather, [parts], [x.contiguous()])
        total = parts[0]
        for part in parts[1:]:
            total += part
        return total


class RowParallel(nn.Module):
    """A linear layer divided by its inputs: the ranks' products are summed, the bias added once."""

    def __init__(
        self, inner: DenseLinear, bias: nn.Parameter | None, collective: Collective
    ) -> None:
        super().__init__()
        self.inner = inner  # without bias; `prepare_linears` may put another form in its place
        self.bias = bias
        self._collective = collective

    @property
    def weight(self) -> nn.Parameter:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in / ranks] -> [..., out]."""
        total = self._collective.all_reduce(self.inner(x))
        return total if self.bias is None else total + self.bias


def row_parallel(
    inputs: int,
    outputs: int,
    *,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    collective: Collective,
) -> DenseLinear | RowParallel:
    """Uninitialised; `inputs` are this rank's. Plain where one rank has all of them."""
    alone = collective.shard.size == 1
    inner = DenseLinear.empty(inputs, outputs, bias=bias and alone, dtype=dtype, device=device)
    if alone:
        return inner
    own = torch.empty(outputs, dtype=dtype, device=device)
    return RowParallel(inner, nn.Parameter(own, requires_grad=False) if bias else None, collective)
