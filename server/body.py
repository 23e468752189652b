"""From the bytes of a request to a JSON object, within limits."""

from __future__ import annotations

import re
from typing import Any

import orjson
from starlette.requests import ClientDisconnect, Request

from server.errors import ApiError, invalid

JsonObject = dict[str, Any]


async def read_json(request: Request, *, max_bytes: int, max_depth: int) -> JsonObject:
    """The body as an object.

    NaN, infinities, lone surrogates and numbers that overflow are no JSON and refused by the
    parser; of duplicate keys the last wins. Raises `ApiError` 400 or 413, `ClientDisconnect`.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json" and not media.endswith("+json"):
        raise invalid("The Content-Type must be application/json.", code="invalid_content_type")
    data = await _read(request, max_bytes)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    # Nesting cannot be deeper than there are brackets, so most bodies need no walk.
    if data.count(b"{") + data.count(b"[") > max_depth and _deeper(value, max_depth):
        raise invalid(f"The body is nested deeper than {max_depth} levels.", code="invalid_json")
    return value


async def _read(request: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {limit} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "")
    if re.fullmatch("[0-9]{1,18}", length) and int(length) > limit:
        raise too_large
    data = bytearray()
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        data += message.get("body", b"")
        if len(data) > limit:
            raise too_large
        if not message.get("more_body", False):
            return bytes(data)


def _deeper(value: object, limit: int) -> bool:
    """Whether containers are nested more than `limit` deep; breadth first, without recursion."""
    level = [value]
    for _ in range(limit):
        inner: list[object] = []
        for container in level:
            items = container.values() if isinstance(container, dict) else container
            inner.extend(item for item in items if isinstance(item, dict | list))  # type: ignore[attr-defined]
        if not inner:
            return False
        level = inner
    return True
