"""Writes `dashboards/foresight.json`: the panels are listed here, their boilerplate is not.

    python -m deploy.grafana.dashboard

A test compares the file with this list, and every metric in it with what the server exports.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

target = Path(__file__).parent / "dashboards" / "foresight.json"
source = {"type": "prometheus", "uid": "prometheus"}
where = 'model_name=~"$model", instance=~"$instance"'


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `queries` are (legend, PromQL); `unit` is Grafana's name of the unit."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""
    stacked: bool = False


def rate(metric: str, by: str = "") -> str:
    """A counter's growth a second."""
    return (
        f"sum{f' by ({by}) ' if by else ''}(rate(foresight_{metric}{{{where}}}[$__rate_interval]))"
    )


def total(gauge: str) -> str:
    return f"sum(foresight_{gauge}{{{where}}})"


def mean_of(histogram: str) -> str:
    return f"{rate(histogram + '_sum')} / {rate(histogram + '_count')}"


def quantiles(histogram: str) -> tuple[tuple[str, str], ...]:
    """p50, p90 and p99 of a histogram."""
    buckets = rate(histogram + "_bucket", "le")
    return tuple((f"p{q}", f"histogram_quantile({q / 100}, {buckets})") for q in (50, 90, 99))


rows: dict[str, tuple[Panel, ...]] = {
    "Latency": (
        Panel("Time to first token", "s", quantiles("time_to_first_token_seconds")),
        Panel("Inter-token time", "s", quantiles("inter_token_latency_seconds")),
        Panel("Whole request", "s", quantiles("e2e_request_latency_seconds")),
        Panel(
            "Where a request's time goes",
            "s",
            (
                ("queue", mean_of("request_queue_time_seconds")),
                ("prefill", mean_of("request_prefill_time_seconds")),
                ("decode", mean_of("request_decode_time_seconds")),
            ),
            "Means over the requests that ended.",
            stacked=True,
        ),
    ),
    "Throughput": (
        Panel(
            "Tokens",
            "short",
            (
                ("generated / s", rate("generation_tokens_total")),
                ("prompt / s", rate("prompt_tokens_total")),
                ("of these cached / s", rate("prompt_tokens_cached_total")),
            ),
        ),
        Panel(
            "Requests ended, by reason",
            "reqps",
            (
                (
                    "{{finished_reason}}",
                    rate("request_success_total", "finished_reason"),
                ),
            ),
            stacked=True,
        ),
        Panel(
            "Requests refused, by reason",
            "reqps",
            (("{{reason}}", rate("admission_rejections_total", "reason")),),
            "Refused before any work: queue full, draining, …",
            stacked=True,
        ),
        Panel(
            "HTTP answers, by status",
            "reqps",
            (("{{status}}", rate("http_requests_total", "status")),),
            stacked=True,
        ),
    ),
    "Overload": (
        Panel(
            "Predicted wait",
            "s",
            (
                (
                    "a usual request that comes now",
                    f"max(foresight_predicted_wait_seconds{{{where}}})",
                ),
            ),
        ),
        Panel(
            "First token over its prediction",
            "short",
            quantiles("first_token_over_predicted"),
            "Of requests that had to wait; 1 is exact.",
        ),
        Panel(
            "Time to first token: targets",
            "reqps",
            (("{{outcome}}", rate("ttft_target_requests_total", "outcome")),),
            stacked=True,
        ),
        Panel(
            "Largest gap: targets",
            "reqps",
            (("{{outcome}}", rate("mtpot_target_requests_total", "outcome")),),
            stacked=True,
        ),
    ),
    "Engine": (
        Panel(
            "Sequences",
            "short",
            (
                ("running", total("num_requests_running")),
                ("waiting", total("num_requests_waiting")),
            ),
        ),
        Panel(
            "KV pages",
            "percentunit",
            (
                ("in use", f"avg(foresight_kv_cache_usage_perc{{{where}}})"),
                ("kept for reuse", f"avg(foresight_kv_cache_cached_perc{{{where}}})"),
            ),
            "Pages in use belong to a sequence; pages kept for reuse are given up when needed.",
        ),
        Panel(
            "Prefix cache hit rate",
            "percentunit",
            (
                (
                    "tokens",
                    f"{rate('prefix_cache_hits_total')} / {rate('prefix_cache_queries_total')}",
                ),
            ),
        ),
        Panel(
            "Preemption",
            "short",
            (
                ("pauses / s", rate("num_preemptions_total")),
                ("tokens computed again / s", rate("recomputed_tokens_total")),
            ),
        ),
        Panel(
            "Steps",
            "short",
            (("steps / s", rate("engine_steps_total")),),
        ),
        Panel("Waiting prompt tokens", "short", (("tokens", total("waiting_tokens")),)),
        Panel("Prompt length", "short", quantiles("request_prompt_tokens")),
        Panel("Answer length", "short", quantiles("request_generation_tokens")),
    ),
}


def panel(number: int, x: int, y: int, spec: Panel) -> dict:
    """One time series panel, six units wide: four in a row of Grafana's 24."""
    stacking = {"mode": "normal" if spec.stacked else "none", "group": "A"}
    custom = {"lineWidth": 1, "fillOpacity": 30 if spec.stacked else 8, "stacking": stacking}
    return {
        "id": number,
        "type": "timeseries",
        "title": spec.title,
        "description": spec.about,
        "datasource": source,
        "gridPos": {"x": x, "y": y, "w": 6, "h": 8},
        "fieldConfig": {
            "defaults": {"unit": spec.unit, "min": 0, "custom": custom},
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (legend, expr) in enumerate(spec.queries)
        ],
    }


def variable(name: str, label: str) -> dict:
    """A drop-down over a label's values, all of them by default."""
    query = f"label_values(foresight_num_requests_running, {label})"
    return {
        "name": name,
        "type": "query",
        "datasource": source,
        "definition": query,
        "query": {"query": query, "refId": name},
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "refresh": 2,
    }


def dashboard() -> dict:
    panels: list[dict] = []
    y = 0
    for title, specs in rows.items():
        panels.append(
            {
                "id": len(panels) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        for i, spec in enumerate(specs):
            panels.append(panel(len(panels) + 1, i % 4 * 6, y + 1 + i // 4 * 8, spec))
        y += 1 + 8 * -(-len(specs) // 4)
    return {
        "uid": "foresight",
        "title": "Foresight",
        "tags": ["foresight"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": [variable("model", "model_name"), variable("instance", "instance")]},
        "panels": panels,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    target.write_text(text())
