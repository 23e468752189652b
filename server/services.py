"""The parts of one app, wired once. No globals: two apps in one process share nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.config import Config
from server.admission import Admission
from server.auth import Keys
from server.engine_face import Engine
from server.errors import unavailable
from server.metrics import Metrics
from server.observe import Observer
from server.prompts import Prompts
from server.sampling import Limits, Sampler
from server.translate import Translator
from text.assets import TextAssets
from text.generation import GenerationDefaults
from text.pool import TextPool


@dataclass(frozen=True, slots=True)
class Services:
    """What endpoints work with."""

    config: Config
    engine: Engine
    text: TextAssets
    names: tuple[str, ...]
    pool: TextPool
    keys: Keys
    metrics: Metrics
    observer: Observer
    admission: Admission
    draw_seed: Callable[[], int]

    def translator(self) -> Translator:
        """For the model as the engine serves it now. Raises `ApiError` 503 before it is ready."""
        facts = self.engine.facts
        if facts is None:
            raise unavailable("The model is loading.")
        server = self.config.server
        limits = Limits(
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            max_logprobs=min(server.max_logprobs, facts.max_logprobs),
            max_choices=server.max_choices,
            drafters=facts.drafters,
        )
        use_file = self.config.engine.model.generation_config
        found = self.text.generation
        sampler = Sampler(
            limits=limits,
            server=server,
            checkpoint=found if use_file else GenerationDefaults(end_ids=found.end_ids),
            tokenizer=self.text.tokenizer,
            draw_seed=self.draw_seed,
        )
        return Translator(
            names=self.names,
            limits=limits,
            sampler=sampler,
            prompts=Prompts(self.text, self.pool, facts.max_model_len, facts.vocab_size),
            strict=server.strict_params,
            timeout=server.request_timeout_seconds,
            queue_timeout=server.queue_timeout_seconds,
        )


def build_services(engine: Engine, text: TextAssets, config: Config) -> Services:
    """Raises `OSError` when the key file cannot be read."""
    server, model = config.server, config.engine.model
    names = served_names(model.model, model.served_model_name)
    metrics = Metrics(
        names[0],
        lambda: engine.load,
        lambda: engine.facts,
        vllm_names=server.vllm_metrics,
    )
    noise = random.SystemRandom() if model.seed is None else random.Random(model.seed)
    return Services(
        config=config,
        engine=engine,
        text=text,
        names=names,
        pool=TextPool(server.tokenizer_threads),
        keys=Keys(
            server.api_keys, Path(server.api_key_file) if server.api_key_file is not None else None
        ),
        metrics=metrics,
        observer=Observer(
            metrics, config.engine.schedule.ttft_target, config.engine.schedule.mtpot_target
        ),
        admission=Admission(engine, max_waiting=config.engine.schedule.max_queued_requests),
        draw_seed=lambda: noise.getrandbits(64),
    )


def served_names(model: str, configured: tuple[str, ...]) -> tuple[str, ...]:
    """The configured names, else the folder's own name or the hub id."""
    if configured:
        return configured
    return (Path(model).resolve().name if Path(model).exists() else model,)
