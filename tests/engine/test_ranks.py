"""Tensor parallelism as it is served: the bundled model on two real processes, over gloo."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.config import PROJECT
from engine.build import build_worker
from engine.client import EngineClient
from engine.config import EngineConfig
from engine.errors import StartupError
from engine.llm import LLM
from engine.ranks import Ranks
from engine.supervisor import RestartPolicy, Supervisor
from scheduler.request import FinishReason, Load, Request, SamplingParams
from scheduler.scheduler import Scheduler
from tests.e2e.driving import drive
from tests.models.checkpoints import save
from worker.device import resolve_device

pytestmark = pytest.mark.slow

TARGET, DRAFT = (PROJECT / "assets" / "demo" / name for name in ("target", "draft"))
QUESTION = "<|im_start|>user\nHow do I read a file?<|im_end|>\n<|im_start|>assistant\n"
PROMPTS = [
    QUESTION,
    "def read_lines(path):\n",
    "The module os provides a way of using operating system dependent functionality. " * 4,
    "import os\n" * 12 + "import",
]
OPTIONS = {"dtype": "float32", "device": "cpu", "compile": False, "max_num_seqs": 4}


def config(folder: Path = TARGET, size: int = 2, **options: object) -> EngineConfig:
    return EngineConfig.of(
        model=str(folder), tensor_parallel_size=size, **{**OPTIONS, "num_pages": 600, **options}
    )


def children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += map(int, (task / "children").read_text().split())
    return found


def followers(pid: int) -> list[int]:
    return [
        child
        for child in children(pid)
        if b"engine.follower" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    """Ended within that time; a zombie has."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@contextlib.contextmanager
def llm(size: int, **options: object) -> Iterator[LLM]:
    before = followers(os.getpid())
    with LLM(str(TARGET), tensor_parallel_size=size, **OPTIONS, **options) as made:
        mine = [pid for pid in followers(os.getpid()) if pid not in before]
        assert len(mine) == size - 1
        yield made
    assert gone(mine)


def texts(model: LLM, max_tokens: int) -> list[tuple[int, ...]]:
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0)
    seeded = [SamplingParams(max_tokens=max_tokens, seed=3 + i, top_p=0.9) for i in range(4)]
    found = model.generate(PROMPTS * 2, [greedy] * 4 + seeded, ignore_eos=True)
    return [completion.choices[0].tokens for completion in found]


def test_two_ranks_write_what_one_writes_with_drafts_and_prefix_hits() -> None:
    options = {"num_pages": 600, "draft_model": str(DRAFT)}
    found: dict[int, list[tuple[int, ...]]] = {}
    loads: dict[int, Load] = {}
    for size in (1, 2):
        with llm(size, **options) as model:
            assert model.facts.device == ("cpu" if size == 1 else "2 × cpu")
            found[size] = texts(model, 24)
            found[size] += texts(model, 8)
            loads[size] = model.load()
    assert found[2] == found[1]
    assert loads[2].accepted_tokens > 0
    assert loads[2].prefix_hits > 100


@pytest.mark.exhaustive
def test_two_ranks_write_what_one_writes_under_memory_pressure() -> None:
    """Every rank's pages are saved to host memory and come back."""
    options = {
        "num_pages": 20,
        "max_model_len": 300,
        "policy": "aggressive",
        "watermark": 0.0,
        "swap_bytes": 20 << 20,
        "enable_prefix_cache": False,
    }
    found: dict[int, list[tuple[int, ...]]] = {}
    for size in (1, 2):
        with llm(size, **options) as model:
            found[size] = texts(model, 60)
            load = model.load()
            assert load.preemptions > 0
            assert load.pages_swapped_in > 0
    assert found[2] == found[1]


@pytest.mark.exhaustive
def test_four_ranks_by_batch_invariant_layers(tmp_path: Path) -> None:
    """A request alone and among others: the same bits, so the same text, and that of one rank."""
    save(tmp_path, "qwen3", num_key_value_heads=4)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, logprobs=0)
    requests = [Request(f"r{i}", tuple(range(3 + i, 20 + 3 * i)), params, 0.0) for i in range(3)]
    found = {}
    for size in (1, 4):
        worker, limits = build_worker(
            config(tmp_path, size, deterministic=True), lambda phase: None
        )
        mine = followers(os.getpid())
        try:
            together = drive(Scheduler(limits), worker, requests)
            plain = dataclasses.replace(limits, enable_prefix_cache=False)
            for request in requests:
                alone = drive(Scheduler(plain), worker, [request])
                assert alone[request.id, 0].logprobs == together[request.id, 0].logprobs
            found[size] = {key: result.tokens for key, result in together.items()}
        finally:
            worker.close()
        assert gone(mine)
    assert found[4] == found[1]


@pytest.mark.parametrize(
    "windows",
    [
        {"kv_format": "k4v2h", "kv_window": 32, "kv_sink": 8},
        {"kv_format": "oscar2", "page_size": 32, "kv_sink": 8},
    ],
    ids=["k4v2h", "oscar2"],
)
def test_dense_windows_and_hits_on_two_processes(tmp_path: Path, windows: dict) -> None:
    """A request alone and on a prefix of another: the same bits. All ranks compute sinks again."""
    save(tmp_path, "qwen3", num_key_value_heads=4, head_dim=32)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, logprobs=0)
    stem = tuple(range(3, 60))
    requests = [Request(f"r{i}", (*stem, 70 + i), params, 0.0) for i in range(3)]
    worker, limits = build_worker(
        config(tmp_path, 2, deterministic=True, **windows), lambda phase: None
    )
    try:
        scheduler = Scheduler(limits)
        together = drive(scheduler, worker, requests, arrivals_per_step=1)
        assert scheduler.load().prefix_hits > 0
        plain = dataclasses.replace(limits, enable_prefix_cache=False)
        for request in requests:
            alone = drive(Scheduler(plain), worker, [request])
            assert alone[request.id, 0].tokens == together[request.id, 0].tokens
            assert alone[request.id, 0].logprobs == together[request.id, 0].logprobs
    finally:
        worker.close()


