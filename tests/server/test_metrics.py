"""Metric names are an interface: a golden list. And the numbers are right."""

from __future__ import annotations

import re

import pytest

from engine.errors import RejectedError
from scheduler.request import Load
from server import metrics
from tests.fakes_engine import FACTS, ScriptedEngine
from tests.server.helpers import TOKENIZER, chat, client_of, completion, config, reply_engine

COUNTERS = {
    "admission_rejections",
    "engine_steps",
    "generation_tokens",
    "http_requests",
    "ignored_params",
    "kv_demoted_pages",
    "rows_stalled",
    "num_preemptions",
    "pages_swapped_in",
    "pages_swapped_out",
    "prefix_cache_hits",
    "prefix_cache_queries",
    "prompt_tokens",
    "prompt_tokens_cached",
    "recomputed_tokens",
    "request_success",
    "requests_resumed",
    "spec_decode_ahead_seconds",
    "spec_decode_draft_seconds",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
    "spec_decode_num_ahead",
    "spec_decode_num_foreseen",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_drafts",
    "step_seconds",
    "step_seconds_profiled",
    "mtpot_target_requests",
    "ttft_target_requests",
}
GAUGES = {
    "cache_config_info",
    "host_pages",
    "host_pages_held",
    "kv_cache_cached_perc",
    "kv_cache_forecast_perc",
    "kv_cache_reserve_perc",
    "kv_cache_usage_perc",
    "num_requests_running",
    "num_requests_waiting",
    "predicted_wait_seconds",
    "waiting_tokens",
}
HISTOGRAMS = {
    "e2e_request_latency_seconds",
    "first_token_over_predicted",
    "http_request_duration_seconds",
    "inter_token_latency_seconds",
    "iteration_tokens_total",
    "request_decode_time_seconds",
    "request_generation_tokens",
    "request_inference_time_seconds",
    "request_max_num_generation_tokens",
    "request_num_preemptions",
    "request_params_max_tokens",
    "request_params_n",
    "request_prefill_time_seconds",
    "request_prompt_tokens",
    "request_queue_time_seconds",
    "request_time_per_output_token_seconds",
    "time_to_first_token_seconds",
}
OURS_ALONE = {
    "first_token_over_predicted",
    "mtpot_target_requests",
    "predicted_wait_seconds",
    "ttft_target_requests",
    "admission_rejections",
    "engine_steps",
    "http_request_duration_seconds",
    "http_requests",
    "host_pages",
    "host_pages_held",
    "ignored_params",
    "kv_cache_cached_perc",
    "kv_cache_forecast_perc",
    "kv_cache_reserve_perc",
    "kv_demoted_pages",
    "rows_stalled",
    "pages_swapped_in",
    "pages_swapped_out",
    "recomputed_tokens",
    "request_num_preemptions",
    "requests_resumed",
    "spec_decode_ahead_seconds",
    "spec_decode_draft_seconds",
    "spec_decode_num_ahead",
    "spec_decode_num_foreseen",
    "step_seconds",
    "step_seconds_profiled",
    "waiting_tokens",
}


async def scrape(client) -> str:
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return answer.text


