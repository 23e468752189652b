"""Demotion through the whole engine: in torch, in native code, on several ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from engine.build import NEVER_DEMOTED, build_worker
from engine.errors import StartupError
from engine.llm import LLM
from scheduler.admission import make_policy
from scheduler.plan import Demotion
from scheduler.request import Request, SamplingParams, SchedulerConfig
from scheduler.scheduler import Scheduler
from tests.e2e.driving import Result, drive
from tests.e2e.serving import REPOSITORY
from tests.engine import test_ranks
from tests.engine.test_build import CACHE, build
from tests.models.checkpoints import save
from worker.worker import Worker

DEMO = REPOSITORY / "assets" / "demo" / "target"
DEMOTED = {"kv_format": "int8n", "kv_demote": True}
TIGHT = 48  # pages of 16: less than four sequences of 200 tokens need


def crowd(count: int = 4, tokens: int = 160) -> list[Request]:
    return [
        Request(
            f"r{i}",
            tuple(range(3 + i, 43 + i)),
            SamplingParams(max_tokens=tokens, temperature=1.0, seed=i, logprobs=0),
            float(i),
        )
        for i in range(count)
    ]


def run(worker: Worker, limits: SchedulerConfig, **changes: object) -> tuple[dict, Scheduler]:
    """The results of a crowd, and the scheduler, which lets in whoever fits at first."""
    policy = make_policy("aggressive", watermark=0.0)
    scheduler = Scheduler(dataclasses.replace(limits, **changes), policy=policy)
    results = drive(scheduler, worker, crowd())
    assert scheduler.load().pages_held == 0
    assert scheduler._memory.pool.free_halves == 0
    return results, scheduler


def words(results: dict[tuple[str, int], Result]) -> dict[tuple[str, int], list[int]]:
    return {key: result.tokens for key, result in results.items()}


def test_pages_are_read_by_their_upper_halves_wherever_they_are_moved(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    worker, limits = build(tmp_path, num_pages=TIGHT - 8, max_model_len=512, **DEMOTED)
    formats = [layer.kv for layer in worker._runner._model.attention_layers()]
    demote, moved = worker._demote, 0

    def watched(demotions: tuple[Demotion, ...]) -> None:
        nonlocal moved
        old = torch.tensor([[d.page for d in demotions]], dtype=torch.int64)
        new = torch.tensor([[d.half for d in demotions]], dtype=torch.int64)
        read = zip(formats, worker.kv, strict=True)
        before = [form.read(kv, old, coarse=True) for form, kv in read if demotions]
        demote(demotions)
        for form, kv, wanted in zip(formats, worker.kv, before, strict=False):
            assert all(map(torch.equal, form.gather(kv, new), wanted))
        moved += sum(d.copy is not None for d in demotions)

    worker._demote = watched
    _, scheduler = run(worker, limits)
    assert moved > 5
    assert scheduler.load().pages_demoted > 10
    worker.close()


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
def test_fewer_pauses_and_whoever_lost_nothing_has_its_text(tmp_path: Path, compiled: bool) -> None:
    save(tmp_path, "llama")
    options = {"compile": compiled, "cache_dir": CACHE, "max_model_len": 512, **DEMOTED}
    worker, limits = build(tmp_path, num_pages=300, **options)
    ample, scheduler = run(worker, limits)
    assert scheduler.load().pages_demoted == scheduler.load().preemptions == 0
    assert limits.demote_all_but == NEVER_DEMOTED

    demoted, scheduler = run(worker, limits, num_pages=TIGHT)
    load = scheduler.load()
    assert load.pages_demoted > 0
    paused, scheduler = run(worker, limits, num_pages=TIGHT, demote_all_but=None)
    assert scheduler.load().preemptions > load.preemptions == 0
    assert words(paused) == words(ample)
    lost = {key for key, result in demoted.items() if result.finish.demoted}
    assert 0 < len(lost) < len(demoted)
    assert sum(r.finish.demoted for r in demoted.values()) == load.pages_demoted * 16
    for key, result in demoted.items():
        if key not in lost:
            assert result.tokens == ample[key].tokens
            assert result.logprobs == ample[key].logprobs
    worker.close()


def test_native_code_gives_the_text_of_torch(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    found = []
    for compiled in (False, True):
        options = {"compile": compiled, "cache_dir": CACHE, "max_model_len": 512, **DEMOTED}
        worker, limits = build(tmp_path, num_pages=TIGHT, **options)
        results, scheduler = run(worker, limits)
        assert scheduler.load().pages_demoted > 0
        found.append(words(results))
        worker.close()
    assert found[0] == found[1]


@pytest.mark.slow
def test_two_ranks_give_the_text_of_one(tmp_path: Path) -> None:
    save(tmp_path, "qwen3", num_key_value_heads=4)
    options = {"num_pages": TIGHT, "max_model_len": 512, **DEMOTED}
    found = []
    for size in (1, 2):
        config = test_ranks.config(tmp_path, size, **options)
        worker, limits = build_worker(config, lambda phase: None)
        try:
            results, scheduler = run(worker, limits)
        finally:
            worker.close()
        assert scheduler.load().pages_demoted > 0
        found.append(words(results))
    assert found[0] == found[1]


@pytest.mark.parametrize("drafters", [(), ("suffix", "coarse")], ids=["", "drafts"])
def test_the_bundled_model_says_whose_text_may_have_changed(drafters: tuple[str, ...]) -> None:
    options = {
        "dtype": "float32",
        "cache_dir": CACHE,
        "max_model_len": 600,
        "max_num_seqs": 4,
        "policy": "aggressive",
        "watermark": 0.0,
        "drafters": drafters,
        "fixed_draft_tokens": 3 if drafters else None,
        **DEMOTED,
    }
    texts = {}
    for pages in (200, 48):
        with LLM(str(DEMO), num_pages=pages, **options) as llm:
            prompts = [llm.tokenize(f"def main{i}(arguments: list[str]) -> ") for i in range(4)]
            params = [SamplingParams(max_tokens=200, temperature=0.7, seed=i) for i in range(4)]
            done = llm.generate(prompts, params, ignore_eos=True)
            texts[pages] = [completion.choices[0] for completion in done]
            load = llm.load()
            assert (load.pages_demoted > 0) == (pages == 48)
            assert load.preemptions == load.pages_held == 0
    lost = [choice.kv_demoted_tokens for choice in texts[48]]
    assert lost[0] == 0 < lost[-1]
    assert not any(choice.kv_demoted_tokens for choice in texts[200])
    for demoted, choice, ample in zip(lost, texts[48], texts[200], strict=True):
        assert demoted or choice.tokens == ample.tokens


def test_room_for_halves_is_paid_for_and_told_apart(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    found = []
    for demote in (False, True):
        options = {"kv_format": "int8n", "kv_bytes": 4_000_000, "num_pages": None}
        worker, limits = build(tmp_path, kv_demote=demote, **options)
        assert sum(layer.nbytes for layer in worker.kv) <= 4_000_000
        found.append(limits)
        worker.close()
    plain, demoted = found
    assert plain.demote_all_but is None
    assert demoted.num_pages < plain.num_pages
    assert demoted.hash_root != plain.hash_root


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_format": "auto"}, "only pages of int8n can be demoted, not those of auto"),
        ({"kv_format": "k8v4"}, "only pages of int8n can be demoted, not those of k8v4"),
        ({"kv_format": "oscar2"}, "only pages of int8n can be demoted, not those of oscar2"),
        ({"kv_window": 64}, "pages with dense windows beside them cannot be demoted"),
        ({"kv_sink": 8}, "pages with dense windows beside them cannot be demoted"),
        ({"deterministic": True}, "it cannot be had with --deterministic"),
        ({"draft_model": str(DEMO)}, "does not go with a draft model"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict, sentence: str) -> None:
    save(tmp_path, "llama")
    with pytest.raises(StartupError, match=sentence):
        build(tmp_path, **{**DEMOTED, **options})
