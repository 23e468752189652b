"""What surrounds every request: its id, its log line, the last net for errors."""

from __future__ import annotations

import logging
import re
import time
from dataclasses import dataclass, field
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, internal
from server.job import LogFields
from server.metrics import Metrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("foresight.access")

# Probes and scrapes are neither logged nor measured.
QUIET_PATHS = frozenset({"/health", "/ping", "/ready", "/version", "/metrics", "/load"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@+/=-]{1,128}")
_KEY = "foresight"


@dataclass(slots=True)
class Context:
    """Of one HTTP request; stands in the ASGI scope."""

    request_id: str
    named_by_client: bool
    started: float  # seconds, monotonic
    tenant: str = ""
    status: int = 0  # 499 when the client left
    log: LogFields = field(default_factory=LogFields)

    def use_body_id(self, name: str | None) -> None:
        """A body may name the request when no header does."""
        if name is not None and not self.named_by_client and valid_request_id(name):
            self.request_id = name


def context_of(scope: Scope) -> Context:
    found: Context = scope[_KEY]
    return found


def route_path(scope: Scope) -> str:
    """The path below the prefix that a reverse proxy stripped and the server put back."""
    root, path = scope.get("root_path", ""), scope["path"]
    return path[len(root) :] if root and path.startswith(root + "/") else path


def valid_request_id(name: str) -> bool:
    return _REQUEST_ID.fullmatch(name) is not None


class ContextMiddleware:
    """Outermost of ours: gives each request its `Context`, its headers and its log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        named = Headers(scope=scope).get("x-request-id", "")
        by_client = valid_request_id(named)
        context = Context(named if by_client else uuid4().hex, by_client, started)
        scope[_KEY] = context
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                context.status = context.status or message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = context.request_id
                elapsed = round((time.monotonic() - started) * 1000)
                headers["openai-processing-ms"] = str(elapsed)
            await send(message)

        try:
            await self._app(scope, receive, with_headers)
        except Exception:
            log.exception("request %s failed", context.request_id)
            context.status = 500
            if begun:
                raise  # the server resets the connection: a cut stream must not look complete
            await send_error(with_headers, internal())
        finally:
            if route_path(scope) not in QUIET_PATHS:
                self._record(scope, context, time.monotonic() - started)

    def _record(self, scope: Scope, context: Context, seconds: float) -> None:
        self._metrics.http_requests.add(label=str(context.status))
        self._metrics.http_seconds.add(seconds)
        if access_log.isEnabledFor(logging.INFO):
            fields = log_fields(scope, context, seconds)
            message = "%s %s %d in %g ms"
            shown = (fields["method"], fields["path"], context.status, fields["ms"])
            access_log.info(message, *shown, extra=fields)


def log_fields(scope: Scope, context: Context, seconds: float) -> dict[str, object]:
    """What the one log line of a request says. Never its text, unless configured."""
    fields = context.log
    line: dict[str, object] = {
        "request_id": context.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": context.status,
        "ms": round(seconds * 1000, 1),
    }
    if context.tenant:
        line["tenant"] = context.tenant
    if fields.model:
        line |= {
            "id": fields.id,
            "model": fields.model,
            "stream": fields.stream,
            "n": fields.n,
            "seed": fields.seed,
            "finish": fields.finish,
            "prompt_tokens": fields.usage.prompt_tokens,
            "completion_tokens": fields.usage.completion_tokens,
            "cached_tokens": fields.usage.cached_tokens,
            "drafted_tokens": fields.usage.drafted,
            "accepted_tokens": fields.usage.accepted,
            "kv_demoted_tokens": fields.usage.demoted,
            "resumptions": fields.resumptions,
            "queue_ms": fields.queue_ms,
            "first_token_ms": fields.first_token_ms,
        }
    if fields.error:
        line["error"] = fields.error
    if fields.prompts:
        line |= {"prompts": fields.prompts, "outputs": fields.outputs}
    return line


async def send_error(send: Send, error: ApiError) -> None:
    """An `ApiError` as a whole ASGI response."""
    body = error.body()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(k.encode(), v.encode()) for k, v in error.headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
