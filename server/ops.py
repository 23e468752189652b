"""Endpoints for operators: probes, metrics, load, version."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.services import Services


def ops_router(services: Services, version: str) -> APIRouter:
    router = APIRouter(tags=["operations"])
    engine, admission = services.engine, services.admission

    @router.get("/health", summary="Liveness: the engine makes progress")
    @router.head("/health", include_in_schema=False)
    @router.api_route("/ping", methods=["GET", "HEAD"], include_in_schema=False)
    async def health() -> Response:
        """200 while the event loop answers and the engine settles steps whenever work is queued.
        Never runs a generation, so load alone cannot fail it."""
        return Response(status_code=200 if engine.healthy else 503)

    @router.get("/ready", summary="Readiness: new requests would be taken")
    @router.head("/ready", include_in_schema=False)
    async def ready() -> Response:
        """503 while loading, draining or with a full queue."""
        return Response(status_code=200 if admission.ready else 503)

    @router.get("/version", summary="The server's version")
    async def show_version() -> dict[str, str]:
        return {"version": version}

    @router.get("/metrics", summary="Prometheus metrics", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(services.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/load", summary="How busy the engine is")
    async def load() -> dict[str, float]:
        """Queue and memory of the engine; `server_load` counts choices admitted here."""
        now = engine.load
        return {
            "server_load": admission.in_flight,
            "running": now.running,
            "waiting": now.waiting,
            "waiting_tokens": now.waiting_tokens,
            "predicted_wait": now.predicted_wait,
            "kv_usage": now.pages_held / now.pages_total if now.pages_total else 0.0,
            "kv_cached": now.pages_cached / now.pages_total if now.pages_total else 0.0,
            "kv_forecast": now.pages_forecast / now.pages_total if now.pages_total else 0.0,
            "host_pages": now.host_pages_total,
            "host_pages_held": now.host_pages_held,
            "rows_stalled": now.rows_stalled,
            "pages_swapped_out": now.pages_swapped_out,
            "pages_swapped_in": now.pages_swapped_in,
            "pages_demoted": now.pages_demoted,
            "drafts": now.drafts,
            "draft_tokens": now.draft_tokens,
            "accepted_tokens": now.accepted_tokens,
            "draft_seconds": now.draft_seconds,
            "ahead_seconds": now.ahead_seconds,
            "ahead_rows": now.ahead_rows,
            "foreseen_rows": now.foreseen_rows,
            "step_seconds": now.step_seconds,
            "step_seconds_profiled": now.step_seconds_profiled,
        }

    return router
