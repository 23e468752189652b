"""Step costs: what was put in is found again, and the inverse is exact."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from scheduler.fit import fit_curve, nonnegative
from scheduler.profile import Profile, ProfileError
from scheduler.step_cost import UNLIMITED, StepCost, StepShape, chunk_pairs


def true_seconds(shape: StepShape) -> float:
    """A machine: flat up to 64 tokens, then 20 µs a token, 40 µs a token past 512."""
    base = 1e-3 + 2e-5 * max(0, shape.tokens - 64) + 2e-5 * max(0, shape.tokens - 512)
    return base + 2e-8 * shape.decode_context + 1e-9 * shape.chunk_pairs + 3e-6 * shape.rows


def shapes() -> list[StepShape]:
    decodes = [
        StepShape(rows, rows, rows * context)
        for rows in (1, 4, 16, 64, 128, 256)
        for context in (16, 256, 1024, 4096)
    ]
    chunks = [
        StepShape().with_chunk(tokens, context)
        for tokens in (16, 64, 128, 256, 512, 1024, 2048)
        for context in (0, 1024, 4096)
    ]
    return decodes + chunks


def profile(noise: float = 0.0, seed: int = 0) -> Profile:
    rng = np.random.default_rng(seed)
    return Profile(
        tuple((s, true_seconds(s) * float(np.exp(noise * rng.normal()))) for s in shapes()),
        copies=((1, 2e-5), (8, 9e-5), (64, 6.5e-4)),
    )


def random_shape(rng: random.Random) -> StepShape:
    rows = rng.randint(0, 200)
    shape = StepShape(rows, rows + rng.randint(0, 300), rng.randint(0, rows * 4000))
    return shape.with_chunk(rng.randint(1, 1500), rng.randint(0, 4000)) if rows % 2 else shape


def test_chunk_pairs_count_what_each_token_attends():
    assert chunk_pairs(3, 10) == 11 + 12 + 13
    assert StepShape(2, 2, 30).with_chunk(3, 10) == StepShape(3, 5, 30, 36)


def test_coefficients_are_recovered():
    cost = StepCost.from_profile(profile())
    for shape in [
        *shapes(),
        StepShape(32, 32, 32 * 700),
        StepShape(20, 20, 5000).with_chunk(80, 9),
    ]:
        assert cost.seconds(shape) == pytest.approx(true_seconds(shape), rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_noise_averages_out(seed):
    cost = StepCost.from_profile(profile(0.05, seed))
    errors = [cost.seconds(s) / true_seconds(s) - 1 for s in shapes()]
    assert np.median(np.abs(errors)) < 0.05
    assert np.max(np.abs(errors)) < 0.2


@pytest.mark.parametrize("seed", range(20))
def test_more_work_never_costs_less(seed):
    rng = random.Random(seed)
    cost = StepCost.from_profile(profile(0.3, seed))
    for _ in range(50):
        shape = random_shape(rng)
        more = [shape.rows, shape.tokens, shape.decode_context, shape.chunk_pairs]
        more[rng.randrange(4)] += rng.randint(1, 1000)
        assert cost.seconds(StepShape(*more)) >= cost.seconds(shape)


@pytest.mark.parametrize("seed", range(20))
def test_tokens_within_is_the_inverse(seed):
    rng = random.Random(seed)
    cost = StepCost.from_profile(profile(0.2, seed))
    cost.observe(StepShape(1, 1, 5), rng.uniform(1e-4, 1e-1))
    for _ in range(100):
        shape, context = random_shape(rng), rng.choice([0, 1, 100, 4000])
        limit = cost.seconds(shape) * rng.uniform(0.5, 4.0)
        n = cost.tokens_within(limit, shape, context)
        assert n == 0 or cost.seconds(shape.with_chunk(n, context)) <= limit
        assert n == UNLIMITED or cost.seconds(shape.with_chunk(n + 1, context)) > limit


def test_what_a_chunk_costs_allows_exactly_that_chunk():
    cost = StepCost.from_profile(profile())
    for n in (1, 2, 63, 64, 65, 511, 700, 5000):
        shape = StepShape(8, 8, 800)
        assert cost.tokens_within(cost.seconds(shape.with_chunk(n, 50)), shape, 50) == n


def test_beyond_the_table_nothing_is_free():
    flat = Profile(((StepShape(1, 1), 1e-3), (StepShape(1, 64), 2e-3), (StepShape(1, 128), 2e-3)))
    cost = StepCost.from_profile(flat)
    assert cost.seconds(StepShape(1, 1280)) > 5e-3
    assert cost.tokens_within(1.0, StepShape(), 0) < UNLIMITED


def test_correction_follows_a_slower_machine_and_stays():
    rng = random.Random(1)
    cost = StepCost.from_profile(profile())
    for step in range(300):
        shape = shapes()[step % len(shapes())]
        cost.observe(shape, 2 * true_seconds(shape) * rng.uniform(0.8, 1.25))
        if step >= 50:
            assert 1.75 < cost.correction < 2.25


def test_single_outliers_hardly_count():
    cost = StepCost.from_profile(profile())
    shape = shapes()[5]
    before = cost.seconds(shape)
    cost.observe(shape, 1000 * before)
    assert cost.seconds(shape) < 1.06 * before
    for nonsense in (0.0, -1.0, float("nan"), float("inf")):
        cost.observe(shape, nonsense)
    assert cost.seconds(shape) < 1.06 * before


def test_learning_knows_nothing_then_something():
    rng = random.Random(2)
    cost = StepCost.learning()
    assert not cost.ready
    assert cost.seconds(shapes()[0]) == 0.0
    assert cost.tokens_within(1e-9, StepShape(), 0) == UNLIMITED
    assert cost.copy_seconds(10) == 0.0
    for _ in range(1000):
        shape = random_shape(rng)
        cost.observe(shape, true_seconds(shape) * rng.uniform(0.9, 1.1))
    assert cost.ready
    errors = []
    for _ in range(200):
        shape = random_shape(rng)
        errors.append(abs(cost.seconds(shape) / true_seconds(shape) - 1))
    assert np.median(errors) < 0.1


def test_learning_from_a_single_step():
    cost = StepCost.learning()
    cost.observe(StepShape(4, 4, 400), 0.002)
    assert cost.seconds(StepShape(4, 4, 400)) == pytest.approx(0.002)


def test_copies():
    cost = StepCost.from_profile(profile())
    assert cost.copy_seconds(0) == 0.0
    assert cost.copy_seconds(1) == pytest.approx(2e-5)
    assert cost.copy_seconds(128) == pytest.approx(1.3e-3, rel=0.1)


def test_nonnegative_against_brute_force():
    """The best of all choices of columns that come out positive."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = rng.normal(size=(12, 4)), rng.normal(size=12)
        best = np.linalg.norm(b)
        for chosen in range(1, 16):
            free = [i for i in range(4) if chosen >> i & 1]
            x = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
            if (x >= 0).all():
                best = min(best, np.linalg.norm(a[:, free] @ x - b))
        x = nonnegative(a, b)
        assert (x >= 0).all()
        assert np.linalg.norm(a @ x - b) == pytest.approx(best, rel=1e-6)


