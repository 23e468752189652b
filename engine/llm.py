"""`LLM`: a model in this process, for scripts and notebooks; no server, no event loop.

    with LLM("path/to/model", max_model_len=4096) as llm:
        for completion in llm.generate(["Once upon a time"], SamplingParams(max_tokens=32)):
            print(completion.text)

It drives the same `EngineCore` as the server, one turn after another, in the caller's thread.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from engine.build import build_worker
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.messages import Abort, FromEngine, Rejected, Step, Submit
from engine.process import Builder, facts_of
from engine.scheduling import build_scheduler
from engine.transport import LocalEngineTransport
from models.weights import resolve_checkpoint
from scheduler.request import (
    FinishReason,
    Load,
    Output,
    Request,
    SamplingParams,
    Speculation,
    TokenLogprob,
)
from text.assets import TextAssets, load_text
from text.detokenizer import Detokenizer
from text.stops import StopMatcher, StopStrings

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]

CLIENT = b"llm"
WILLING = Speculation()
# Requests handed to the engine at a time, in multiples of those that can run: enough to keep it
# busy, and far from the limit of its queue.
WINDOW = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """One continuation of a prompt."""

    index: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    message: str = ""  # for FinishReason.ERROR
    kv_demoted_tokens: int = 0  # whose keys and values were reduced to four bits meanwhile


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and its continuations."""

    prompt_tokens: tuple[int, ...]
    choices: tuple[Choice, ...]
    cached_tokens: int = 0  # prompt tokens whose KV was found in the prefix cache

    @property
    def text(self) -> str:
        return self.choices[0].text


@dataclass(slots=True)
class _Growing:
    """One choice while it is generated."""

    detokenizer: Detokenizer
    stops: StopMatcher
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None
    message: str = ""
    cached_tokens: int = 0
    demoted: int = 0

    def add(self, output: Output) -> bool:
        """Takes an output in. True when it completed a stop string."""
        if self.finish is not None:
            return False
        self.demoted = output.demoted
        for i, token in enumerate(output.tokens):
            self.tokens.append(token)
            self.logprobs += output.logprobs[i : i + 1]
            self.text += self.stops.push(self.detokenizer.push((token,)))
            if self.stops.matched is not None:
                self.finish = FinishReason.STOP
                return True
        if output.finish is not None:
            self.text += self.stops.push(self.detokenizer.flush()) + self.stops.flush()
            self.finish = output.finish.reason
            self.message = output.finish.message
            self.cached_tokens = output.finish.cached_tokens
        return False


