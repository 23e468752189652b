"""The configuration: one frozen tree by composition, resolved once by `cli/`.

Nothing below reads the environment or a file. Each option is declared once, with the text that
`foresight serve --help` and the generated `docs/configuration.md` show and the names that users of
other servers know it by.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def option(
    default: T,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    opposites: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
) -> T:
    """A dataclass field with its documentation.

    The flag is the field's name with dashes; `aliases` are further flags for it, those of one or
    two letters after a single dash, and `opposites` flags that turn it off. Typed as the default's
    type, so that a class body reads like plain assignments.
    """
    made: Any = field(
        default=default,
        metadata={"help": help, "aliases": aliases, "opposites": opposites, "choices": choices},
    )
    return made


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which checkpoint, under which names, in which arithmetic."""

    model: str = option(
        "assets/demo/target", "A folder in the Hugging Face layout, or a hub id to download."
    )
    served_model_name: tuple[str, ...] = option(
        (),
        "Names clients may use in `model`; the first is the one shown. Default: the folder's name.",
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id.")
    tokenizer: str | None = option(None, "Another folder or hub id for the tokenizer.")
    chat_template: str | None = option(
        None, "A Jinja file to use instead of the checkpoint's chat template."
    )
    dtype: str = option(
        "auto",
        "Arithmetic of weights and activations. `auto`: the checkpoint's where the device computes"
        " it natively, else float32.",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    quantization: str = option(
        "none",
        "Rounds the weights of a dense checkpoint when it is loaded. int8, fp8: a scale a row;"
        " int6, int4: a scale for every 128 inputs, or 64 or 32 where the sizes need it. `none`: as"
        " they are, also those of a checkpoint in few bits. See docs/quantization.md.",
        aliases=("q",),
        choices=("none", "int8", "int6", "int4", "fp8"),
    )
    max_model_len: int | None = option(
        None, "Longest sequence in tokens, prompt and output. Default: the checkpoint's context."
    )
    seed: int | None = option(
        None,
        "Seeds of requests that bring none are drawn from this. Default: from the system, so that"
        " they differ from start to start.",
    )
    generation_config: bool = option(
        True,
        "Take defaults of omitted sampling fields from the checkpoint's generation_config.json.",
    )
    load_format: str = option(
        "safetensors",
        "Where weights come from. `dummy`: random weights of the real shapes, for measurements.",
        choices=("safetensors", "dummy"),
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """The KV pool."""

    page_size: int = option(
        16, "Token positions in one page of the KV pool.", aliases=("block-size",)
    )
    kv_format: str = option(
        "auto",
        "Format keys and values are kept in. `auto`: the model's dtype; int8n: 8 bits; k8v4: keys"
        " 8, values 4; int4h: 4; int4h64: 4, a scale for every 64 dimensions; k4v2h: keys 4, values"
        " 2; int2h: 2; fp8; turbo4, turbo3, turbo2 and octopus: tables of 4, 3, 2 and 2.7 bits;"
        " oscar2: 2, keys by channels of a page of 32 tokens or a multiple. The last six are not in"
        " native code. See docs/kv.md.",
        aliases=("kv-dtype", "kv-cache-dtype"),
        choices=(
            *("auto", "int8n", "k8v4", "int4h", "int4h64", "k4v2h", "int2h"),
            *("fp8", "turbo4", "turbo3", "turbo2", "octopus", "oscar2"),
        ),
    )
    kv_calibration: str | None = option(
        None,
        "File that `foresight calibrate` wrote for this model and format: key means, which layers"
        " get 8 bits, powers of two that make channels alike, and those of heads for fp8.",
    )
    kv_boundary_layers: int | None = option(
        None,
        "First layers, and last, whose keys and values get 8 bits. Default: as the format asks for,"
        " at most two.",
    )
    kv_window: int | None = option(
        None,
        "Latest tokens whose keys and values are dense beside a format of fewer bits: those since"
        " the last multiple of so many, a multiple of page_size. Cached prefixes end at such"
        " multiples. 0: none. Default: none, but a page for oscar2, which needs one. See"
        " docs/kv.md.",
    )
    kv_sink: int = option(
        0,
        "First tokens whose keys and values are dense beside a format of fewer bits. 0: none.",
    )
    kv_demote: bool = option(
        False,
        "Where a running request finds no page, older ones of int8n are reduced to four bits, as"
        " long as that is enough, instead of pausing a request. Texts may change by it; `usage`"
        " says of which. Takes 3 % of the pool at heads of 128. See docs/kv.md.",
    )
    memory_fraction: float = option(
        0.9,
        "Share of the device's memory to use, weights and activations included.",
        aliases=("gpu-memory-utilization",),
    )
    kv_bytes: int | None = option(
        None,
        "Exact size of the KV pool in bytes, of each rank, instead of a fraction.",
        aliases=("kv-cache-memory-bytes",),
    )
    num_pages: int | None = option(
        None, "Exact number of pages, instead of a size.", aliases=("num-gpu-blocks-override",)
    )
    swap_bytes: int | None = option(
        None,
        "Host memory for the pages of paused sequences, in bytes (vLLM's swap-space counts GiB)."
        " Default: 4 GiB, at most a quarter of what is free, with a GPU; 0 on a CPU, where a larger"
        " pool is the better use of it.",
    )
    enable_prefix_cache: bool = option(
        True,
        "Keep the KV of finished requests and reuse it for prompts that begin alike.",
        aliases=("enable-prefix-caching",),
    )


@dataclass(frozen=True, slots=True)
class ScheduleConfig:
    """Limits of the scheduler; see scheduler.request.SchedulerConfig."""

    max_num_seqs: int = option(64, "Sequences that run at the same time.")
    max_step_tokens: int | None = option(
        None,
        "Tokens computed in one step, prompt chunks and decodes together. Default: 2048 on a GPU,"
        " 256 on a CPU, where longer steps gain nothing and keep streams waiting.",
        aliases=("max-num-batched-tokens",),
    )
    max_queued_requests: int = option(
        2048, "Requests waiting beyond this are answered 429 with Retry-After."
    )
    max_queued_tokens: int | None = option(
        None,
        "Prompt tokens waiting beyond this are answered so too; a prompt that finds nobody waiting"
        " is taken whatever its length. Default: no limit.",
    )
    ttft_target: float | None = option(
        None,
        "Seconds from arrival to the first token that requests want; one that would have to wait"
        " longer is answered 429. A request's own `slo.ttft` wins. Default: none.",
    )
    mtpot_target: float | None = option(
        None,
        "Seconds that no gap between two outputs of a stream should exceed: long prompts are"
        " computed in pieces that keep to it. A stricter `slo.mtpot` of a request wins.",
    )
    policy: str = option(
        "past-future",
        "Who is let in. `past-future`: whoever leaves the forecast peak of memory under what there"
        " is; `aggressive`: whoever fits now; `conservative`: whoever fits at full length.",
        choices=("past-future", "aggressive", "conservative"),
    )
    watermark: float = option(
        0.05, "Share of KV pages that the `aggressive` policy keeps free for growth."
    )
    length_window: int = option(1000, "Past output lengths that the forecast draws from.")
    length_history: str | None = option(
        None,
        "File that keeps them between two starts. Default: one per model in the cache folder.",
    )
    profile: str | None = option(
        None,
        "Step times measured by `foresight profile`. Default: learnt while serving.",
    )


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where and how the worker computes."""

    device: str = option(
        "auto", "`auto` takes the GPU when there is one.", choices=("auto", "cpu", "cuda")
    )
    tensor_parallel_size: int = option(
        1,
        "Ranks that share the model, each with a part of the weights and of every page: GPUs of"
        " this machine, or on a CPU processes that divide the threads. See docs/operations.md.",
        aliases=("tp",),
    )
    threads: int | None = option(None, "CPU threads of the worker. Default: all cores.")
    attention_backend: str = option(
        "auto",
        "Who computes attention and what is around it. `flashinfer`: all attention over dense pages"
        " by FlashInfer, the rest by Triton kernels; `triton`: Triton kernels alone; `torch`: plain"
        " torch operations. `auto`: on a GPU Triton kernels, with FlashInfer for prompts where it"
        " is there; on a CPU native kernels. See docs/gpu.md.",
        choices=("auto", "flashinfer", "triton", "torch"),
    )
    compile: bool = option(
        True, "Build native CPU kernels in the background when a compiler is found."
    )
    cache_dir: str | None = option(
        None, "Folder that keeps compiled kernels. Default: the user's cache folder."
    )
    deterministic: bool = option(
        False, "Batch-invariant linear layers: a request's text does not depend on its neighbours."
    )
    cuda_graphs: bool = option(
        True,
        "On a GPU: record short steps and launch each as one, where the kernels allow it.",
        opposites=("enforce-eager",),
    )
    worker_core: int | None = option(
        None, "CPU core that the thread which feeds the GPU is pinned to. Default: none."
    )


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """Tokens guessed ahead of their verification. The text is the same with any of it."""

    drafters: tuple[str, ...] = option(
        ("suffix", "model"),
        "Who may guess, each row's first choice first: `suffix`, what followed the same words"
        " before, in this text or another of the tenant; `lookup`, in this text alone;"
        " `recycling`, what followed the last token or two lately; `model`, the draft model,"
        " where there is one; `coarse`, the target itself by the upper halves of 8-bit pages"
        " (kv_format int8n or k8v4). Empty: nobody.",
    )
    draft_model: str | None = option(
        None,
        "A small model of the same vocabulary that guesses: a folder or a hub id.",
        aliases=("speculative-model",),
    )
    max_draft_tokens: int = option(
        8,
        "Guesses for one sequence in one step, at most; how many pay is measured.",
        aliases=("num-speculative-tokens",),
    )
    fixed_draft_tokens: int | None = option(
        None, "Always so many, instead of what pays: for comparisons."
    )
    draft_ahead: Literal["auto", "on", "off"] = option(
        "auto",
        "Whether the draft model goes on for the likeliest outcome while its drafts are verified:"
        " `auto` finds out whether that is faster, on a CPU of three threads and more, one of which"
        " it takes; on a GPU it has not run yet and has to be asked for.",
    )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine process needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)

    @classmethod
    def of(cls, **values: Any) -> EngineConfig:
        """The tree from flat names: `EngineConfig.of(model="...", max_num_seqs=8)`.

        Raises `TypeError` for a name that is no option.
        """

        def take(section: Callable[..., T]) -> T:
            names = inspect.signature(section).parameters.keys() & values.keys()
            return section(**{name: values.pop(name) for name in names})

        config = cls(
            model=take(ModelConfig),
            cache=take(CacheConfig),
            schedule=take(ScheduleConfig),
            device=take(DeviceConfig),
            speculation=take(SpeculationConfig),
        )
        if values:
            raise TypeError(f"not an option of the engine: {', '.join(values)}")
        return config


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Everything the API process needs besides the engine's facts."""

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 for every interface.")
    port: int = option(8000, "Port to listen on; 0 picks a free one.")
    api_keys: tuple[str, ...] = option(
        (), "Keys clients must present; without any, no key is asked for.", aliases=("api-key",)
    )
    api_key_file: str | None = option(
        None, "File with one key a line, optionally `tenant:key`; read again when it changes."
    )
    cors_origins: tuple[str, ...] = option(
        (), "Web origins browsers may call from; `*` for any.", aliases=("allowed-origins",)
    )
    root_path: str = option("", "Path prefix a reverse proxy strips.")
    tls_certificate: str | None = option(
        None, "PEM file with the certificate chain; turns on https.", aliases=("ssl-certfile",)
    )
    tls_key: str | None = option(
        None, "PEM file with the certificate's private key.", aliases=("ssl-keyfile",)
    )
    max_body_bytes: int = option(16 * 1024 * 1024, "Larger request bodies are answered 413.")
    max_json_depth: int = option(64, "Deeper nested request bodies are answered 400.")
    max_logprobs: int = option(20, "Largest `top_logprobs` a request may ask for.")
    max_choices: int = option(128, "Largest `n` a request may ask for.")
    strict_params: bool = option(
        False, "Answer unknown request fields with 400 instead of naming them in a header."
    )
    vllm_metrics: bool = option(False, "Export metrics under vLLM's names too.")
    keep_alive_seconds: float = option(
        15.0, "A streamed answer sends a comment after so long without a token."
    )
    drain_seconds: float = option(
        30.0, "After SIGTERM running requests get so long to finish.", aliases=("shutdown-timeout",)
    )
    heartbeat_seconds: float = option(
        30.0, "/health turns red after so long without a settled step while work is queued."
    )
    request_timeout_seconds: float | None = option(
        None, "Requests that take longer are ended. Default: no limit."
    )
    queue_timeout_seconds: float | None = option(
        None, "Requests still waiting for their turn after so long are ended. Default: no limit."
    )
    default_temperature: float | None = option(
        None, "For requests without `temperature`. Default: generation_config.json's, else 1."
    )
    default_top_p: float | None = option(
        None, "For requests without `top_p`. Default: generation_config.json's, else 1."
    )
    default_top_k: int | None = option(
        None, "For requests without `top_k`. Default: generation_config.json's, else off."
    )
    default_min_p: float | None = option(
        None, "For requests without `min_p`. Default: generation_config.json's, else off."
    )
    default_repetition_penalty: float | None = option(
        None, "For requests without it. Default: generation_config.json's, else 1."
    )
    default_max_tokens: int | None = option(
        None,
        "For requests without a limit. Default: generation_config.json's, else what fits the"
        " context (16 on /v1/completions).",
    )
    tokenizer_threads: int = option(1, "Threads that tokenize long prompts.")
    log_level: str = option(
        "info",
        "Least severe log lines to write.",
        choices=("debug", "info", "warning", "error"),
        aliases=("uvicorn-log-level",),
    )
    log_format: str = option(
        "auto",
        "`auto`: JSON lines, or plain text when stderr is a terminal.",
        choices=("auto", "json", "text"),
    )
    log_prompts: bool = option(False, "Write prompts and outputs to the log.")


@dataclass(frozen=True, slots=True)
class Config:
    """The whole tree."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
