"""Request bodies → `Job`s. What leaves here is legal; everything else is an `ApiError`."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from scheduler.request import Request, SamplingParams, Speculation
from server.body import JsonObject
from server.errors import invalid, model_not_found
from server.job import Caller, Job, View
from server.parameters import Endpoint, unhonoured
from server.prompts import Prompts, Truncation, prompt_list
from server.sampling import Limits, Sampler, stop_strings
from server.schema import ChatBody, CompletionBody, SamplingFields, Speculative, parse
from text.stops import StopStrings

MAX_WORK = 1024  # choices of one API request, over all prompts


@dataclass(frozen=True, slots=True)
class Translator:
    """Translates for one model."""

    names: tuple[str, ...]  # served model names, the first one by default
    limits: Limits
    sampler: Sampler
    prompts: Prompts
    strict: bool
    timeout: float | None  # seconds, of the server
    queue_timeout: float | None = None

    async def chat(self, fields: JsonObject, caller: Caller) -> Job:
        ignored = unhonoured(Endpoint.CHAT, fields, strict=self.strict)
        body = parse(ChatBody, fields)
        model = self.model(body.model)
        self._check_pairs(body, prompts=1)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        self._check_logprobs(logprobs, "top_logprobs")
        limit = self.sampler.max_tokens(body)
        variables = {}
        if body.reasoning_effort is not None:
            variables = {
                "reasoning_effort": body.reasoning_effort,
                "enable_thinking": body.reasoning_effort != "none",
            }
        ids = await self.prompts.chat(
            body, completion=limit or 0, variables=variables, documents=body.documents
        )
        ids = self._fit(body, ids, limit, "messages")
        params = await self._params(body, limit, logprobs, body.prompt_logprobs)
        view = self._view(body, logprobs=logprobs)
        return self._job(
            body, caller, Endpoint.CHAT, model, [ids], params, view, ignored, asked=limit
        )

    async def completions(self, fields: JsonObject, caller: Caller) -> Job:
        ignored = unhonoured(Endpoint.COMPLETIONS, fields, strict=self.strict)
        body = parse(CompletionBody, fields)
        model = self.model(body.model)
        prompts = prompt_list(body.prompt, self.limits.max_model_len)
        self._check_pairs(body, prompts=len(prompts))
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of must equal n.", "best_of", "unsupported_parameter")
        self._check_logprobs(body.logprobs, "logprobs")
        limit = self.sampler.max_tokens(body)
        scored = body.logprobs if body.echo else None
        of_prompt = max((x for x in (body.prompt_logprobs, scored) if x is not None), default=None)
        params = await self._params(body, limit, body.logprobs, of_prompt)
        work, texts = [], []
        for prompt in prompts:
            ids = await self._completion_ids(body, prompt, limit, alone=len(prompts) == 1)
            work.append(ids)
            if body.echo:
                texts.append(self._echo_text(body, prompt, ids))
        view = self._view(body, logprobs=body.logprobs, echo=bool(body.echo), scoring=limit == 0)
        return self._job(
            body,
            caller,
            Endpoint.COMPLETIONS,
            model,
            work,
            params,
            view,
            ignored,
            asked=limit,
            texts=texts,
        )

    def model(self, name: str | None) -> str:
        """The name to answer under. Raises `ApiError` 404."""
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise model_not_found(name[:256])
        return name

    async def _completion_ids(
        self, body: CompletionBody, prompt: str | list[int], limit: int | None, alone: bool
    ) -> list[int]:
        if isinstance(prompt, list):
            ids = prompt
        else:
            ids = await self.prompts.encode(
                prompt,
                add_special_tokens=body.add_special_tokens is not False,
                completion=limit or 0,
                alone=alone,
            )
        return self._fit(body, ids, limit, "prompt")

    def _echo_text(self, body: CompletionBody, prompt: str | list[int], ids: list[int]) -> str:
        if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
            return prompt
        return self.sampler.tokenizer.decode(
            ids, skip_special_tokens=body.skip_special_tokens is not False
        )

    def _fit(
        self, body: SamplingFields, ids: list[int], limit: int | None, param: str
    ) -> list[int]:
        keep = body.truncate_prompt_tokens
        truncation = None
        if keep is not None:
            if keep == 0:
                raise invalid(
                    "truncate_prompt_tokens must be -1 or positive.", "truncate_prompt_tokens"
                )
            room = max(1, self.limits.max_model_len - max(1, limit or 1))
            truncation = Truncation(
                room if keep == -1 else keep, keep_start=body.truncation_side == "right"
            )
        return self.prompts.fit(ids, truncation=truncation, completion=limit or 0, param=param)

    async def _params(
        self,
        body: ChatBody | CompletionBody,
        limit: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """What all prompts share."""

        def build() -> SamplingParams:
            return self.sampler.build(
                body,
                max_tokens=self.limits.max_model_len if limit is None else max(1, limit),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )

        return await self.prompts.off_loop(build) if body.bad_words else build()

    def _view(
        self,
        body: ChatBody | CompletionBody,
        *,
        logprobs: int | None,
        echo: bool = False,
        scoring: bool = False,
    ) -> View:
        options = body.stream_options
        usage = bool(options and options.include_usage)
        return View(
            stops=StopStrings(
                stop_strings(body.stop), include=bool(body.include_stop_str_in_output)
            ),
            min_tokens=body.min_tokens or 0,
            skip_special_tokens=body.skip_special_tokens is not False,
            stop_reasons=self.sampler.stop_reasons(body),
            logprobs=logprobs,
            prompt_logprobs=body.prompt_logprobs,
            token_ids=bool(body.return_token_ids),
            tokens_as_ids=bool(body.return_tokens_as_token_ids),
            echo=echo,
            scoring=scoring,
            stream=bool(body.stream),
            usage_at_end=usage,
            usage_always=usage and bool(options and options.continuous_usage_stats),
            timings=bool(body.timings),
            metadata=body.metadata,
        )

    def _check_pairs(self, body: ChatBody | CompletionBody, prompts: int) -> None:
        if body.stream_options is not None and not body.stream:
            raise invalid("stream_options needs stream: true.", "stream_options")
        if body.prompt_logprobs is not None and body.stream:
            raise invalid("prompt_logprobs cannot be streamed.", "prompt_logprobs")
        if body.prompt_logprobs == -1:
            # All of the vocabulary: allowed where the limit covers it.
            body.prompt_logprobs = self.limits.vocab_size
        self._check_logprobs(body.prompt_logprobs, "prompt_logprobs")
        if (body.n or 1) > self.limits.max_choices:
            raise invalid(f"n must not exceed {self.limits.max_choices}.", "n")
        if prompts * (body.n or 1) > MAX_WORK:
            raise invalid(f"prompts times n must not exceed {MAX_WORK}.", "n")

    def _speculation(self, body: ChatBody | CompletionBody) -> Speculation:
        asked = body.speculative or Speculative()
        off = asked.enabled is False or bool(body.disable_spec_decode)
        if asked.enabled and body.disable_spec_decode:
            raise invalid("disable_spec_decode contradicts speculative.enabled.", "speculative")
        drafter, there = asked.drafter, self.limits.drafters
        if drafter is not None and drafter not in there:
            known = f"there are {', '.join(there)}" if there else "this server has none"
            raise invalid(f"There is no drafter {drafter!r}: {known}.", "speculative.drafter")
        return Speculation(not off, asked.max_draft_tokens, drafter)

    def _check_logprobs(self, count: int | None, param: str) -> None:
        if count is not None and count > self.limits.max_logprobs:
            raise invalid(f"{param} must not exceed {self.limits.max_logprobs}.", param)

    def _job(
        self,
        body: ChatBody | CompletionBody,
        caller: Caller,
        endpoint: Endpoint,
        model: str,
        work: Sequence[list[int]],
        params: SamplingParams,
        view: View,
        ignored: list[str],
        *,
        asked: int | None,
        texts: Sequence[str] = (),
    ) -> Job:
        prefix = "chatcmpl-" if endpoint is Endpoint.CHAT else "cmpl-"
        job_id = prefix + uuid4().hex
        arrival = caller.arrival
        timeouts = [t for t in (self.timeout, caller.timeout) if t is not None]
        shared: dict[str, Any] = {
            "arrival": arrival,
            "n": body.n or 1,
            "priority": caller.priority if caller.priority is not None else body.priority or 0,
            "tenant": caller.tenant,
            "cache_salt": cache_salt(caller.tenant, body.cache_salt or ""),
            "deadline": arrival + min(timeouts) if timeouts else None,
            "ttft_target": body.slo and body.slo.ttft,
            "mtpot_target": body.slo and body.slo.mtpot,
            "speculation": self._speculation(body),
            "queue_deadline": None if self.queue_timeout is None else arrival + self.queue_timeout,
        }
        requests = tuple(
            Request(
                id=job_id if len(work) == 1 else f"{job_id}-{p}",
                prompt=tuple(ids),
                params=self.sampler.fitted(
                    params, self.limits.max_model_len - len(ids), seeded=body.seed is not None
                ),
                **shared,
            )
            for p, ids in enumerate(work)
        )
        return Job(
            id=job_id,
            created=int(time.time()),
            model=model,
            endpoint=endpoint,
            requests=requests,
            view=view,
            prompt_texts=tuple(texts),
            ignored=tuple(ignored),
            max_tokens=asked,
        )


def cache_salt(tenant: str, salt: str) -> bytes:
    """What isolates prefix-cache entries: the tenant of the API key and the client's own salt.

    Without either everybody shares.
    """
    if not tenant and not salt:
        return b""
    return hashlib.sha256(f"{len(tenant)}:{tenant}{salt}".encode()).digest()
