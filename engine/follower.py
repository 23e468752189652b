"""A rank of tensor parallelism other than the first: started and told by `engine.ranks`."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from typing import NoReturn

import msgspec
import torch

from engine.arithmetic import eager_runner
from engine.backends import choose_backend
from engine.errors import StartupError
from engine.launch import Failed
from engine.ranks import FollowerLaunch, Line, Pool, RankReport, Ready, Room, Started, encode_line
from engine.sizes import (
    activations_of,
    budget_of,
    calibration_of,
    context_of,
    dense_pages_of,
    dtype_of,
    formats_of,
    use_formats,
)
from models.errors import CheckpointError
from models.loader import load_model, read_spec
from models.parallel import Shard
from models.weights import resolve_checkpoint
from worker.device import DeviceError, resolve_device
from worker.kv_pool import allocate_host_pool, allocate_pool, page_bytes, populate, window_bytes
from worker.process_group import GroupError, join
from worker.ranks import Command, Follower
from worker.sizing import BudgetError

# Another rank's death breaks this one's collective too: that rank should be heard of first.
AFTER_OTHERS_SECONDS = 1.0

_pool = msgspec.json.Decoder(Pool)
_command = msgspec.json.Decoder(Command)


class _Reports(logging.Handler):
    """The pipe to rank 0; as a log handler, what is logged goes the same way."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(logging.INFO)
        os.set_inheritable(descriptor, False)
        self._descriptor = descriptor

    def say(self, report: RankReport) -> None:
        with contextlib.suppress(BrokenPipeError):  # rank 0 is gone, and the lifeline ends this
            os.write(self._descriptor, encode_line(report))

    def emit(self, record: logging.LogRecord) -> None:
        self.say(Line(record.levelno, self.format(record)))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when it is over
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=watch_lifeline, daemon=True).start()
    launch = msgspec.json.decode(next_line(), type=FollowerLaunch)
    reports = _Reports(launch.report_fd)
    logging.basicConfig(level=logging.INFO, handlers=[reports], force=True)
    reports.say(Started())
    try:
        follower = build(launch, reports)
    except (StartupError, CheckpointError, BudgetError, DeviceError, GroupError) as error:
        end(reports, str(error))
    except Exception as error:
        end(reports, f"failed to start: {type(error).__name__}: {error}")
    reports.say(Ready())
    try:
        while True:
            follower.obey(_command.decode(next_line()))
    except Exception as error:
        time.sleep(AFTER_OTHERS_SECONDS)
        end(reports, f"met a fault: {type(error).__name__}: {error}")


def next_line() -> bytes:
    """What rank 0 says next; ends this process when it says nothing any more."""
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(0)
    return line


def watch_lifeline() -> None:
    """Ends this process when rank 0 is gone, in the middle of a collective too."""
    lifeline = select.poll()
    lifeline.register(0, 0)  # a hang-up is told unasked; input is left to the main thread
    lifeline.poll()
    os._exit(0)


def end(reports: _Reports, words: str) -> NoReturn:
    reports.say(Failed(" ".join(words.split())))
    os._exit(1)


def build(launch: FollowerLaunch, reports: _Reports) -> Follower:
    """This rank's part of what `engine.build` makes on rank 0."""
    config = launch.config
    torch.set_num_threads(launch.threads)
    shard = Shard(launch.rank, config.device.tensor_parallel_size)
    device = resolve_device(config.device.device, shard.rank, shard.size)
    place, deterministic = device.torch_device, config.device.deterministic
    collective = join(shard, place, launch.port, ordered=deterministic)
    backend = choose_backend(config.device, device, config.cache.page_size)
    folder = resolve_checkpoint(config.model.model)
    whole = read_spec(folder)
    max_model_len, dtype = context_of(config, whole), dtype_of(config, device, whole)
    before = device.available_memory()
    model = load_model(
        folder,
        dtype=dtype,
        device=place,
        max_model_len=max_model_len,
        load_format=config.model.load_format,
        quantization=config.model.quantization,
        collective=collective,
    )
    calibration = calibration_of(config, whole, shard)
    formats = formats_of(config, whole, shard, calibration)
    use_formats(model, formats, calibration)
    runner = eager_runner(model, dtype, config, backend)

    spec, page_size = model.spec, config.cache.page_size
    page = page_bytes(spec, page_size, dtype, formats)
    activations = activations_of(config, spec, dtype, device)
    copies = dense_pages_of(config, device, formats)
    dense = window_bytes(spec, copies, page_size, dtype, formats)
    budget = budget_of(config, device, page, dense, max_model_len, before, activations, graphs=0)
    reports.say(Room(budget.num_pages, budget.host_pages))
    pool = _pool.decode(next_line())
    kv = allocate_pool(spec, pool.pages, page_size, dtype, place, formats, copies)
    populate(kv)
    host = allocate_host_pool(kv, pool.host_pages + 1) if pool.host_pages else []
    return Follower(runner, kv, host, collective, spec.hidden_size, dtype, place)
