"""API keys: who may call, and on whose behalf."""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.context import context_of, route_path, send_error
from server.errors import unauthorized

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json", "/docs", "/redoc"}
)
RELOAD_SECONDS = 1.0


class Keys:
    """Keys from the configuration and from a file, which is read again when it changes.

    A line of the file is `key` or `tenant:key`; empty lines and lines starting with `#` are
    skipped. Keys without a tenant are tenants of their own. Only digests are kept.
    """

    def __init__(
        self,
        keys: Iterable[str],
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `OSError` when the file cannot be read."""
        self._fixed = dict(_entry(key, "") for key in keys)
        self._file = file
        self._clock = clock
        self._from_file: dict[bytes, str] = {}
        self._version = (0, 0)
        self._checked_at = clock()
        if file is not None:
            self._load(file)

    @property
    def required(self) -> bool:
        return bool(self._fixed) or self._file is not None

    def tenant(self, key: str) -> str | None:
        """The key's tenant, None for an unknown key. Takes the same time for all keys."""
        self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, tenant in (*self._fixed.items(), *self._from_file.items()):
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if self._file is None or now - self._checked_at < RELOAD_SECONDS:
            return
        self._checked_at = now
        try:
            self._load(self._file)
        except (OSError, UnicodeDecodeError) as error:
            log.error("the API key file cannot be read, the keys read before stay: %s", error)

    def _load(self, file: Path) -> None:
        status = file.stat()
        version = (status.st_mtime_ns, status.st_size)
        if version == self._version:
            return
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        entries: dict[bytes, str] = {}
        for line in lines:
            if line and not line.startswith("#"):
                tenant, _, key = line.rpartition(":")
                entries.update([_entry(key.strip(), tenant.strip())])
        self._from_file, self._version = entries, version


class AuthMiddleware:
    """Answers 401 to callers without a known key, and names the tenant of the others."""

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        tenant = self._keys.tenant(_presented(Headers(scope=scope)))
        if tenant is None:
            await send_error(send, unauthorized())
            return
        context_of(scope).tenant = tenant
        await self._app(scope, receive, send)


def _presented(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _entry(key: str, tenant: str) -> tuple[bytes, str]:
    digest = hashlib.sha256(key.encode()).digest()
    return digest, tenant or f"key-{digest.hex()[:12]}"