class LLM:
    """Offline generation.

    `options` are those of the configuration by their own names (docs/configuration.md):
    `LLM("folder", dtype="float32", max_num_seqs=8)`. Raises `StartupError` when the model cannot be
    served.
    """

    def __init__(
        self,
        model: str = "assets/demo/target",
        *,
        builder: Builder = build_worker,
        **options: Any,
    ) -> None:
        config = EngineConfig.of(model=model, **options)
        self._worker, scheduler_config = builder(config, log.debug)
        self._text = _load_text(config)
        self._transport = LocalEngineTransport()
        self._transport.connect(CLIENT, self._receive)
        self.facts = facts_of(self._worker, scheduler_config)
        self._scheduler = build_scheduler(config, scheduler_config, self._worker.facts.beside)
        self._core = EngineCore(self._scheduler, self._worker, self._transport, self.facts)
        self._growing: dict[str, list[_Growing]] = {}
        self._refused: dict[str, str] = {}
        self._numbers = itertools.count()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        n: int = 1,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        speculation: Speculation = WILLING,
        progress: bool = False,
    ) -> list[Completion]:
        """Continues each prompt (text or token ids), in order.

        `params`: one for all, or one per prompt. The checkpoint's end tokens end a text unless
        `ignore_eos`. `speculation` never changes a text, only how fast it comes. Raises
        `ValueError` for a prompt that does not fit the model, or a drafter that is not there.
        """
        drafter, there = speculation.drafter, self.facts.drafters
        if drafter is not None and drafter not in there:
            known = f"there are {', '.join(there)}" if there else "there are none"
            raise ValueError(f"there is no drafter {drafter!r}: {known}")
        ids = [self._ids(prompt) for prompt in _many(prompts)]
        if params is None:
            params = SamplingParams(max_tokens=256)
        each = [params] * len(ids) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(ids):
            raise ValueError(f"{len(each)} sampling parameters for {len(ids)} prompts")
        ends = frozenset[int]() if ignore_eos else self._text.generation.end_ids
        requests = [
            Request(
                f"llm-{next(self._numbers)}",
                prompt,
                replace(own, stop_token_ids=own.stop_token_ids | ends),
                arrival=time.monotonic(),
                n=n,
                speculation=speculation,
            )
            for prompt, own in zip(ids, each, strict=True)
        ]
        with _bar(len(requests), progress) as advance:
            return self._run(requests, StopStrings(stop), advance)

    def chat(
        self,
        conversations: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **options: Any,
    ) -> list[Completion]:
        """Answers each conversation, a list of `{"role", "content"}`; otherwise as `generate`."""
        one = not conversations or isinstance(conversations[0], Mapping)
        many: Any = [conversations] if one else conversations
        prompts = [self.tokenize_chat(messages) for messages in many]
        return self.generate(prompts, params, **options)

    def tokenize(self, text: str) -> tuple[int, ...]:
        """The token ids of a prompt."""
        return tuple(self._text.tokenizer.encode(text))

    def tokenize_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Those of a conversation, up to where the answer begins."""
        template = self._text.template
        if template is None:
            raise ValueError("the checkpoint has no chat template")
        text = template.render(messages)
        return tuple(self._text.tokenizer.encode(text, add_special_tokens=False))

    def load(self) -> Load:
        """Gauges, and counters since the start."""
        return self._scheduler.load()

    def close(self) -> None:
        self._transport.close()
        self._worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            prompt = self._text.tokenizer.encode(prompt)
        ids = tuple(prompt)
        if not all(0 <= token < self.facts.vocab_size for token in ids):
            raise ValueError(f"token ids must be between 0 and {self.facts.vocab_size - 1}")
        return ids

    def _run(
        self, requests: Sequence[Request], stops: StopStrings, advance: Callable[[], None]
    ) -> list[Completion]:
        window = WINDOW * self.facts.max_num_seqs
        waiting = iter(requests)
        running: dict[str, Request] = {}
        done: dict[str, Completion] = {}
        try:
            while len(done) < len(requests):
                for request in itertools.islice(waiting, max(window - len(running), 0)):
                    self._submit(request, stops)
                    running[request.id] = request
                self._core.turn()
                for request in [r for r in running.values() if self._ended(r.id)]:
                    del running[request.id]
                    done[request.id] = self._completion(request)
                    advance()
        finally:
            for name in running:  # an error or Ctrl-C in the middle
                self._transport.post(CLIENT, Abort(name))
                self._growing.pop(name, None)
            self._refused.clear()
        return [done[request.id] for request in requests]

    def _submit(self, request: Request, stops: StopStrings) -> None:
        tokenizer = self._text.tokenizer
        self._growing[request.id] = [
            _Growing(tokenizer.detokenizer(request.prompt), stops.matcher())
            for _ in range(request.n)
        ]
        self._transport.post(CLIENT, Submit(request))

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Rejected(request_id, _, text):
                self._refused[request_id] = text
            case Step(outputs):
                for output in outputs:
                    choices = self._growing.get(output.request_id)
                    if choices is None:
                        continue
                    choice = choices[output.choice]
                    if choice.add(output):
                        kept = len(choice.tokens)
                        self._transport.post(
                            CLIENT,
                            Abort(output.request_id, output.choice, FinishReason.STOP, kept),
                        )

    def _ended(self, name: str) -> bool:
        if name in self._refused:
            raise ValueError(self._refused[name])
        return all(choice.finish is not None for choice in self._growing[name])

    def _completion(self, request: Request) -> Completion:
        choices = self._growing.pop(request.id)
        return Completion(
            request.prompt,
            tuple(
                Choice(
                    i,
                    choice.text,
                    tuple(choice.tokens),
                    choice.finish or FinishReason.ERROR,
                    tuple(choice.logprobs),
                    choice.message,
                    choice.demoted,
                )
                for i, choice in enumerate(choices)
            ),
            max(choice.cached_tokens for choice in choices),
        )


def _load_text(config: EngineConfig) -> TextAssets:
    model = config.model
    template = Path(model.chat_template) if model.chat_template else None
    return load_text(resolve_checkpoint(model.tokenizer or model.model, model.revision), template)


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A text, or token ids, is one prompt; anything else is a list of prompts."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        one: Any = prompts
        return [one]
    many: Any = prompts
    return list(many)


@contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[], None]]:
    """A progress bar, or nothing; yields what to call for each finished request."""
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("generating", total=total)
        yield lambda: bar.advance(task)
