"""`foresight profile`: what it measures on a small model, and what serving does with the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.main import main
from cli.profile import loads, random_loads
from engine.build import build_worker
from engine.config import EngineConfig
from engine.errors import StartupError
from engine.scheduling import step_cost
from scheduler.plan import StepPlan
from scheduler.profile import Profile, chunk_pairs
from scheduler.request import SchedulerConfig
from tests.models.checkpoints import save
from worker.measure import STEPS, Bench, StepLoad

SMALL = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "num_pages": 300}


def test_a_profile_is_measured_and_served_with(tmp_path: Path, capsys) -> None:
    save(tmp_path / "model", "llama")
    output = tmp_path / "profile.json"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    arguments = ["profile", "--model", str(tmp_path / "model"), "--output", str(output)]
    assert main([*arguments, *flags, "--no-compile", "--seconds", "2"]) == 0
    profile = Profile.parse(output.read_text())
    assert (profile.kind, profile.model, profile.dtype) == ("measured", "model", "float32")
    assert profile.page_bytes == 2 * 16 * 4 * per_position(tmp_path / "model")
    assert profile.points[0][0].rows == 1
    assert profile.copies
    shown = capsys.readouterr().out
    assert "relative error" in shown
    assert "measured: model (float32) on cpu" in shown
    cost = step_cost(str(output))
    assert cost.ready
    assert cost.label == profile.label


def per_position(folder: Path) -> int:
    """Elements of the keys of all layers."""
    from models.loader import read_spec

    spec = read_spec(folder)
    return spec.num_layers * spec.num_kv_heads * spec.head_dim


def test_every_load_is_a_legal_run_of_plans(tmp_path: Path, monkeypatch) -> None:
    """Pages cover what is written and are nobody else's; the shape is what the rows read."""
    save(tmp_path, "llama")
    worker, limits = build_worker(
        EngineConfig.of(model=str(tmp_path), compile=False, **SMALL), lambda phase: None
    )
    plans: list[StepPlan] = []
    launch = worker.launch
    monkeypatch.setattr(worker, "launch", lambda plan: (plans.append(plan), launch(plan))[1])
    bench = Bench(worker, limits)
    size = limits.page_size
    for load in (StepLoad(1, 0), StepLoad(3, 70), StepLoad(0, 0, 40, 33), StepLoad(3, 16, 7, 0)):
        assert bench.fits(load)
        plans.clear()
        found = bench.measure(load)
        assert all(seconds > 0 for _, seconds in found)
        assert len(found) == (1 if load.chunk else STEPS)
        pages = [page for admit in plans[0].admits for page in admit.pages]
        assert len(set(pages)) == len(pages)
        assert 0 < min(pages) <= max(pages) < limits.num_pages
        lengths = {admit.slot: len(admit.cached) for admit in plans[0].admits}
        room = {admit.slot: len(admit.pages) * size for admit in plans[0].admits}
        for plan, measured in zip(plans, [None, *found], strict=True):
            context = pairs = tokens = 0
            for row in plan.rows:
                added = 1 if row.chunk is None else len(row.chunk)
                if row.chunk is None:
                    context += lengths[row.slot] + 1
                else:
                    pairs += chunk_pairs(added, lengths[row.slot])
                lengths[row.slot] += added
                tokens += added
                assert lengths[row.slot] <= room[row.slot]
            if measured is not None:
                shape = measured[0]
                assert (shape.rows, shape.tokens) == (len(plan.rows), tokens)
                assert (shape.decode_context, shape.chunk_pairs) == (context, pairs)
    assert 0 < bench.copy(5) < 1
    assert 0 < bench.copy(10_000) < 1, "no more pages than there are"
    worker.close()


def test_what_does_not_fit_is_left_out() -> None:
    limits = SchedulerConfig(num_pages=50, max_num_seqs=4, max_step_tokens=64, max_model_len=512)
    bench = Bench(None, limits)  # type: ignore[arg-type]
    assert bench.fits(StepLoad(3, 100, 20, 64))
    assert not bench.fits(StepLoad(5, 10)), "slots"
    assert not bench.fits(StepLoad(1, 510)), "the context"
    assert not bench.fits(StepLoad(2, 0, 63)), "tokens of a step"
    assert not bench.fits(StepLoad(4, 400)), "pages"
    assert any(map(bench.fits, loads(limits)))
    assert any(map(bench.fits, random_loads(limits)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [(None, "cannot be read"), ("{}", "has version None"), ("\xff", "not text")],
)
def test_a_bad_profile_ends_the_start_with_a_sentence(tmp_path, text, sentence) -> None:
    file = tmp_path / "profile.json"
    if text is not None:
        file.write_bytes(text.encode("latin-1"))
    with pytest.raises(StartupError, match=sentence):
        step_cost(str(file))
    assert not step_cost(None).ready
