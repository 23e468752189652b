"""Typed fields → `SamplingParams`: defaults, clamps and the checks that need the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.config import ServerConfig
from scheduler.request import SamplingParams
from server.errors import invalid
from server.schema import ChatBody, CompletionBody
from text.generation import GenerationDefaults
from text.tokenizer import Tokenizer

MAX_STOPS = 4
MAX_STOP_CHARS = 1024
COMPLETION_MAX_TOKENS = 16  # OpenAI's default on /v1/completions
# More would take longer to check and to ship than the answer takes to compute.
MAX_TOKEN_IDS = 65536
MAX_BIASES = 4096


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server can do, from the engine's facts and the configuration."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int
    max_choices: int
    drafters: tuple[str, ...] = ()  # that the engine has


@dataclass(frozen=True, slots=True)
class Sampler:
    """Builds the parameters of one request.

    Precedence: request, then the server's defaults, then the checkpoint's, then OpenAI's.
    """

    limits: Limits
    server: ServerConfig
    checkpoint: GenerationDefaults
    tokenizer: Tokenizer
    draw_seed: Callable[[], int]

    def build(
        self,
        body: ChatBody | CompletionBody,
        *,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """Parameters that `fitted` adapts to each prompt. Raises `ApiError` naming the field.

        Tokenizes `bad_words`, so with them it belongs on a thread.
        """
        temperature = _first(
            body.temperature, self.server.default_temperature, self.checkpoint.temperature
        )
        top_k = _first(body.top_k, self.server.default_top_k, self.checkpoint.top_k)
        seed = 0 if body.seed is None else body.seed
        ends = frozenset() if body.ignore_eos else self.end_ids
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min(body.min_tokens or 0, max_tokens),
                temperature=_or(temperature, 1.0),
                top_p=_or(
                    _first(body.top_p, self.server.default_top_p, self.checkpoint.top_p), 1.0
                ),
                top_k=max(0, int(_or(top_k, 0))),
                min_p=_or(
                    _first(body.min_p, self.server.default_min_p, self.checkpoint.min_p), 0.0
                ),
                seed=seed % 2**64,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                repetition_penalty=_or(
                    _first(
                        body.repetition_penalty,
                        self.server.default_repetition_penalty,
                        self.checkpoint.repetition_penalty,
                    ),
                    1.0,
                ),
                logit_bias=self._logit_bias(body.logit_bias),
                bad_words=self._bad_words(body.bad_words),
                allowed_token_ids=self._allowed(body.allowed_token_ids),
                stop_token_ids=ends.union(self.stop_reasons(body)),
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
            )
        except ValueError as error:
            raise invalid(f"{error}.") from None

    def fitted(self, params: SamplingParams, room: int, *, seeded: bool) -> SamplingParams:
        """The parameters for one prompt that leaves `room` tokens of the context.

        Without a seed of the client's own each prompt draws one, or equal prompts of one request
        would have equal answers.
        """
        limit = min(params.max_tokens, room)
        return replace(
            params,
            max_tokens=limit,
            min_tokens=min(params.min_tokens, limit),
            seed=params.seed if seeded else self.draw_seed(),
        )

    def max_tokens(self, body: ChatBody | CompletionBody) -> int | None:
        """The limit asked for, None for "as many as fit". 0 only with echo: scoring."""
        asked, name = body.max_tokens, "max_tokens"
        if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
            asked, name = body.max_completion_tokens, "max_completion_tokens"
        if asked is None:
            asked = _first_int(self.server.default_max_tokens, self.checkpoint.max_new_tokens)
            if asked is None and isinstance(body, CompletionBody):
                asked = COMPLETION_MAX_TOKENS
        scoring = isinstance(body, CompletionBody) and body.echo
        if asked == 0 and not scoring:
            raise invalid("max_tokens must be at least 1, or 0 together with echo.", "max_tokens")
        if asked is not None and (body.min_tokens or 0) > asked:
            raise invalid(f"min_tokens must not exceed {name} ({asked}).", "min_tokens")
        return asked

    @property
    def end_ids(self) -> frozenset[int]:
        """The checkpoint's end tokens, as far as the model has them."""
        return frozenset(i for i in self.checkpoint.end_ids if i < self.limits.vocab_size)

    def stop_reasons(self, body: ChatBody | CompletionBody) -> dict[int, int | str]:
        """The client's stop tokens, each with what to answer as `stop_reason`.

        A stop string that is the name of a special token stops at that token, whose text would
        never be seen.
        """
        reasons: dict[int, int | str] = {
            i: i for i in self.token_ids(body.stop_token_ids or [], "stop_token_ids")
        }
        for stop in stop_strings(body.stop):
            token = self.tokenizer.token_id(stop)
            if token in self.tokenizer.special_ids and token < self.limits.vocab_size:
                reasons[token] = stop
        return reasons

    def token_ids(self, ids: list[int], param: str) -> list[int]:
        """The ids, all inside the vocabulary."""
        if len(ids) > MAX_TOKEN_IDS:
            raise invalid(f"{param} must not hold more than {MAX_TOKEN_IDS} ids.", param)
        size = self.limits.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            bad = next(i for i in ids if not 0 <= i < size)
            raise invalid(f"Token id {bad} in {param} is out of vocabulary ({size} ids).", param)
        return ids

    def _logit_bias(self, bias: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        if bias is not None and len(bias) > MAX_BIASES:
            raise invalid(f"logit_bias must not hold more than {MAX_BIASES} ids.", "logit_bias")
        entries: dict[int, float] = {}
        for key, value in (bias or {}).items():
            if not (key.isascii() and key.isdigit() and len(key) < 12):
                raise invalid("logit_bias keys must be token ids.", "logit_bias")
            entries[int(key)] = value
        self.token_ids(list(entries), "logit_bias")
        return tuple(sorted(entries.items()))

    def _allowed(self, ids: list[int] | None) -> tuple[int, ...] | None:
        if ids is None:
            return None
        if not ids:
            raise invalid("allowed_token_ids must not be empty.", "allowed_token_ids")
        return tuple(sorted(set(self.token_ids(ids, "allowed_token_ids"))))

    def _bad_words(self, words: list[str] | None) -> tuple[tuple[int, ...], ...]:
        """Each word as it is tokenized at the start of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words or ():
            if not word.strip() or len(word) > MAX_STOP_CHARS:
                raise invalid(f"bad_words must have 1 to {MAX_STOP_CHARS} characters.", "bad_words")
            for form in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer.encode(form, add_special_tokens=False))
                if ids:
                    sequences[ids] = None
        return tuple(sequences)


def stop_strings(value: object) -> tuple[str, ...]:
    """The `stop` field as strings. Raises `ApiError`."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise invalid("stop must be a string or a list of strings.", "stop", "invalid_type")
    if len(stops) > MAX_STOPS:
        raise invalid(f"stop must not hold more than {MAX_STOPS} strings.", "stop")
    if any(not 0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise invalid(f"stop strings must have 1 to {MAX_STOP_CHARS} characters.", "stop")
    return tuple(stops)


def _first(*values: float | None) -> float | None:
    return next((v for v in values if v is not None), None)


def _first_int(*values: int | None) -> int | None:
    return next((v for v in values if v is not None), None)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
