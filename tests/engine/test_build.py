"""The worker that a configuration builds, and the sentences that end a start."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.arithmetic import swap_when_built
from engine.build import build_worker
from engine.config import EngineConfig
from engine.errors import StartupError
from kernels.cpu.build import BuildError
from kernels.cpu.ops import NativeOps
from scheduler.plan import Admit, Row, RowResult, StepPlan, StepResult
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from tests.e2e.driving import drive
from tests.e2e.serving import REPOSITORY
from tests.models.checkpoints import save
from worker.worker import Worker

CACHE = str(REPOSITORY / ".pytest_cache" / "foresight")
PROMPT = tuple(range(3, 40))


def config(folder: Path, **options: object) -> EngineConfig:
    small = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "num_pages": 300}
    return EngineConfig.of(model=str(folder), **{**small, "compile": False, **options})


def build(folder: Path, **options: object) -> tuple[Worker, SchedulerConfig]:
    return build_worker(config(folder, **options), lambda phase: None)


def greedy(worker: Worker, limits: SchedulerConfig, tokens: int = 12) -> list[int]:
    request = Request("a", PROMPT, SamplingParams(max_tokens=tokens, temperature=0), 0.0)
    return drive(Scheduler(limits), worker, [request])["a", 0].tokens


def by_transformers(folder: Path, tokens: int = 12) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = list(PROMPT)
    with torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(
    ("model_type", "changes", "native"),
    [
        ("llama", {}, False),
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}, True),
        ("gpt_neox", {"num_key_value_heads": None}, False),  # by the transformers library
    ],
)
def test_greedy_text_equals_transformers(
    model_type: str, changes: dict[str, object], native: bool, tmp_path: Path
) -> None:
    save(tmp_path, model_type, **changes)
    options = {"compile": True, "deterministic": True, "cache_dir": CACHE} if native else {}
    worker, limits = build(tmp_path, **options)
    try:
        assert greedy(worker, limits) == by_transformers(tmp_path)
    finally:
        worker.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "model", "llama")
    return tmp_path / "model"


def test_a_running_stream_keeps_its_arithmetic_when_the_runner_changes(folder: Path) -> None:
    """Sequences admitted before the change go on with the old runner, later ones use the new."""
    worker, limits = build(folder)
    first, used = worker._runner, []

    class Other:
        name = "other"

        def forward(self, ids, batch, kv, read=None):
            used.append(batch.query_starts.shape[0] - 1)
            return first.forward(ids, batch, kv, read)

        def logits(self, hidden):
            return -first.logits(hidden)  # another text, so that a mix-up would show

    params = SamplingParams(max_tokens=20, temperature=0)
    old, new = (Request(name, PROMPT, params, 0.0) for name in ("old", "new"))
    expected = {"old": greedy(worker, limits, 20)}
    worker.use(Other())
    expected["new"] = greedy(worker, limits, 20)
    assert expected["old"] != expected["new"]
    worker.use(first)
    used.clear()

    launch, steps = worker.launch, []

    def launch_and_change(plan):
        steps.append(plan)
        if len(steps) == 5:
            worker.use(Other())
        return launch(plan)

    worker.launch = launch_and_change  # type: ignore[method-assign]
    scheduler = Scheduler(limits)
    plan_as_before = scheduler.plan

    def plan(now):
        if len(steps) == 8 and not any(request.id == "new" for request in arrived):
            arrived.append(new)
            scheduler.add(new, now)
        return plan_as_before(now)

    arrived = [old]
    scheduler.add(old, 0.0)
    scheduler.plan = plan  # type: ignore[method-assign]
    results = drive(scheduler, worker, [])
    worker.close()
    assert results["old", 0].tokens == expected["old"]
    assert results["new", 0].tokens == expected["new"]
    assert set(used) == {1}


def test_kernels_that_cannot_be_built_leave_the_worker_as_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = build(folder)
    before = worker._runner
    failed: Future[NativeOps] = Future()
    swap_when_built(failed, lambda: pytest.fail("loaded for nothing"), worker.use)
    failed.set_exception(BuildError("no C++ compiler among g++"))
    worker.close()
    assert worker._runner is before
    assert "slower: no C++ compiler among g++" in caplog.text


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="there is no folder"):
        build(tmp_path / "nothing")


def test_a_damaged_checkpoint(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(StartupError, match="damaged or incomplete"):
        build(folder)


def test_an_architecture_nobody_computes(folder: Path) -> None:
    shutil.copy(folder / "config.json", folder / "kept.json")
    read = json.loads((folder / "config.json").read_text())
    read |= {"model_type": "no_such_model", "architectures": ["NoSuchModel"]}
    (folder / "config.json").write_text(json.dumps(read))
    with pytest.raises(StartupError, match="NoSuchModel"):
        build(folder)


def test_a_pool_too_small_for_one_sequence(folder: Path) -> None:
    with pytest.raises(StartupError, match="one sequence of max_model_len 512 needs"):
        build(folder, num_pages=20)


def test_host_memory_to_swap_to_is_asked_for_in_bytes(folder: Path) -> None:
    _, without = build(folder)
    assert without.host_pages == 0
    worker, limits = build(folder, num_pages=40, swap_bytes=1_000_000)
    per_page = sum(layer[0].numel() * layer.element_size() for layer in worker._kv)
    assert limits.host_pages == 1_000_000 // per_page > 0
    assert all(len(layer) == limits.host_pages + 1 for layer in worker._host)


def test_more_host_memory_than_there_is(folder: Path) -> None:
    with pytest.raises(StartupError, match=r"swap_bytes asks for [\d,.]+ MiB of host memory, but"):
        build(folder, swap_bytes=1 << 60)


def test_a_context_longer_than_the_checkpoints(folder: Path) -> None:
    with pytest.raises(StartupError, match="max_model_len 100,000 is not between"):
        build(folder, max_model_len=100_000)


def test_kernels_that_are_ready_after_the_end_are_of_no_use(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    worker, _ = build(folder)
    built: Future[None] = Future()
    built.add_done_callback(lambda _: worker.call(lambda: pytest.fail("it runs no more")))
    worker.close()
    caplog.clear()
    built.set_result(None)
    assert not caplog.records  # a callback that fails is logged


def test_rows_whose_texts_are_over_are_not_run(tmp_path: Path) -> None:
    """The first token of one text ends it. Steps with drafts begin when that was read."""
    save(tmp_path, "llama")
    worker, limits = build(tmp_path, drafters=("suffix",))

    def run(number: int, admits: tuple[Admit, ...], *rows: Row) -> StepResult:
        return worker.launch(StepPlan(number, admits, rows)).wait()

    def text(slot: int, stops: frozenset[int]) -> tuple[Admit, Row]:
        params = SamplingParams(max_tokens=20, temperature=0, stop_token_ids=stops)
        pages = tuple(range(10 * slot, 10 * slot + 10))
        prompt = Row(slot, slot, PROMPT, True, new_pages=pages)
        return Admit(slot, slot, params, 0, len(PROMPT), (), ()), prompt

    try:
        plain = greedy(worker, limits)
        first, prompt = text(1, frozenset(plain[:1]))
        other, its_prompt = text(2, frozenset())
        assert not run(1, (first, other), prompt, its_prompt).over
        gone, on = (Row(slot, slot, None, True, 4, (0,)) for slot in (1, 2))
        result = run(2, (), gone, on)
        assert (result.over, result.rows[0]) == (1, RowResult())
        tokens = list(result.rows[1].tokens)
        assert tokens == plain[1 : 1 + len(tokens)]
        result = run(3, (), gone)
        assert (result.over, result.rows) == (1, (RowResult(),))
        more = run(4, (), on).rows[0].tokens
        assert list(more) == plain[1 + len(tokens) :][: len(more)]
        # Who gets the slot next is not.
        again, prompt = text(1, frozenset())
        assert list(run(5, (again,), prompt).rows[0].tokens) == plain[:1]
        assert not run(6, (), gone).over
    finally:
        worker.close()
