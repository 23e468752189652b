"""The way of one generation request: gate, body, job, engine, answer."""

from __future__ import annotations

import asyncio
import re

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from scheduler.request import FinishReason
from server.body import read_json
from server.chat_format import ChatChunks, chat_answer
from server.choice import Piece
from server.completion_format import CompletionChunks, completion_answer
from server.context import Context, context_of
from server.disconnect import until_disconnect
from server.errors import ApiError, invalid
from server.generation import Generation
from server.job import Caller, Job
from server.logprobs import LogprobFormat
from server.parameters import Endpoint
from server.services import Services
from server.sse import EventStream, StreamEnd

# A refusal by the engine that arrives this fast becomes an HTTP status instead of an error event.
REFUSAL_SECONDS = 0.25
CLIENT_LEFT = 499
OVERLOADED = 429


async def generate(request: Request, services: Services, endpoint: Endpoint) -> Response:
    """Answer one chat or completion request. Raises `ApiError`."""
    context = context_of(request.scope)
    try:
        services.admission.check()
        job = await translated(request, services, endpoint)
        services.admission.check(job.choices)
    except ApiError as error:
        if error.status in (429, 503):
            services.metrics.rejections.add(label=error.reason or "")
        context.log.error = error.message
        raise
    except ClientDisconnect:
        context.status = CLIENT_LEFT
        return Response(status_code=CLIENT_LEFT)
    services.observer.accepted(job)
    generation = Generation(services.engine, job, services.text.tokenizer, services.observer)
    if services.config.server.log_prompts:
        generation.transcript = [[] for _ in range(job.choices)]
    answering = _Answer(services, job, generation, context)
    return await answering.stream() if job.view.stream else await answering.whole(request)


class _Answer:
    """One accepted job until its last byte; `_end` is called exactly once."""

    def __init__(
        self, services: Services, job: Job, generation: Generation, context: Context
    ) -> None:
        self._services = services
        self._job = job
        self._generation = generation
        self._context = context
        self._logprobs = LogprobFormat(services.text.tokenizer, job.view.tokens_as_ids)
        services.admission.enter(job.choices)

    async def stream(self) -> Response:
        try:
            self._generation.start()
            await self._generation.settle(REFUSAL_SECONDS)
        except BaseException as error:
            self._generation.close()
            self._end(_problem(error))
            raise
        format_ = ChatChunks if self._job.endpoint is Endpoint.CHAT else CompletionChunks
        return EventStream(
            self._generation,
            format_(self._job, self._logprobs),
            keep_alive=self._services.config.server.keep_alive_seconds,
            headers=[(k.encode(), v.encode()) for k, v in _headers(self._job).items()],
            on_end=self._end,
        )

    async def whole(self, request: Request) -> Response:
        end = StreamEnd(CLIENT_LEFT, "the client left")
        try:
            self._generation.start()
            pieces = await until_disconnect(request.receive, self._collect())
            if pieces is None:
                return Response(status_code=CLIENT_LEFT)
            form = chat_answer if self._job.endpoint is Endpoint.CHAT else completion_answer
            body = orjson.dumps(form(self._generation, pieces, self._logprobs))
            end = StreamEnd(200)
        except BaseException as error:
            end = _problem(error)
            raise
        finally:
            self._generation.close()
            self._end(end)
        return Response(body, media_type="application/json", headers=_headers(self._job))

    async def _collect(self) -> list[list[Piece]]:
        """Every choice's pieces."""
        collected: list[list[Piece]] = [[] for _ in range(self._job.choices)]
        while (pieces := await self._generation.pieces()) is not None:
            for piece in pieces:
                collected[piece.index].append(piece)
        return collected

    def _end(self, end: StreamEnd) -> None:
        job, log = self._job, self._context.log
        self._services.admission.leave(job.choices)
        if end.status == CLIENT_LEFT:
            self._context.status = CLIENT_LEFT
        timings = self._generation.timings()
        log.id = job.id
        log.model = job.model
        log.stream = job.view.stream
        log.n = job.choices
        log.seed = job.requests[0].params.seed
        reasons = self._generation.finish_reasons
        ends = {200: FinishReason.STOP, CLIENT_LEFT: FinishReason.ABORT}
        otherwise = ends.get(end.status, FinishReason.ERROR)
        log.finish = [reasons.get(i, str(otherwise)) for i in range(job.choices)]
        if end.status == CLIENT_LEFT or self._generation.first_output is not None:
            self._services.observer.abandoned(self._generation.unfinished, otherwise)
        log.usage = self._generation.usage()
        log.resumptions = self._generation.resumptions
        log.queue_ms = timings["queue_time_ms"]
        log.first_token_ms = timings["time_to_first_token_ms"]
        log.error = end.error
        if end.status == OVERLOADED:  # by the engine: our own refusals never come this far
            self._services.metrics.rejections.add(label=end.reason)
        if self._generation.transcript is not None:
            decode = self._services.text.tokenizer.decode
            log.prompts = [decode(r.prompt, skip_special_tokens=False) for r in job.requests]
            log.outputs = ["".join(pieces) for pieces in self._generation.transcript]


async def translated(request: Request, services: Services, endpoint: Endpoint) -> Job:
    """The request as a job. Raises `ApiError`, `ClientDisconnect`."""
    context = context_of(request.scope)
    server = services.config.server
    fields = await read_json(
        request, max_bytes=server.max_body_bytes, max_depth=server.max_json_depth
    )
    translator = services.translator()
    caller = _caller(request, context)
    if endpoint is Endpoint.CHAT:
        job = await translator.chat(fields, caller)
    else:
        job = await translator.completions(fields, caller)
    context.use_body_id(fields.get("request_id"))
    return job


def _caller(request: Request, context: Context) -> Caller:
    """What headers say. Raises `ApiError` for numbers that are none."""
    headers = request.headers
    name = next((n for n in ("x-vllm-priority", "x-priority") if n in headers), None)
    priority = None
    if name is not None:
        try:
            priority = int(headers[name])
        except ValueError:
            raise invalid(f"The header {name} must be an integer.", name) from None
        if not -(2**31) <= priority < 2**31:
            raise invalid(f"The header {name} must fit 32 bits.", name)
    timeout = headers.get("x-request-timeout-ms")
    if timeout is not None and not re.fullmatch("[0-9]{0,8}[1-9][0-9]{0,8}", timeout):
        raise invalid(
            "The header x-request-timeout-ms must be a positive integer.", "x-request-timeout-ms"
        )
    return Caller(
        arrival=context.started,
        tenant=context.tenant,
        priority=priority,
        timeout=None if timeout is None else int(timeout) / 1000,
    )


def _headers(job: Job) -> dict[str, str]:
    if not job.ignored:
        return {}
    return {"x-ignored-params": ",".join(header_safe(name) for name in job.ignored[:32])}


def header_safe(name: str) -> str:
    """A client's own field name, as far as it is safe to repeat in a header."""
    return re.sub(r"[^A-Za-z0-9_.-]", "", name[:64])


def _problem(error: BaseException) -> StreamEnd:
    if isinstance(error, ApiError):
        return StreamEnd(error.status, error.message, error.reason or "")
    if isinstance(error, asyncio.CancelledError):
        return StreamEnd(CLIENT_LEFT, "the client left")
    return StreamEnd(500, type(error).__name__)
