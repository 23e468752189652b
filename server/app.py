"""`create_app`: one engine and one model behind OpenAI's API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from engine.config import Config
from server.api import api_router, text_router
from server.auth import AuthMiddleware
from server.context import ContextMiddleware
from server.engine_face import Engine
from server.errors import ApiError, invalid
from server.openapi import describe
from server.ops import ops_router
from server.services import Services, build_services
from text.assets import TextAssets

VERSION = "0.1.0"


def create_app(engine: Engine, text: TextAssets, config: Config) -> FastAPI:
    """An ASGI app. `app.state.services` is its `Services`, for whoever runs it.

    The engine may still be loading: until it serves, requests are answered 503. Raises `OSError`
    when the API key file cannot be read.
    """
    services = build_services(engine, text, config)
    app = FastAPI(
        title="Foresight",
        version=VERSION,
        description="An OpenAI-compatible LLM server that looks ahead.",
        lifespan=_lifespan(services),
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_error,
            RequestValidationError: _validation_error,
            ClientDisconnect: _client_left,
        },
        redirect_slashes=False,
    )
    app.state.services = services
    api = api_router(services)
    app.include_router(api, prefix="/v1")
    app.include_router(api, include_in_schema=False)
    app.include_router(text_router(services))
    app.include_router(text_router(services), prefix="/v1", include_in_schema=False)
    app.include_router(ops_router(services, VERSION))
    _describe_with_bodies(app)
    # The last one added is the outermost.
    if services.keys.required:
        app.add_middleware(AuthMiddleware, keys=services.keys)
    if config.server.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.server.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-ignored-params", "retry-after"],
        )
    app.add_middleware(ContextMiddleware, metrics=services.metrics)
    return app


def _lifespan(services: Services) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services.engine.on_step = services.observer.step
        services.engine.on_resume = services.observer.resumed
        yield
        services.pool.close()

    return lifespan


def _describe_with_bodies(app: FastAPI) -> None:
    """Replace FastAPI's document, made once at the first request for it."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            made.update(describe(app))
        return made

    app.openapi = openapi  # type: ignore[method-assign]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(
        error.body(),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )


async def _http_error(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, as JSON."""
    assert isinstance(error, HTTPException)
    message = {404: "No such route.", 405: "This route has other methods."}.get(
        error.status_code, "The request failed."
    )
    path = f"{request.method} {request.url.path}"[:256]
    problem = ApiError(
        error.status_code,
        f"{message} ({path})",
        code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code),
        headers=error.headers,
    )
    return await _api_error(request, problem)


async def _validation_error(request: Request, error: Exception) -> Response:
    return await _api_error(request, invalid("The request is malformed."))


async def _client_left(request: Request, error: Exception) -> Response:
    """Nobody reads this; the status is for the log."""
    return Response(status_code=499)
