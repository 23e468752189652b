"""The runner on native CPU kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kernels.cpu.chain import NativeChain
from kernels.cpu.decoder import DecoderLayer as NativeLayer
from kernels.cpu.decoder import NativeDecoder
from kernels.cpu.linear import NativeLinear
from kernels.cpu.ops import NativeOps
from kernels.linear.dense import DenseLinear
from kernels.linear.quantized import is_quantized
from kernels.ops import AttentionBatch
from models.decoder import Decoder, DecoderLayer
from models.layers import Mlp
from worker.runner import EagerRunner, Runner


class NativeRunner:
    """A dense decoder, a whole step in one native call."""

    def __init__(self, decoder: NativeDecoder, head: NativeLinear, ops: NativeOps) -> None:
        self.name = ops.name
        self.chain: NativeChain | None = ops.chain(decoder, head)
        self._decoder = decoder
        self._head = head
        self._ops = ops

    def forward(
        self,
        ids: Tensor,
        batch: AttentionBatch,
        kv: Sequence[Tensor],
        read: Tensor | None = None,
    ) -> Tensor:
        return self._decoder.forward(ids, batch, kv, read)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(hidden, wide=True)

    def coarse(self) -> Runner:
        return NativeRunner(self._decoder.coarse(), self._head, self._ops)


def native_runner(decoder: Decoder, ops: NativeOps) -> Runner:
    """Takes a freshly loaded decoder over: its dense linear layers are packed and let go.

    Models with experts, and those whose weights are in few bits, run operation by operation, on the
    same kernels. Raises ValueError for
    shapes and dtypes the kernels do not take.
    """
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, DenseLinear):
                setattr(parent, name, ops.linear(child.weight, child.bias))
    if is_quantized(decoder):
        return EagerRunner(decoder, ops)
    layers: list[NativeLayer] = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        if not isinstance(layer.mlp, Mlp):
            return EagerRunner(decoder, ops)
        layers.append(
            NativeLayer(
                input_norm=layer.input_norm,
                qkv=_native(layer.attention.qkv),
                attention=layer.attention.layer,
                output=_native(layer.attention.output),
                mlp_norm=layer.mlp_norm,
                gate_up=_native(layer.mlp.gate_up),
                down=_native(layer.mlp.down),
            )
        )
    native = ops.decoder(decoder.embedding, layers, decoder.norm, decoder.spec.norm_eps)
    return NativeRunner(native, _native(decoder.head), ops)


def _native(linear: nn.Module) -> NativeLinear:
    assert isinstance(linear, NativeLinear)
    return linear
