"""Sampling parameters of every slot: device arrays by slot, and on the host what each one needs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

import torch
from torch import Tensor

from kernels.sampling.upload import upload
from scheduler.request import SamplingParams


class Need(IntFlag):
    """What a slot's rows have to go through; a step pays only for what some row of it needs."""

    NOISE = 1
    TRUNCATION = 2
    PENALTIES = 4
    BIAS = 8
    ALLOWED = 16
    BAD_WORDS = 32
    MIN_TOKENS = 64
    LOGPROBS = 128

    PROCESSING = PENALTIES | BIAS | ALLOWED | BAD_WORDS | MIN_TOKENS


@dataclass(frozen=True, slots=True)
class Rules:
    """The parameters of one slot that are lists, on the device. Ids lie in the vocabulary."""

    bias_ids: Tensor  # [b] int64, distinct
    bias: Tensor  # [b] float32
    allowed_ids: Tensor  # [a] int64, distinct
    stop_ids: Tensor  # [s] int64
    bad_prefixes: Tensor  # [w, length] int64, aligned right, -1 on the left
    bad_last: Tensor  # [w] int64, the token that would complete each bad word


class SlotSampling:
    """The parameters by slot. Slot 0, the null slot, is greedy and needs nothing."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        def column(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((num_slots,), value, dtype=dtype, device=device)

        self.vocab_size = vocab_size
        self.device = device
        self.temperature = column(0, torch.float32)  # 0 is greedy
        self.log_min_p = column(-math.inf, torch.float32)  # -inf is off
        self.top_k = column(vocab_size, torch.int64)  # the vocabulary's size is off
        self.top_p = column(1, torch.float64)
        self.seed = column(0, torch.int64)  # the 64 bits in two's complement
        self.choice = column(0, torch.int64)
        self.prompt_len = column(0, torch.int64)
        self.presence = column(0, torch.float32)
        self.frequency = column(0, torch.float32)
        self.repetition = column(1, torch.float32)
        self.min_tokens = column(0, torch.int64)
        # On the host. `needs` holds plain ints: `IntFlag` arithmetic is slow in a loop over rows.
        self.needs = [0] * num_slots
        self.logprobs = [0] * num_slots  # how many top tokens, where Need.LOGPROBS is set
        no_ids = torch.empty(0, dtype=torch.int64, device=device)
        self._no_rules = Rules(
            bias_ids=no_ids,
            bias=torch.empty(0, device=device),
            allowed_ids=no_ids,
            stop_ids=no_ids,
            bad_prefixes=no_ids.view(0, 0),
            bad_last=no_ids,
        )
        self.rules = [self._no_rules] * num_slots

    def admit(self, slot: int, params: SamplingParams, choice: int, prompt_len: int) -> None:
        """Gives the slot its new owner's parameters. Ids outside the vocabulary are dropped."""
        vocab = self.vocab_size
        top_k = params.top_k if 0 < params.top_k < vocab else vocab
        self.temperature[slot] = params.temperature
        self.log_min_p[slot] = math.log(params.min_p) if params.min_p > 0 else -math.inf
        self.top_k[slot] = top_k
        self.top_p[slot] = params.top_p
        self.seed[slot] = params.seed - 2**64 if params.seed >= 2**63 else params.seed
        self.choice[slot] = choice
        self.prompt_len[slot] = prompt_len
        self.presence[slot] = params.presence_penalty
        self.frequency[slot] = params.frequency_penalty
        self.repetition[slot] = params.repetition_penalty
        self.min_tokens[slot] = params.min_tokens

        needs = Need(0)
        if params.temperature > 0:
            needs |= Need.NOISE
            if params.min_p > 0 or top_k < vocab or params.top_p < 1:
                needs |= Need.TRUNCATION
        if (
            params.repetition_penalty != 1
            or params.frequency_penalty != 0
            or params.presence_penalty != 0
        ):
            needs |= Need.PENALTIES
        if params.logprobs is not None:
            needs |= Need.LOGPROBS
        self.logprobs[slot] = params.logprobs or 0
        rules, of_rules = self._build_rules(params)
        self.rules[slot] = rules
        self.needs[slot] = int(needs | of_rules)

    def _build_rules(self, params: SamplingParams) -> tuple[Rules, Need]:
        device = self.device
        bias: dict[int, float] = {}
        for token, value in params.logit_bias:
            if self._known(token):
                bias[token] = bias.get(token, 0.0) + value
        stops = sorted(filter(self._known, params.stop_token_ids)) if params.min_tokens else []
        words = [word for word in params.bad_words if self._known(word[-1])]
        if not (bias or stops or words or params.allowed_token_ids is not None):
            return self._no_rules, Need(0)

        def ids(values: Iterable[int]) -> Tensor:
            return upload(list(values), device)

        length = max((len(word) - 1 for word in words), default=0)
        padded = [[-1] * (length + 1 - len(word)) + list(word[:-1]) for word in words]
        allowed = sorted(set(filter(self._known, params.allowed_token_ids or ())))
        rules = Rules(
            bias_ids=ids(bias.keys()),
            bias=upload(list(bias.values()), device, torch.float32),
            allowed_ids=ids(allowed),
            stop_ids=ids(stops),
            bad_prefixes=ids(t for word in padded for t in word).view(len(words), length),
            bad_last=ids(word[-1] for word in words),
        )
        needs = Need(0)
        if bias:
            needs |= Need.BIAS
        if params.allowed_token_ids is not None:
            needs |= Need.ALLOWED
        if words:
            needs |= Need.BAD_WORDS
        if stops:
            needs |= Need.MIN_TOKENS
        return rules, needs

    def _known(self, token: int) -> bool:
        return 0 <= token < self.vocab_size
