"""Packed pages as the native kernels see them."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

import torch
from torch import Tensor

from kernels.kv.codec import Affine, Codec
from kernels.kv.format import Dense, KVFormat
from kernels.kv.paged import Paged
from kernels.kv.windows import DensePages

_MOST_GROUPS = 64
_RUN = 16  # dimensions that are read at a time, and so have one scale


class NativeFormat(Structure):
    """Mirror of the structure in `native/packed.h`."""

    _fields_: ClassVar = [
        ("page_bytes", c_int64),
        ("starts", c_int64 * 5),
        ("groups", c_int64 * 2),
        ("bits", c_int32 * 2),
        ("clip", c_float * 2),
        ("block", c_int64),
        ("signs", c_void_p),
        ("mean", c_void_p),
        ("coarse", c_int32),
        ("sink", c_int64),
        ("window_block", c_int64),
    ]


def native_format(kv: KVFormat) -> NativeFormat | None:
    """None for dense pages. Points into the format's tensors. Raises ValueError for a format that
    the native kernels do not read."""
    if isinstance(kv, Dense):
        return None
    if not isinstance(kv, Paged):
        raise ValueError(f"native kernels do not read pages of format {kv.name}")
    keys, values = (_affine(codec, kv.head_dim) for codec in (kv.keys, kv.values))
    rotation, windows = kv.rotation, kv.windows
    return NativeFormat(
        page_bytes=kv.layout.bytes,
        starts=(c_int64 * 5)(*kv.layout.starts[:5]),
        groups=(c_int64 * 2)(keys.groups(kv.head_dim), values.groups(kv.head_dim)),
        bits=(c_int32 * 2)(keys.bits, values.bits),
        clip=(c_float * 2)(keys.clip, values.clip),
        block=0 if rotation is None else rotation.block,
        signs=None if rotation is None else rotation.signs.data_ptr(),
        mean=_floats(kv.key_mean),
        coarse=kv.reads_coarsely,
        sink=0 if windows is None else windows.sink,
        window_block=0 if windows is None else windows.block,
    )


def copies_address(
    kv: KVFormat, pool: Tensor, copies: DensePages | None, dtype: torch.dtype
) -> int | None:
    """Of the pool's dense pages of packed positions, for a model that computes in `dtype`; None
    where there are no windows. Raises ValueError where a step does not say which these are."""
    if kv.windows is None:
        return None
    if copies is None:
        raise ValueError(f"a step over {kv.name} pages says where its dense copies lie")
    return kv.dense(pool, copies.count, dtype).data_ptr()


def _affine(codec: Codec, head_dim: int) -> Affine:
    if not isinstance(codec, Affine):
        raise ValueError(f"native kernels do not read codes of {codec.name}")
    run = head_dim * codec.bits // 8 if codec.bits < 8 else head_dim // 2
    groups = codec.groups(head_dim)
    if groups > _MOST_GROUPS or (groups > 1 and (run % _RUN or codec.group % _RUN)):
        raise ValueError(f"native kernels do not read groups of {codec.group} in {head_dim}")
    return codec


def _floats(x: Tensor | None) -> int | None:
    if x is None:
        return None
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise ValueError("key means must be a contiguous fp32 tensor")
    return x.data_ptr()