def test_one_point_is_a_constant():
    curve, _ = fit_curve([5.0], [[]], [0.25])
    assert [curve(0), curve(5), curve(50)] == pytest.approx([0.25] * 3)


def test_roofline_is_its_formula_and_says_what_it_is():
    """8 B parameters in bf16 on a card of 4.8 TB/s and 790 TFLOP/s."""
    sheet = Profile.roofline(
        weight_bytes=16e9,
        parameters=7.5e9,
        kv_bytes_per_token=131072,
        bandwidth=4.8e12,
        flops=790e12,
        flops_per_pair=4 * 32 * 32 * 128,
        overhead=5e-4,
        host_bandwidth=5e10,
        model="8b",
        device="card",
    )
    assert sheet.label.startswith("roofline model: 8b")
    cost = StepCost.from_profile(Profile.parse(sheet.dump()))
    assert cost.label == sheet.label
    rng = random.Random(3)
    for _ in range(200):
        shape = random_shape(rng)
        seconds = 5e-4 + max(16e9 / 4.8e12, 15e9 * shape.tokens / 790e12)
        seconds += 131072 * shape.decode_context / 4.8e12
        seconds += 4 * 32 * 32 * 128 * shape.chunk_pairs / 790e12
        assert cost.seconds(shape) == pytest.approx(seconds, rel=5e-3)
    assert cost.copy_seconds(100) == pytest.approx(100 * 16 * 131072 / 5e10)


