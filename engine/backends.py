"""Who computes attention and what is around it: chosen once, at start-up."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.config import DeviceConfig
from engine.errors import StartupError
from kernels import flashinfer
from kernels.flashinfer import FlashInferAttention
from kernels.ops import AttentionLayer, Ops
from kernels.torch_ops import TorchOps
from models.spec import ModelSpec
from worker.device import Device
from worker.sampler import Form

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """What a start has chosen."""

    # One for each model, which has its own heads: the spec, and the dtype it computes in. Raises
    # StartupError where what was asked for does not take the model.
    ops: Callable[[ModelSpec, torch.dtype], Ops]
    draw: Form | None = None  # the sampler's; None: what the sampler takes by itself
    native: bool = False  # native CPU kernels take over where they can


def choose_backend(config: DeviceConfig, device: Device, page_size: int) -> Backend:
    """By `attention_backend`. Raises `StartupError` for what this machine cannot do."""
    asked, gpu = config.attention_backend, device.torch_device.type == "cuda"
    if config.deterministic and asked in ("flashinfer", "triton"):
        raise StartupError(
            f"attention_backend {asked} adds in an order that depends on the batch: serve with "
            "--attention-backend torch, or without --deterministic."
        )
    plain = Backend(lambda spec, dtype: TorchOps(), native=asked == "auto" and not gpu)
    if asked == "torch" or (asked == "auto" and (config.deterministic or not gpu)):
        return plain
    missing = _no_triton(gpu)
    if missing is None:
        return _triton(asked, device.torch_device, page_size)
    if asked != "auto":
        raise StartupError(f"attention_backend {asked} was asked for, but {missing}.")
    log.warning("serving with plain torch operations, which are slower: %s", missing)
    return plain


def _no_triton(gpu: bool) -> str | None:
    """Why kernels cannot run, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if gpu:
        return None
    # Under TRITON_INTERPRET kernels run on the CPU, for tests: nobody would serve so.
    from kernels.interpreter import interpreted, mend

    if not interpreted():
        return "the device is a CPU, and its kernels are for GPUs"
    mend()
    return None


def _triton(asked: str, device: torch.device, page_size: int) -> Backend:
    # Imported here, for there are machines without Triton.
    from kernels.sampling import choose_triton
    from kernels.triton_ops import DividedAttention, TritonOps

    def ops(spec: ModelSpec, dtype: torch.dtype) -> Ops:
        if asked == "triton":
            return TritonOps()
        found = flashinfer.probe(device, dtype, page_size, _layers(spec))
        if isinstance(found, FlashInferAttention):
            return TritonOps(found if asked == "flashinfer" else DividedAttention(found))
        if asked == "flashinfer":
            raise StartupError(f"attention_backend flashinfer was asked for, but {found}.")
        log.info("attention by Triton kernels alone: %s", found)
        return TritonOps()

    return Backend(ops, choose_triton)


def _layers(spec: ModelSpec) -> list[AttentionLayer]:
    """One of each kind of attention layer that the model has."""
    return [
        AttentionLayer(
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.head_dim**-0.5,
            None,
            window=window,
        )
        for window in dict.fromkeys(spec.windows)
    ]
