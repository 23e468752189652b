"""Muon for matrices, AdamW for everything else, on the fused parameters of the demo model."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from makers.demo_model import DemoModel, Layer


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices to g [n, rows, cols], roughly, in bf16.

    Newton-Schulz iteration with the quintic coefficients of Muon (Keller Jordan, 2024), chosen to
    push every singular value into about [0.7, 1.2] in five steps rather than to converge to one.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


@dataclass
class Block:
    """Rows of a stored parameter that make one logical matrix."""

    param: Tensor
    start: int
    rows: int

    def of(self, tensor: Tensor) -> Tensor:
        """The block of a tensor shaped like the parameter."""
        return tensor[self.start : self.start + self.rows]


class Optimizer:
    """Muon on the projections (q, k, v, gate and up each a matrix), AdamW on the rest."""

    def __init__(self, model: DemoModel, lr: float, adam_lr: float, momentum: float = 0.95) -> None:
        self.lr, self.momentum = lr, momentum
        blocks: list[Block] = []
        s = model.shape
        kv = s.kv_heads * s.head_dim
        for layer in model.layers:
            assert isinstance(layer, Layer)
            start = 0
            for rows in (s.heads * s.head_dim, kv, kv):
                blocks.append(Block(layer.qkv, start, rows))
                start += rows
            blocks += [Block(layer.gate_up, i * s.intermediate, s.intermediate) for i in (0, 1)]
            blocks += [Block(layer.out, 0, s.hidden), Block(layer.down, 0, s.hidden)]
        # Matrices of one shape are orthogonalised together in batched products.
        self.groups: dict[tuple[int, int], list[Block]] = defaultdict(list)
        for block in blocks:
            self.groups[block.rows, block.param.shape[1]].append(block)
        self.matrices = list({id(b.param): b.param for b in blocks}.values())
        self.velocity = [torch.zeros_like(p) for p in self.matrices]
        owned = {id(p) for p in self.matrices}
        rest = [p for p in model.parameters() if id(p) not in owned]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.adam_lr = adam_lr

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One update with both learning rates multiplied by `scale`; clears the gradients."""
        update: dict[int, Tensor] = {}
        for p, v in zip(self.matrices, self.velocity, strict=True):
            assert p.grad is not None
            v.lerp_(p.grad, 1 - self.momentum)
            update[id(p)] = p.grad.lerp_(v, self.momentum)  # Nesterov
        for (rows, cols), blocks in self.groups.items():
            stacked = torch.stack([b.of(update[id(b.param)]) for b in blocks])
            made = orthogonalize(stacked) * (max(1.0, rows / cols) ** 0.5 * self.lr * scale)
            for block, delta in zip(blocks, made, strict=True):
                block.of(block.param).sub_(delta)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        for p in self.matrices:
            p.grad = None
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """Everything an exact continuation needs."""
        return {"velocity": self.velocity, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for mine, saved in zip(self.velocity, state["velocity"], strict=True):
            mine.copy_(saved)
        self.adam.load_state_dict(state["adam"])
