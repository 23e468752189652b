"""The configuration: one frozen tree by composition, resolved once by `cli/`.

Nothing below reads the environment or a file. A field's meaning stands in its docstring-comment;
`docs/configuration.md` is generated from this module.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint, under which names, in which arithmetic."""

    model: str = "assets/demo/target"  # a folder in the Hugging Face layout, or a hub id
    served_model_name: tuple[str, ...] = ()  # default: the folder's or hub id's own name
    revision: str | None = None  # of a hub id
    tokenizer: str | None = None  # default: the model's
    chat_template: str | None = None  # a Jinja file instead of the checkpoint's template
    dtype: str = "auto"  # auto, bfloat16, float16, float32
    max_model_len: int | None = None  # default: the checkpoint's context
    seed: int | None = None  # for requests without one: drawn from this; default: from the system
    generation_config: bool = True  # take defaults of omitted fields from generation_config.json
    load_format: str = "safetensors"  # safetensors, or dummy: random weights of the real shapes


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV pool."""

    page_size: int = 16  # token positions a page
    kv_dtype: str = "auto"  # auto: the model's dtype
    memory_fraction: float = 0.9  # of the device's memory, weights and activations included
    kv_bytes: int | None = None  # an exact size of the pool instead of a fraction
    num_pages: int | None = None  # an exact number of pages instead (tests)
    enable_prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Limits of the scheduler; see scheduler.request.SchedulerConfig."""

    max_num_seqs: int = 64
    max_step_tokens: int = 2048
    max_queued_requests: int = 2048


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where and how the worker computes."""

    device: str = "auto"  # auto, cpu, cuda
    threads: int | None = None  # CPU threads of the worker; default: all cores
    compile: bool = True  # build native CPU kernels in the background when a compiler is found
    cache_dir: str | None = None  # where compiled kernels are kept; None: compile every time
    deterministic: bool = False  # batch-invariant linear layers: same text in any batch


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine process needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the API process needs besides the engine's facts."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    api_key_file: str | None = None  # one key a line, optionally "tenant:key"
    cors_origins: tuple[str, ...] = ()
    root_path: str = ""
    tls_certificate: str | None = None
    tls_key: str | None = None
    max_body_bytes: int = 16 * 1024 * 1024
    max_json_depth: int = 64
    max_logprobs: int = 20
    max_choices: int = 128  # the largest n
    strict_params: bool = False  # unknown fields are a 400 instead of a header
    vllm_metrics: bool = False  # also export vllm: aliases
    keep_alive_seconds: float = 15.0  # SSE comments while nothing is produced
    drain_seconds: float = 30.0  # after SIGTERM
    heartbeat_seconds: float = 30.0  # no engine progress with queued work for so long: unhealthy
    request_timeout_seconds: float | None = None
    tokenizer_threads: int = 1
    log_level: str = "info"
    log_prompts: bool = False


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