def value(text: str, name: str, **labels: str) -> float:
    """The one sample of that name with these labels."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"([\w:]+)\{(.*)\} (\S+)", line)
        if match and match[1] == name:
            have = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            if all(have.get(k) == v for k, v in labels.items()):
                found.append(float(match[3]))
    assert len(found) == 1, (name, labels, found)
    return found[0]


def types(text: str) -> dict[str, str]:
    return dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))


async def test_golden_names() -> None:
    async with client_of(reply_engine()) as client:
        found = types(await scrape(client))
    expected = {f"foresight_{name}_total": "counter" for name in COUNTERS}
    expected |= {f"foresight_{name}": "gauge" for name in GAUGES}
    expected |= {f"foresight_{name}": "histogram" for name in HISTOGRAMS}
    assert found == expected


async def test_golden_aliases() -> None:
    async with client_of(reply_engine(), cfg=config(vllm_metrics=True)) as client:
        found = {n.removeprefix("vllm:") for n in types(await scrape(client)) if "vllm:" in n}
    expected = {f"{name}_total" for name in COUNTERS - OURS_ALONE}
    expected |= (GAUGES | HISTOGRAMS) - OURS_ALONE
    assert found == expected


def test_golden_buckets() -> None:
    def of(text: str) -> tuple[float, ...]:
        return tuple(float(x) for x in text.split())

    assert (
        of("0.3 0.5 0.8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960 1920 7680")
        == metrics.REQUEST_SECONDS
    )
    assert (
        of(
            "0.001 0.005 0.01 0.02 0.04 0.06 0.08 0.1 0.25 0.5 0.75 1 2.5 5 7.5 10 20 40 80 160 640"
            " 2560"
        )
        == metrics.FIRST_TOKEN_SECONDS
    )
    assert (
        of("0.01 0.025 0.05 0.075 0.1 0.15 0.2 0.3 0.4 0.5 0.75 1 2.5 5 7.5 10 20 40 80")
        == metrics.TOKEN_SECONDS
    )
    assert metrics.CHOICES == (1, 2, 5, 10, 20)
    assert metrics.PREEMPTIONS == (1, 2, 3, 4, 5, 10, 20)
    assert (1, *(2**k for k in range(3, 15))) == metrics.STEP_TOKENS


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("stream", [False, True])
async def test_counts(group: int, stream: bool) -> None:
    """N identical requests of m tokens: what dashboards and vLLM's own tests rely on."""
    n, m = 3, 9
    engine = reply_engine(group=group, cached_tokens=2)
    async with client_of(engine) as client:
        for _ in range(n):
            body = chat(max_tokens=m, ignore_eos=True, stream=stream)
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
        text = await scrape(client)
    prompt = len(engine.requests[0].prompt)
    for name, expected in {
        "time_to_first_token_seconds_count": n,
        "inter_token_latency_seconds_count": n * (m - 1),
        "e2e_request_latency_seconds_count": n,
        "request_queue_time_seconds_count": n,
        "request_time_per_output_token_seconds_count": n,
        "request_generation_tokens_sum": n * m,
        "request_max_num_generation_tokens_sum": n * m,
        "request_prompt_tokens_sum": n * prompt,
        "request_params_max_tokens_sum": n * m,
        "request_params_n_sum": n,
        "generation_tokens_total": n * m,
        "prompt_tokens_total": n * prompt,
        "prompt_tokens_cached_total": n * 2,
        "iteration_tokens_total_sum": n * m,
    }.items():
        assert value(text, f"foresight_{name}") == expected, name
    assert value(text, "foresight_request_success_total", finished_reason="length") == n
    assert value(text, "foresight_http_requests_total", status="200") == n


async def test_an_end_token_counts_as_generated() -> None:
    async with client_of(reply_engine()) as client:
        answer = await client.post("/v1/chat/completions", json=chat())
        text = await scrape(client)
    produced = answer.json()["usage"]["completion_tokens"]
    assert value(text, "foresight_generation_tokens_total") == produced
    assert value(text, "foresight_request_generation_tokens_sum") == produced


async def test_refusals_by_the_engine_count_too() -> None:
    engine = reply_engine(reject=RejectedError("queue_full", "full"))
    async with client_of(engine) as client:
        await client.post("/v1/chat/completions", json=chat())
        await client.post("/v1/chat/completions", json=chat(stream=True))
        text = await scrape(client)
    assert value(text, "foresight_admission_rejections_total", reason="queue_full") == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_that_never_ended_are_errors(stream: bool) -> None:
    async with client_of(reply_engine(die_after=3)) as client:
        await client.post("/v1/chat/completions", json=chat(n=2, stream=stream))
        text = await scrape(client)
    assert value(text, "foresight_request_success_total", finished_reason="error") == 2


