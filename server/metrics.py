"""Prometheus metrics of one app: what is measured, under stable names.

Everything is observed from the event loop, so plain numbers suffice and an observation costs a
bisection. Exported as `foresight_<name>`, and on demand as `vllm:<name>` too where vLLM has a
metric of that meaning, so that dashboards made for it keep working.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.messages import EngineFacts
from scheduler.request import Load
from server.parameters import PARAMETERS

REQUEST_SECONDS = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)
FIRST_TOKEN_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_SECONDS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))  # shown up to max_model_len
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
RATIOS = (0.1, 0.25, 0.5, 0.8, 1.25, 2, 4, 10)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)

_KNOWN_PARAMS = frozenset(p.name for p in PARAMETERS)


class Counter:
    """A sum that only grows, by the values of one label or of none."""

    __slots__ = ("label", "values")

    def __init__(self, label: str | None = None) -> None:
        self.label = label
        self.values: dict[str, float] = {} if label else {"": 0.0}

    def add(self, amount: float = 1.0, label: str = "") -> None:
        self.values[label] = self.values.get(label, 0.0) + amount


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self, largest: float | None = None) -> list[tuple[str, float]]:
        """Cumulative counts by bound, bounds above `largest` left out."""
        shown, sum_ = [], 0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            sum_ += count
            if largest is None or bound <= largest:
                shown.append((str(float(bound)), float(sum_)))
        return [*shown, ("+Inf", float(sum(self.counts)))]


@dataclass(frozen=True, slots=True)
class Definition:
    """What a metric is called and means; `vllm` when vLLM has the same."""

    name: str
    help: str
    vllm: bool = True


_GAUGES: tuple[tuple[Definition, Callable[[Load], float]], ...] = (
    (Definition("num_requests_running", "Sequences that hold a slot."), lambda x: x.running),
    (Definition("num_requests_waiting", "Sequences waiting for a slot."), lambda x: x.waiting),
    (
        Definition("waiting_tokens", "Prompt tokens not yet computed of those waiting.", False),
        lambda x: x.waiting_tokens,
    ),
    (
        Definition(
            "predicted_wait_seconds", "Predicted for a usual request that comes now.", False
        ),
        lambda x: x.predicted_wait,
    ),
    (
        Definition("kv_cache_usage_perc", "Share of KV pages in use, 0 to 1."),
        lambda x: x.pages_held / x.pages_total if x.pages_total else 0.0,
    ),
    (
        Definition("kv_cache_cached_perc", "Share of KV pages kept for reuse, 0 to 1.", False),
        lambda x: x.pages_cached / x.pages_total if x.pages_total else 0.0,
    ),
    (
        Definition("kv_cache_forecast_perc", "Peak of KV pages that admission foresees.", False),
        lambda x: x.pages_forecast / x.pages_total if x.pages_total else 0.0,
    ),
    (
        Definition("kv_cache_reserve_perc", "Share of KV pages admission keeps free.", False),
        lambda x: x.pages_reserved / x.pages_total if x.pages_total else 0.0,
    ),
    (
        Definition("host_pages", "KV pages in host memory, to swap to.", False),
        lambda x: x.host_pages_total,
    ),
    (
        Definition("host_pages_held", "Those that paused sequences count on.", False),
        lambda x: x.host_pages_held,
    ),
)
_ENGINE_COUNTERS: tuple[tuple[Definition, Callable[[Load], float]], ...] = (
    (Definition("prefix_cache_queries", "Prompt tokens looked up."), lambda x: x.prefix_queries),
    (Definition("prefix_cache_hits", "Prompt tokens found cached."), lambda x: x.prefix_hits),
    (
        Definition("rows_stalled", "Rows that waited a step for a KV page.", False),
        lambda x: x.rows_stalled,
    ),
    (Definition("num_preemptions", "Sequences paused for memory."), lambda x: x.preemptions),
    (
        Definition("recomputed_tokens", "Tokens computed again after a pause.", False),
        lambda x: x.recomputed_tokens,
    ),
    (
        Definition("pages_swapped_out", "KV pages copied to host memory.", False),
        lambda x: x.pages_swapped_out,
    ),
    (
        Definition("pages_swapped_in", "KV pages copied back from host memory.", False),
        lambda x: x.pages_swapped_in,
    ),
    (
        Definition("kv_demoted_pages", "KV pages reduced to four bits.", False),
        lambda x: x.pages_demoted,
    ),
    (Definition("engine_steps", "Settled steps.", False), lambda x: x.steps),
    (
        Definition("spec_decode_num_drafts", "Rows that verified drafted tokens."),
        lambda x: x.drafts,
    ),
    (
        Definition("spec_decode_num_draft_tokens", "Drafted tokens that were verified."),
        lambda x: x.draft_tokens,
    ),
    (
        Definition("spec_decode_num_accepted_tokens", "Those of them that were right."),
        lambda x: x.accepted_tokens,
    ),
    (
        Definition("spec_decode_draft_seconds", "Time that the target waited for drafts.", False),
        lambda x: x.draft_seconds,
    ),
    (
        Definition("spec_decode_ahead_seconds", "Drafting while the target verified.", False),
        lambda x: x.ahead_seconds,
    ),
    (
        Definition("spec_decode_num_ahead", "Rows that were drafted for ahead.", False),
        lambda x: x.ahead_rows,
    ),
    (
        Definition("spec_decode_num_foreseen", "Those whose drafts were of use.", False),
        lambda x: x.foreseen_rows,
    ),
    (
        Definition("step_seconds", "Time from one settled step to the next.", False),
        lambda x: x.step_seconds,
    ),
    (
        Definition("step_seconds_profiled", "The same by the profile of step times.", False),
        lambda x: x.step_seconds_profiled,
    ),
)


_BY_POSITION = Definition(
    "spec_decode_num_accepted_tokens_per_pos", "Right drafts by position after a row's own token."
)


class Metrics(Collector):
    """The metrics of one app. Attributes are public: callers observe on them directly."""

    def __init__(
        self,
        model: str,
        load: Callable[[], Load],
        facts: Callable[[], EngineFacts | None],
        *,
        vllm_names: bool = False,
    ) -> None:
        self._labels = {"model_name": model, "engine": "0"}
        self._load = load
        self._facts = facts
        self._vllm_names = vllm_names
        self.prompt_tokens = Counter()
        self.prompt_tokens_cached = Counter()
        self.generation_tokens = Counter()
        self.success = Counter("finished_reason")
        self.rejections = Counter("reason")
        self.resumed = Counter()
        self.ttft_targets = Counter("outcome")
        self.mtpot_targets = Counter("outcome")
        self.ignored_params = Counter("param")
        self.http_requests = Counter("status")
        self.first_token = Histogram(FIRST_TOKEN_SECONDS)
        self.inter_token = Histogram(TOKEN_SECONDS)
        self.per_output_token = Histogram(TOKEN_SECONDS)
        self.e2e = Histogram(REQUEST_SECONDS)
        self.queue = Histogram(REQUEST_SECONDS)
        self.inference = Histogram(REQUEST_SECONDS)
        self.prefill = Histogram(REQUEST_SECONDS)
        self.decode = Histogram(REQUEST_SECONDS)
        self.http_seconds = Histogram(REQUEST_SECONDS)
        self.request_prompt_tokens = Histogram(TOKENS)
        self.request_generation_tokens = Histogram(TOKENS)
        self.max_generation_tokens = Histogram(TOKENS)
        self.params_max_tokens = Histogram(TOKENS)
        self.params_n = Histogram(CHOICES)
        self.preemptions = Histogram(PREEMPTIONS)
        self.wait_ratio = Histogram(RATIOS)
        self.step_tokens = Histogram(STEP_TOKENS)
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def ignored(self, name: str) -> None:
        """Count an ignored field; unknown names share one label value, they are unbounded."""
        self.ignored_params.add(label=name if name in _KNOWN_PARAMS else "other")

    def counters(self) -> tuple[tuple[Definition, Counter], ...]:
        return (
            (
                Definition("prompt_tokens", "Prompt tokens of finished prefills."),
                self.prompt_tokens,
            ),
            (
                Definition("prompt_tokens_cached", "Those taken from the prefix cache."),
                self.prompt_tokens_cached,
            ),
            (Definition("generation_tokens", "Tokens generated."), self.generation_tokens),
            (Definition("request_success", "Choices ended, by reason."), self.success),
            (
                Definition("admission_rejections", "Requests refused before any work.", False),
                self.rejections,
            ),
            (
                Definition(
                    "requests_resumed",
                    "Requests handed to another engine after their own died.",
                    False,
                ),
                self.resumed,
            ),
            (
                Definition(
                    "ttft_target_requests",
                    "Choices with a target for the first token, by whether it was met.",
                    False,
                ),
                self.ttft_targets,
            ),
            (
                Definition(
                    "mtpot_target_requests",
                    "Choices with a target for the largest gap, by whether it was met.",
                    False,
                ),
                self.mtpot_targets,
            ),
            (
                Definition("ignored_params", "Request fields that had no effect.", False),
                self.ignored_params,
            ),
            (
                Definition("http_requests", "Answers by status, probes excluded.", False),
                self.http_requests,
            ),
        )

    def histograms(self) -> tuple[tuple[Definition, Histogram], ...]:
        return (
            (
                Definition("time_to_first_token_seconds", "Arrival to first token."),
                self.first_token,
            ),
            (
                Definition(
                    "inter_token_latency_seconds",
                    "Time between tokens; tokens that arrive together share it evenly.",
                ),
                self.inter_token,
            ),
            (
                Definition(
                    "request_time_per_output_token_seconds", "Mean of a choice after its first."
                ),
                self.per_output_token,
            ),
            (Definition("e2e_request_latency_seconds", "Arrival to end."), self.e2e),
            (Definition("request_queue_time_seconds", "Arrival to a slot."), self.queue),
            (Definition("request_inference_time_seconds", "A slot to the end."), self.inference),
            (
                Definition("request_prefill_time_seconds", "A slot to the first token."),
                self.prefill,
            ),
            (Definition("request_decode_time_seconds", "First token to the end."), self.decode),
            (
                Definition("http_request_duration_seconds", "Of answers, probes excluded.", False),
                self.http_seconds,
            ),
            (Definition("request_prompt_tokens", "Of a prompt."), self.request_prompt_tokens),
            (
                Definition("request_generation_tokens", "Of a choice."),
                self.request_generation_tokens,
            ),
            (
                Definition("request_max_num_generation_tokens", "Of the longest choice."),
                self.max_generation_tokens,
            ),
            (
                Definition("request_params_max_tokens", "The limit asked for."),
                self.params_max_tokens,
            ),
            (Definition("request_params_n", "Choices asked for."), self.params_n),
            (Definition("request_num_preemptions", "Pauses of a choice.", False), self.preemptions),
            (
                Definition(
                    "first_token_over_predicted",
                    "Time to the first token over its prediction, of requests that had to wait.",
                    False,
                ),
                self.wait_ratio,
            ),
            (Definition("iteration_tokens_total", "Tokens of a step."), self.step_tokens),
        )

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        yield from self._collect("foresight_", lambda definition: True)
        if self._vllm_names:
            yield from self._collect("vllm:", lambda definition: definition.vllm)

    def _collect(self, prefix: str, wanted: Callable[[Definition], bool]) -> Iterator[Metric]:
        load, facts = self._load(), self._facts()
        names, values = list(self._labels), list(self._labels.values())
        for definition, read in _GAUGES:
            if wanted(definition):
                gauge = GaugeMetricFamily(prefix + definition.name, definition.help, labels=names)
                gauge.add_metric(values, read(load))
                yield gauge
        for definition, read in _ENGINE_COUNTERS:
            if wanted(definition):
                family = CounterMetricFamily(
                    prefix + definition.name, definition.help, labels=names
                )
                family.add_metric(values, read(load))
                yield family
        if wanted(_BY_POSITION):
            family = CounterMetricFamily(
                prefix + _BY_POSITION.name, _BY_POSITION.help, labels=[*names, "position"]
            )
            for position, accepted in enumerate(load.accepted_by_position):
                family.add_metric([*values, str(position)], accepted)
            yield family
        for definition, counter in self.counters():
            if wanted(definition):
                extra = [counter.label] if counter.label else []
                family = CounterMetricFamily(
                    prefix + definition.name, definition.help, labels=[*names, *extra]
                )
                for label, value in counter.values.items():
                    family.add_metric([*values, label] if extra else values, value)
                yield family
        for definition, histogram in self.histograms():
            if wanted(definition):
                largest = facts.max_model_len if facts and histogram.bounds == TOKENS else None
                made = HistogramMetricFamily(
                    prefix + definition.name, definition.help, labels=names
                )
                made.add_metric(values, histogram.buckets(largest), histogram.total)
                yield made
        if facts is not None:
            info = GaugeMetricFamily(
                prefix + "cache_config_info",
                "The KV pool; the value is always 1.",
                labels=[*names, "block_size", "num_gpu_blocks"],
            )
            info.add_metric([*values, str(facts.page_size), str(facts.num_pages)], 1.0)
            yield info
