"""Mixture of experts, as Qwen3-MoE routes it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kernels.linear.dense import DenseLinear
from kernels.ops import Ops
from models.layers import Mlp, Target, linear_targets
from models.parallel import ALONE, Collective, Cut, Shard
from models.spec import MoeSpec


class Moe(nn.Module):
    """Each token goes through its `top_k` experts; their outputs are summed by router weight.

    Tokens are sorted by expert, so the Python loop is over the experts that were hit, never over
    tokens. Reads the experts' token counts on the host: once a layer and step.
    """

    def __init__(
        self,
        hidden: int,
        spec: MoeSpec,
        dtype: torch.dtype,
        device: torch.device,
        collective: Collective,
    ) -> None:
        """spec: of this rank's part, which is some neurons of every expert."""
        super().__init__()
        self._spec = spec
        self._collective = collective
        self.router = DenseLinear.empty(hidden, spec.num_experts, dtype=dtype, device=device)
        self.experts = nn.ModuleList(
            # What ranks bring to an expert is summed once, for all experts together.
            Mlp(hidden, spec.intermediate_size, False, dtype, device, ALONE)
            for _ in range(spec.num_experts)
        )

    def forward(self, x: Tensor, ops: Ops) -> Tensor:
        """x: [tokens, hidden] -> [tokens, hidden]."""
        weights, experts = self._route(x)
        tokens, top_k = experts.shape
        # Stable, so that an expert sees its tokens in their order.
        order = experts.flatten().argsort(stable=True)
        counts = torch.bincount(experts.flatten(), minlength=self._spec.num_experts).tolist()
        sorted_x = x[order // top_k]
        found = torch.empty_like(sorted_x)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                found[rows] = self.experts[expert](sorted_x[rows], ops)
                start += count
        back = torch.empty_like(found)
        back[order] = found
        # A token's experts are added in the order of their rank, whatever else is in the step.
        parts = back.view(tokens, top_k, -1).float() * weights[..., None]
        return self._collective.all_reduce(parts.sum(1).to(x.dtype))

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights fp32 and expert ids, each [tokens, top_k]."""
        probabilities = self.router(x).float().softmax(-1)
        weights, experts = probabilities.topk(self._spec.top_k, dim=-1)
        if self._spec.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, experts

    def targets(self, prefix: str) -> Iterator[Target]:
        yield from linear_targets(f"{prefix}.gate", self.router)
        for i, expert in enumerate(self.experts):
            assert isinstance(expert, Mlp)
            yield from expert.targets(f"{prefix}.experts.{i}")

    def cuts(self, prefix: str, shard: Shard) -> Iterator[tuple[str, Cut]]:
        for i, expert in enumerate(self.experts):
            assert isinstance(expert, Mlp)
            yield from expert.cuts(f"{prefix}.experts.{i}", shard)