async def test_siblings_share_one_prompt() -> None:
    engine = ScriptedEngine(lambda request, c: TOKENIZER.encode("x" * (c + 1)))
    async with client_of(engine) as client:
        body = chat(n=3, max_tokens=5)
        await client.post("/v1/chat/completions", json=body)
        text = await scrape(client)
    assert value(text, "foresight_prompt_tokens_total") == len(engine.requests[0].prompt)
    assert value(text, "foresight_request_generation_tokens_count") == 3
    assert value(text, "foresight_request_max_num_generation_tokens_count") == 1


async def test_reasons_statuses_and_ignored_fields() -> None:
    engine = reply_engine()
    async with client_of(engine) as client:
        await client.post("/v1/completions", json=completion(stop="wör", user="u", what=1))
        await client.post("/v1/completions", json=completion(n=0))
        engine.load = Load(
            waiting=5000,
            pages_total=64,
            pages_held=16,
            preemptions=3,
            pages_demoted=7,
            rows_stalled=5,
        )
        await client.post("/v1/completions", json=completion())
        text = await scrape(client)
    assert value(text, "foresight_request_success_total", finished_reason="stop") == 1
    assert value(text, "foresight_http_requests_total", status="400") == 1
    assert value(text, "foresight_admission_rejections_total", reason="queue_full") == 1
    assert value(text, "foresight_ignored_params_total", param="user") == 1
    assert value(text, "foresight_ignored_params_total", param="other") == 1
    assert value(text, "foresight_kv_cache_usage_perc") == 0.25
    assert value(text, "foresight_num_preemptions_total") == 3
    assert value(text, "foresight_kv_demoted_pages_total") == 7
    assert value(text, "foresight_rows_stalled_total") == 5


@pytest.mark.parametrize("prefix", ["foresight_", "vllm:"])
async def test_speculation(prefix: str) -> None:
    load = Load(
        drafts=4,
        draft_tokens=9,
        accepted_tokens=6,
        accepted_by_position=(4, 2, 0),
        draft_seconds=0.5,
        ahead_seconds=0.25,
        ahead_rows=3,
        foreseen_rows=2,
    )
    async with client_of(reply_engine(load=load), cfg=config(vllm_metrics=True)) as client:
        text = await scrape(client)
    name = prefix + "spec_decode_num_"
    assert value(text, f"{name}drafts_total") == 4
    assert value(text, f"{name}draft_tokens_total") == 9
    assert value(text, f"{name}accepted_tokens_total") == 6
    for position, right in enumerate(load.accepted_by_position):
        found = value(text, f"{name}accepted_tokens_per_pos_total", position=str(position))
        assert found == right
    assert value(text, "foresight_spec_decode_draft_seconds_total") == 0.5
    assert value(text, "foresight_spec_decode_ahead_seconds_total") == 0.25
    assert value(text, "foresight_spec_decode_num_ahead_total") == 3
    assert value(text, "foresight_spec_decode_num_foreseen_total") == 2


async def test_token_buckets_end_at_the_context() -> None:
    async with client_of(reply_engine()) as client:
        await client.post("/v1/completions", json=completion([5] * (FACTS.max_model_len - 1)))
        text = await scrape(client)
    bounds = re.findall(r'foresight_request_prompt_tokens_bucket\{.*le="([^"]+)"', text)
    assert bounds == [
        "1.0",
        "2.0",
        "5.0",
        "10.0",
        "20.0",
        "50.0",
        "100.0",
        "200.0",
        "500.0",
        "+Inf",
    ]
    assert value(text, "foresight_request_prompt_tokens_bucket", le="+Inf") == 1


def test_histograms() -> None:
    histogram = metrics.Histogram((1, 2))
    for number, times in ((0.5, 1), (1, 2), (1.5, 1), (9, 1)):
        histogram.add(number, times)
    assert histogram.buckets() == [("1.0", 3), ("2.0", 4), ("+Inf", 5)]
    assert histogram.total == 13
