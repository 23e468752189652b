"""Ranks as threads of one process: groups are no global state, so that is enough for most tests."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

import torch

from models.parallel import Collective, Shard
from worker.process_group import join, listener

T = TypeVar("T")
CPU = torch.device("cpu")


def on_ranks(
    size: int,
    run: Callable[[Collective], T],
    *,
    ordered: bool = False,
    timeout: timedelta = timedelta(seconds=60),
) -> list[T]:
    """What `run` returns on each rank, in order; raises the first rank's error."""
    listening = listener()
    port = listening.getsockname()[1]

    def one(rank: int) -> T:
        torch.set_num_threads(1)
        mine = listening if rank == 0 else None
        shard = Shard(rank, size)
        with torch.inference_mode():
            return run(join(shard, CPU, port, mine, ordered=ordered, timeout=timeout))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
