"""Same seed, same text: whatever the neighbours, chunks, drafts, depth, prefix hits or preemptions.

fp32 on the CPU with linear layers whose rows do not depend on how many there are, so results must
be token-identical to decoding each request alone.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest
import torch

from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.format import KVFormat, windows_of
from kernels.kv.presets import SEALED, layer_formats
from kernels.kv.scales import HeadScales
from kernels.kv.sealed import Sealed
from kernels.kv.windows import Windows
from kernels.linear.prepare import prepare_linears
from kernels.torch_ops import TorchOps
from models.decoder import Decoder
from models.spec import ModelSpec
from scheduler.admission import Policy, make_policy
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from scheduler.speculation import FixedDrafts
from tests.e2e.driving import Result, drive
from worker.executor import ThreadExecutor
from worker.kv_pool import allocate_host_pool, allocate_pool
from worker.runner import EagerRunner, Runner
from worker.sampler import Sampler
from worker.sampling_state import SlotSampling
from worker.slots import SlotTable
from worker.window_pages import WindowPages, dense_page_count
from worker.worker import Worker, WorkerFacts

VOCAB, CONTEXT, CPU = 160, 256, torch.device("cpu")
SPEC = ModelSpec.from_hf(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }
)
CONFIG = SchedulerConfig(
    num_pages=200, page_size=8, max_num_seqs=8, max_step_tokens=512, max_model_len=CONTEXT
)
SAMPLERS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 1.0},
    "top-p": {"temperature": 0.7, "top_p": 0.8},
    "top-k, min-p": {"temperature": 1.0, "top_k": 20, "min_p": 0.02},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
    },
    "bias, bans, minimum": {
        "temperature": 1.0,
        "logit_bias": ((3, 5.0), (4, -100.0)),
        "bad_words": ((3, 3), (7,)),
        "min_tokens": 6,
    },
}
# Those that others come to as well are left to `make exhaustive`.
CELLS = [
    pytest.param(name, marks=pytest.mark.exhaustive) if name in ("temperature", "top-p") else name
    for name in SAMPLERS
]


# Of the texts here, which are short: first tokens, and blocks of the latest.
WINDOWS = {
    "k8v4": (5, 16),
    "k4v2h": (12, 32),
    "int2h": (40, 16),
    "turbo2": (0, 24),
    "turbo3": (20, 0),
    "oscar2": (12, 8),
}


# Scales of heads: of a layer's keys, of its values. Larger ones than needed, so that bits are lost.
SCALES = HeadScales(torch.tensor([[6, -2], [-3, 7]]), torch.tensor([[-4, 8], [7, 0]]))


def layers(kv_format: str, heads: int = SPEC.num_kv_heads) -> list[KVFormat]:
    """By a format's name, which "scales" or "halves" may follow."""
    dim, size, windows = SPEC.head_dim, CONFIG.page_size, WINDOWS.get(kv_format, (0, 0))
    if kv_format in SEALED:  # heads and pages are too small for its groups of 32
        return [Sealed(heads, size, dim, Windows(*windows), group=8)] * SPEC.num_layers
    name, _, more = kv_format.partition(" ")
    means, fitted = torch.zeros(SPEC.num_layers, heads, dim), None
    if more == "scales":
        fitted = Calibration(name, (), means, Balance.nothing(means.shape), SCALES)
    shape = (SPEC.num_layers, heads, size, dim)
    return layer_formats(name, *shape, None, fitted, *windows, more == "halves")


def windowed(config: SchedulerConfig, kv_format: str) -> SchedulerConfig:
    windows = windows_of(layers(kv_format))
    return config if windows is None else replace(config, prefix_block=windows.block)


def filled() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(SPEC, dtype=torch.float32, max_model_len=CONTEXT)
    for name, target in model.targets().items():
        if target.dim() > 1:  # wide enough that attention and text vary
            target.normal_(0.0, 1.0 if "embed" in name else 0.3)
        else:
            target.fill_(1.0)
    return model