# --- the file --------------------------------------------------------------------------------


def test_dump_and_parse():
    there = Profile(
        profile().points, ((1, 2e-5),), 16, 4096, "measured", "m", "cpu", "demo", "fp32", "today"
    )
    assert Profile.parse(there.dump()) == there
    assert there.label == "measured: demo (fp32) on cpu, m, today"


def good() -> dict:
    return json.loads(profile().dump())


BAD = {
    "{": "not JSON",
    "[]": "not a JSON object",
    '{"version": 1, "version": 1}': "twice",
    '{"version": NaN}': "NaN",
    json.dumps(good() | {"version": 2}): "version 2",
    json.dumps(good() | {"points": []}): "no points",
    json.dumps(good() | {"points": 3}): "not a list",
    json.dumps(good() | {"points": [3]}): "not an object",
    json.dumps(good() | {"surprise": 3}): "unknown key, 'surprise'",
    json.dumps(good() | {"machine": 3}): "machine is not a string",
    json.dumps(good() | {"kind": "guessed"}): "unknown kind",
    json.dumps(good() | {"page_size": -1}): "negative",
    json.dumps(good() | {"copies": [{"pages": 0, "seconds": 1.0}]}): "no copy",
    json.dumps(good() | {"copies": [{"pages": 1, "seconds": 1}] * 2}): "twice",
    json.dumps(good() | {"points": good()["points"][:1] * 2}): "twice",
}
POINT = good()["points"][0]
for change, sentence in (
    ({"seconds": -1.0}, "positive"),
    ({"seconds": 0}, "positive"),
    ({"seconds": 1e999}, "Infinity"),
    ({"seconds": "1"}, "should be a number"),
    ({"rows": 2.5}, "rows should be a whole number"),
    ({"rows": True}, "rows should be a whole number"),
    ({"rows": 2, "tokens": 1}, "each row has at least one"),
    ({"decode_context": -1}, "negative"),
    ({"colour": 1}, "unknown key, 'colour'"),
):
    BAD[json.dumps(good() | {"points": [POINT | change]})] = sentence


@pytest.mark.parametrize(("text", "sentence"), BAD.items(), ids=list(BAD.values()))
def test_bad_profiles_are_refused_in_a_sentence(text, sentence):
    with pytest.raises(ProfileError, match=sentence) as refusal:
        Profile.parse(text)
    assert "\n" not in str(refusal.value)


SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "profiles").glob("*.json"))


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_profiles_are_measured_and_fit(file):
    shipped = Profile.parse(file.read_text())
    assert shipped.kind == "measured"
    assert shipped.machine
    assert shipped.model
    assert shipped.date
    assert shipped.copies
    cost = StepCost.from_profile(shipped)
    errors = [abs(cost.seconds(shape) / seconds - 1) for shape, seconds in shipped.points]
    assert np.median(errors) < 0.1


def test_a_profile_is_shipped():
    assert SHIPPED


def test_what_never_changed_costs_nothing():
    """Points that all have one row do not tell what a row takes: it is no constant of the steps."""
    sizes = [1, 8, 64, 512]
    seconds = [1e-3 + 1e-5 * size for size in sizes]
    curve, (row, context) = fit_curve(sizes, [[1, 0], [1, 0], [1, 0], [1, 0]], seconds)
    assert row == context == 0.0
    assert [curve(size) for size in sizes] == pytest.approx(seconds, rel=1e-6)
