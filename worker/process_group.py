"""Joins ranks of one machine into a process group of torch.distributed."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch

from models.parallel import Collective, CollectiveError, OrderedCollective, Shard, TorchCollective

dist: Any = torch.distributed  # much of what is used here has no type stubs
HOST = "127.0.0.1"
# Ranks meet within milliseconds of each other, but for kernels that one of them compiles first.
TIMEOUT = timedelta(seconds=120)


class GroupError(Exception):
    """The ranks did not find each other. The message is one sentence for a person."""


def listener() -> socket.socket:
    """Where ranks will meet; on loopback, as nobody else is asked who he is."""
    return socket.create_server((HOST, 0))


def join(
    shard: Shard,
    device: torch.device,
    port: int,
    listening: socket.socket | None = None,
    *,
    ordered: bool = False,
    timeout: timedelta = TIMEOUT,
) -> Collective:
    """Blocks until all ranks have joined. `listening`, on `port`, is rank 0's and taken over;
    `ordered`: see `OrderedCollective`; `timeout`: of this, and of each collective afterwards.

    On GPUs by NCCL; that has never run. Raises `GroupError`.
    """
    if not dist.is_available():
        raise GroupError("this build of torch has no torch.distributed to connect ranks with.")
    try:
        store = dist.TCPStore(
            HOST,
            port,
            shard.size,
            is_master=listening is not None,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )
        if device.type == "cuda":
            group = _nccl(store, shard, device, timeout)
        else:
            group = _gloo(store, shard, timeout)
        kind = OrderedCollective if ordered else TorchCollective
        collective = kind(group, shard)
        # Connects what a library connects only when it is first used.
        collective.all_reduce(torch.zeros(1, device=device))
    except (RuntimeError, CollectiveError) as error:  # torch's DistError is the former
        reason = str(error).strip().splitlines()[0]
        raise GroupError(f"rank {shard.rank} did not find the other ranks: {reason}") from error
    return collective


def _gloo(store: Any, shard: Shard, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, options)


def _nccl(store: Any, shard: Shard, device: torch.device, timeout: timedelta) -> Any:
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