@cache
def decoder(kv_format: str = "auto") -> Decoder:
    model = filled()
    prepare_linears(model, "invariant")
    model.use_formats(layers(kv_format))
    return model


def slot_table(config: SchedulerConfig, kv_format: str = "auto") -> SlotTable:
    num_slots, size, windows = config.max_num_seqs + 1, config.page_size, None
    found = windows_of(layers(kv_format))
    if found is not None:
        count = dense_page_count(found, num_slots, size, config.max_step_tokens)
        windows = WindowPages(found, count, num_slots, -(-CONTEXT // size), size, CPU)
    return SlotTable(num_slots, CONTEXT, size, CPU, windows)


def worker(
    config: SchedulerConfig, kv_format: str = "auto", runner: Runner | None = None
) -> Worker:
    """By torch unless another runner is given."""
    size, slots = config.page_size, slot_table(config, kv_format)
    copies = 0 if slots.windows is None else slots.windows.count
    kv = allocate_pool(SPEC, config.num_pages, size, torch.float32, CPU, layers(kv_format), copies)
    return Worker(
        runner or EagerRunner(decoder(kv_format), TorchOps()),
        kv,
        slots,
        Sampler(SlotSampling(config.max_num_seqs + 1, VOCAB, CPU), slots.tokens),
        ThreadExecutor(1),
        WorkerFacts(VOCAB, CONTEXT, config.num_pages, config.page_size, "cpu", "float32"),
        allocate_host_pool(kv, config.host_pages + 1),
    )


@cache
def requests(sampler: str) -> tuple[Request, ...]:
    """Prompts of all lengths; many begin alike, so that they can share pages."""
    rng = random.Random(1)
    stems = [tuple(rng.randrange(VOCAB) for _ in range(60)) for _ in range(2)]
    made = []
    for i in range(14):
        own = tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(1, 30)))
        prompt = rng.choice(stems)[: rng.randrange(0, 60)] + own
        params = SamplingParams(
            max_tokens=rng.randrange(8, 60),
            seed=1000 + i,
            stop_token_ids=frozenset({11}),
            logprobs=1,
            **SAMPLERS[sampler],  # type: ignore[arg-type]
        )
        made.append(Request(f"r{i}", prompt, params, 0.0, n=2 if i % 5 == 0 else 1))
    return tuple(made)


def run(
    config: SchedulerConfig,
    batch: tuple[Request, ...],
    *,
    depth: int = 1,
    drafts: int = 0,
    arrivals_per_step: int = 1000,
    policy: Policy | None = None,
    kv_format: str = "auto",
    runner: Runner | None = None,
) -> tuple[dict[tuple[str, int], Result], Scheduler]:
    config = windowed(config, kv_format)
    scheduler = Scheduler(config, FixedDrafts(drafts), policy)
    device = worker(config, kv_format, runner)
    try:
        found = drive(scheduler, device, batch, depth=depth, arrivals_per_step=arrivals_per_step)
    finally:
        device.close()
    assert scheduler.load().pages_held == 0
    return found, scheduler


@cache
def alone(
    sampler: str, kv_format: str = "auto", runner: Runner | None = None
) -> dict[tuple[str, int], Result]:
    """Each choice by itself: one row, whole prompt, no prefix cache, no pipelining."""
    plain = replace(CONFIG, enable_prefix_cache=False, max_num_seqs=1)
    found: dict[tuple[str, int], Result] = {}
    for request in requests(sampler):
        found |= run(plain, (request,), depth=0, kv_format=kv_format, runner=runner)[0]
    return found