# -- processes that die ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def served(**options: object):
    policy = RestartPolicy(first_backoff=0.01)
    link = Supervisor(config(**options), policy=policy, drain_seconds=20.0)
    link.spawn()
    client = EngineClient(link)
    try:
        await client.ready()
        assert link.pid is not None
        yield client, link, followers(link.pid)
    finally:
        await client.close()


def request(name: str, max_tokens: int) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=0)
    return Request(name, tuple(range(5, 40)), params, arrival=time.monotonic())


async def test_a_follower_that_dies_ends_all_and_all_are_started_again() -> None:
    async with served() as (client, link, first):
        engine, process = link.pid, link._process
        stream = client.submit(request("r", 300))
        await anext(stream)
        os.kill(first[0], signal.SIGKILL)
        words = await asyncio.wait_for(asyncio.wrap_future(process.exited), 20)
        said = "the engine met a fault: rank 1: its process ended unexpectedly (killed by SIGKILL)"
        assert words == said
        outputs = [output async for output in stream]  # goes on with the next engine
        assert outputs[-1].finish.reason is FinishReason.LENGTH
        second = followers(link.pid)
        assert len(second) == 1
        assert gone([engine, *first])
        outputs = [output async for output in client.submit(request("after", 5))]
        assert outputs[-1].finish.reason is FinishReason.LENGTH
    assert gone([link.pid, *second])


@pytest.mark.exhaustive
async def test_a_follower_that_dies_while_nothing_runs_is_noticed() -> None:
    async with served() as (client, link, first):
        engine = link.pid
        os.kill(first[0], signal.SIGKILL)
        assert await asyncio.to_thread(gone, [engine])
        await asyncio.wait_for(client.ready(), 60)
        # And one that hangs for ever does not outlive its engine's end.
        hanging = followers(link.pid)
        os.kill(hanging[0], signal.SIGSTOP)
        os.kill(link.pid, signal.SIGKILL)
        os.kill(hanging[0], signal.SIGCONT)
        assert await asyncio.to_thread(gone, hanging)


async def test_followers_end_with_a_killed_engine_in_the_middle_of_a_step() -> None:
    async with served() as (client, link, first):
        stream = client.submit(request("r", 300))
        await anext(stream)
        os.kill(link.pid, signal.SIGKILL)
        assert await asyncio.to_thread(gone, first)
        outputs = [output async for output in stream]  # goes on with the next engine
        assert outputs[-1].finish.reason is FinishReason.LENGTH


async def test_sigterm_drains_through_rank_0() -> None:
    async with served() as (client, link, first):
        stream = client.submit(request("r", 60))
        await anext(stream)
        for pid in first:
            os.kill(pid, signal.SIGTERM)  # as a service manager sends it to everyone
        os.kill(link.pid, signal.SIGTERM)
        outputs = [output async for output in stream]
        assert outputs[-1].finish.reason is FinishReason.LENGTH
        assert await asyncio.to_thread(gone, first)


# -- starts that fail -----------------------------------------------------------------------


def refusal(folder: Path, size: int, **options: object) -> str:
    before = followers(os.getpid())
    with pytest.raises(StartupError) as error:
        build_worker(config(folder, size, **options), lambda phase: None)
    assert "\n" not in str(error.value)
    assert followers(os.getpid()) == before
    return str(error.value)


def test_what_rank_0_refuses(tmp_path: Path) -> None:
    assert refusal(TARGET, 3) == "8 attention heads cannot be divided among 3 ranks."
    save(tmp_path, "gpt_neox", num_key_value_heads=None)
    assert re.match("a gpt_neox model runs through the transformers", refusal(tmp_path, 2))


def test_what_rank_0_finds_once_the_others_run() -> None:
    assert "one sequence of max_model_len 8,192 needs" in refusal(TARGET, 2, num_pages=4)


def test_what_a_follower_finds_is_a_sentence_too(tmp_path: Path) -> None:
    ranks = Ranks(config(tmp_path / "nothing"), 1)
    try:
        ranks.join(resolve_device("cpu"))
        with pytest.raises(StartupError) as error:
            ranks.allocate(10, 0)
        assert str(error.value) == f"rank 1: there is no folder {tmp_path}/nothing."
    finally:
        ranks.close()


def test_a_follower_that_dies_before_it_has_joined() -> None:
    ranks = Ranks(config(), 1)
    (process,) = ranks._processes
    process.popen.kill()
    try:
        words = r"^rank 1: its process ended unexpectedly \(killed by SIGKILL\)$"
        with pytest.raises(StartupError, match=words):
            ranks.join(resolve_device("cpu"))
    finally:
        ranks.close()


def test_a_follower_that_hangs_is_ended_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.ranks.END_SECONDS", 0.2)
    ranks = Ranks(config(), 1)
    (process,) = ranks._processes
    os.kill(process.popen.pid, signal.SIGSTOP)
    ranks.close()
    assert process.popen.returncode == -signal.SIGKILL