def same(
    found: dict[tuple[str, int], Result],
    sampler: str,
    kv_format: str = "auto",
    within: float = 1e-4,  # of a log-probability
    runner: Runner | None = None,
) -> None:
    expected = alone(sampler, kv_format, runner)
    assert found.keys() == expected.keys()
    for key, result in found.items():
        assert result.tokens == expected[key].tokens, key
        ends = result.finish, expected[key].finish
        assert ends[0] is not None
        assert ends[1] is not None
        assert ends[0].reason == ends[1].reason, key
        assert [p.logprob for p in result.logprobs] == pytest.approx(
            [p.logprob for p in expected[key].logprobs], abs=within
        )


everywhere = pytest.mark.parametrize("sampler", CELLS)


@everywhere
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_neighbours_and_pipelining(sampler: str, depth: int) -> None:
    same(run(CONFIG, requests(sampler), depth=depth, arrivals_per_step=2)[0], sampler)


@everywhere
@pytest.mark.parametrize("budget", [9, 40])
def test_chunked_prefill(sampler: str, budget: int) -> None:
    config = replace(CONFIG, max_step_tokens=budget, enable_prefix_cache=False)
    same(run(config, requests(sampler))[0], sampler)


@everywhere
def test_prefix_hits(sampler: str) -> None:
    found, scheduler = run(CONFIG, requests(sampler), arrivals_per_step=1)
    assert scheduler.load().prefix_hits > 100
    same(found, sampler)


@everywhere
@pytest.mark.parametrize("prefix", [True, False])
def test_preemption(sampler: str, prefix: bool) -> None:
    config = replace(CONFIG, num_pages=34, max_step_tokens=64, enable_prefix_cache=prefix)
    crowded = make_policy("aggressive", watermark=0.0)
    found, scheduler = run(config, requests(sampler), policy=crowded)
    assert scheduler.load().preemptions > 0
    same(found, sampler)


@everywhere
@pytest.mark.parametrize(("prefix", "depth", "k"), [(True, 1, 0), (False, 2, 3)])
def test_swapping(sampler: str, prefix: bool, depth: int, k: int) -> None:
    config = replace(CONFIG, num_pages=34, enable_prefix_cache=prefix, host_pages=60)
    crowded = make_policy("aggressive", watermark=0.0)
    found, scheduler = run(config, requests(sampler), depth=depth, drafts=k, policy=crowded)
    assert scheduler.load().pages_swapped_out > 0
    assert scheduler.load().pages_swapped_in > 0
    same(found, sampler)


@everywhere
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("pages", [200, 40])
def test_drafts_of_any_quality_change_nothing(sampler: str, k: int, pages: int) -> None:
    """Without a drafter the drafts are whatever stands in the token table: leftovers of former
    owners and of rejected rows. Verification must see through all of them."""
    config = replace(CONFIG, num_pages=pages)
    found, _ = run(config, requests(sampler), drafts=k, arrivals_per_step=3)
    same(found, sampler)


@pytest.mark.parametrize("sampler", ["greedy", "penalties"])
def test_right_drafts_are_accepted(sampler: str) -> None:
    """A drafter that knows the answer: fewer steps, same text."""
    answers = alone(sampler)
    batch = tuple(replace(r, n=1) for r in requests(sampler)[:4])
    device = worker(CONFIG)
    scheduler = Scheduler(CONFIG, FixedDrafts(3))
    tokens = device._slots.tokens
    launch = device.launch

    def knowing(plan):  # type: ignore[no-untyped-def]
        for admit in plan.admits:
            request = batch[admit.params.seed - 1000]
            text = request.prompt + tuple(answers[request.id, 0].tokens)
            tokens[admit.slot, : len(text)] = torch.tensor(text, dtype=torch.int32)
        return launch(plan)

    device.launch = knowing  # type: ignore[method-assign]
    found = drive(scheduler, device, batch, depth=0)
    device.close()
    for key, result in found.items():
        assert result.tokens == answers[key].tokens
    longest = max(len(result.tokens) for result in found.values())
    assert scheduler.load().steps <= 0.5 * longest
