"""Every request field we know of, and what becomes of it. Nothing is silently dropped.

A field is honoured (it stands in `schema.py`), ignored (it cannot change the text; listed in the
`x-ignored-params` response header) or refused (400 naming it). Fields in no table are ignored and
listed, or refused with `strict_params`. `null` is the same as leaving a field out. The table drives
the behaviour, `docs/api.md` and the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from server.errors import ApiError, unsupported


class Endpoint(StrEnum):
    CHAT = "chat"
    COMPLETIONS = "completions"


class Handling(StrEnum):
    HONOURED = "honoured"
    IGNORED = "ignored"
    REFUSED = "refused"


BOTH = frozenset(Endpoint)
CHAT = frozenset({Endpoint.CHAT})
COMPLETIONS = frozenset({Endpoint.COMPLETIONS})


@dataclass(frozen=True, slots=True)
class Parameter:
    """One field. `neutral` values of a field that is not honoured ask for nothing and pass."""

    name: str
    handling: Handling
    note: str
    endpoints: frozenset[Endpoint] = BOTH
    neutral: tuple[Any, ...] = ()

    def asks(self, value: object) -> bool:
        return not any(type(value) is type(n) and value == n for n in self.neutral)


def _honoured(name: str, note: str, endpoints: frozenset[Endpoint] = BOTH) -> Parameter:
    return Parameter(name, Handling.HONOURED, note, endpoints)


def _ignored(
    name: str, note: str, endpoints: frozenset[Endpoint] = BOTH, neutral: tuple[Any, ...] = ()
) -> Parameter:
    return Parameter(name, Handling.IGNORED, note, endpoints, neutral)


def _refused(
    name: str, note: str, endpoints: frozenset[Endpoint] = BOTH, neutral: tuple[Any, ...] = ()
) -> Parameter:
    return Parameter(name, Handling.REFUSED, note, endpoints, neutral)


_TOOLS = "Tool calls are not supported yet."
_GRAMMAR = "Structured outputs are not supported yet."
_MEDIA = "This server takes and gives text only."
_HOSTED = "This is a hosted feature that this server does not have."
_CODE = "Code from requests is never run."
_DISAGGREGATED = "Disaggregated serving is not supported."
_BEAM = "Beam search is not supported; use n."
_SAMPLER = "This sampler is not supported; use temperature, top_p, top_k or min_p."

PARAMETERS: tuple[Parameter, ...] = (
    _honoured("model", "A served model; the first one when left out."),
    _honoured("messages", "The conversation: at least one message, text parts only.", CHAT),
    _honoured("prompt", "A string, token ids, or a list of either.", COMPLETIONS),
    _honoured("max_completion_tokens", "Most tokens to generate.", CHAT),
    _honoured("max_tokens", "Most tokens to generate; clamped to the context. Completions: 16."),
    _honoured("min_tokens", "No end and no stop string before so many tokens."),
    _honoured("temperature", "0 is greedy."),
    _honoured("top_p", "Nucleus sampling."),
    _honoured("top_k", "0 or -1 is off."),
    _honoured("min_p", "Least probability relative to the most likely token."),
    _honoured("n", "Choices for each prompt."),
    _honoured("stop", "Up to 4 strings that end the text; not part of it."),
    _honoured("stop_token_ids", "Tokens that end the text."),
    _honoured("include_stop_str_in_output", "Keep the stop string."),
    _honoured("ignore_eos", "Do not end at the model's end tokens."),
    _honoured("stream", "Server-sent events."),
    _honoured("stream_options", "include_usage, continuous_usage_stats."),
    _honoured("seed", "Fixes the sampling noise; any 64-bit integer."),
    _honoured("frequency_penalty", "-2 to 2, on output tokens by count."),
    _honoured("presence_penalty", "-2 to 2, on output tokens."),
    _honoured("repetition_penalty", "Above 0; prompt and output; 1 is off."),
    _honoured("logit_bias", "Token id to a bias from -100 to 100."),
    _honoured("allowed_token_ids", "Only these tokens."),
    _honoured("bad_words", "Strings that must not be generated."),
    _honoured("logprobs", "Chat: a boolean. Completions: how many of the most likely tokens."),
    _honoured("top_logprobs", "How many of the most likely tokens; needs logprobs.", CHAT),
    _honoured("prompt_logprobs", "Log-probabilities of the prompt; not with stream."),
    _honoured("echo", "Show the prompt before the text.", COMPLETIONS),
    _honoured("skip_special_tokens", "Leave special tokens out of the text."),
    _honoured("add_special_tokens", "Chat: false, as the template has them. Completions: true."),
    _honoured("add_generation_prompt", "Open an assistant message after the last one.", CHAT),
    _honoured("continue_final_message", "Go on within the last message.", CHAT),
    _honoured("chat_template_kwargs", "Variables for the chat template.", CHAT),
    _honoured("documents", "Handed to the chat template.", CHAT),
    _honoured("reasoning_effort", "Handed to the chat template; none turns thinking off.", CHAT),
    _honoured("truncate_prompt_tokens", "Keep so many prompt tokens; -1: what fits."),
    _honoured("truncation_side", "left (default) drops the start of the prompt, right the end."),
    _honoured("return_token_ids", "Also return token ids."),
    _honoured("return_tokens_as_token_ids", "Log-probability entries name tokens token_id:N."),
    _honoured("priority", "Lower runs sooner; header x-priority or X-Vllm-Priority wins."),
    _honoured("request_id", "Used as x-request-id when that header is missing."),
    _honoured("cache_salt", "Prefix-cache entries are shared only under the same salt."),
    _honoured("metadata", "Up to 16 pairs, returned with the answer."),
    _honoured("timings", "Return timings of this request in `metrics`."),
    _honoured("slo", "Latency targets in seconds: ttft, mtpot."),
    _honoured(
        "speculative", "Of drafts: enabled, max_draft_tokens (a step), drafter (the only one)."
    ),
    _honoured("disable_spec_decode", "true is speculative.enabled: false."),
    _honoured("best_of", "Accepted when equal to n.", COMPLETIONS),
    # Cannot change the text of one answer.
    _ignored("user", "Not used."),
    _ignored("safety_identifier", "Not used."),
    _ignored("store", "Nothing is stored.", neutral=(False,)),
    _ignored("service_tier", "There is one tier; see priority.", neutral=("auto", "default")),
    _ignored("prompt_cache_key", "The prefix cache needs no hint."),
    _ignored("prompt_cache_options", "The prefix cache needs no hint."),
    _ignored("prompt_cache_retention", "The prefix cache needs no hint."),
    _ignored("prediction", "Drafters look things up in the prompt instead.", CHAT),
    _ignored("verbosity", "Ask for it in the prompt.", CHAT),
    _ignored("parallel_tool_calls", "There are no tools.", CHAT),
    _ignored("spaces_between_special_tokens", "Has no effect on the supported tokenizers."),
    _ignored("session_id", "Not used."),
    _ignored("cache_prompt", "The prefix cache is always on."),
    _ignored("stream_interval", "One event for each step."),
    _ignored("timings_per_token", "Use timings."),
    # Would change the answer.
    _refused("tools", _TOOLS, CHAT, ([],)),
    _refused("tool_choice", _TOOLS, CHAT, ("none", "auto")),
    _refused("functions", "Deprecated, and tool calls are not supported yet.", CHAT, ([],)),
    _refused("function_call", "Deprecated, and tool calls are not supported yet.", CHAT, ("none",)),
    _refused("response_format", _GRAMMAR, neutral=({"type": "text"},)),
    _refused("structured_outputs", _GRAMMAR),
    _refused("guided_json", _GRAMMAR),
    _refused("guided_regex", _GRAMMAR),
    _refused("guided_choice", _GRAMMAR),
    _refused("guided_grammar", _GRAMMAR),
    _refused("guided_json_object", _GRAMMAR, neutral=(False,)),
    _refused("guided_decoding_backend", _GRAMMAR),
    _refused("guided_whitespace_pattern", _GRAMMAR),
    _refused("regex", _GRAMMAR),
    _refused("ebnf", _GRAMMAR),
    _refused("grammar", _GRAMMAR, neutral=("",)),
    _refused("json_schema", _GRAMMAR),
    _refused("structural_tag", _GRAMMAR),
    _refused("stop_regex", "Use stop."),
    _refused("modalities", _MEDIA, CHAT, (["text"],)),
    _refused("audio", _MEDIA, CHAT),
    _refused("web_search_options", _HOSTED, CHAT),
    _refused("moderation", _HOSTED, CHAT),
    _refused("echo", "On chat, use continue_final_message.", CHAT, (False,)),
    _refused("chat_template", "Templates from requests are not run; see chat_template_kwargs."),
    _refused("suffix", "Infilling is not supported.", COMPLETIONS, ("",)),
    _refused("use_beam_search", _BEAM, neutral=(False,)),
    _refused("best_of", _BEAM, CHAT, (1,)),
    _refused("length_penalty", _BEAM, neutral=(1, 1.0)),
    _refused("early_stopping", _BEAM, neutral=(False,)),
    _refused("logprob_token_ids", "Use logprobs with top_logprobs."),
    _refused("return_prompt_text", "Use /tokenize or echo.", neutral=(False,)),
    _refused("thinking_token_budget", "Reasoning budgets are not supported yet."),
    _refused("reasoning_budget_tokens", "Reasoning budgets are not supported yet."),
    _refused("repetition_detection", "Use repetition_penalty."),
    _refused("lora_path", "Adapters are not supported yet."),
    _refused("kv_transfer_params", _DISAGGREGATED),
    _refused("ec_transfer_params", _DISAGGREGATED),
    _refused("disaggregated_params", _DISAGGREGATED),
    _refused("bootstrap_host", _DISAGGREGATED),
    _refused("bootstrap_port", _DISAGGREGATED),
    _refused("bootstrap_room", _DISAGGREGATED),
    _refused("vllm_xargs", _CODE),
    _refused("custom_logit_processor", _CODE),
    _refused("custom_params", _CODE),
    _refused("logits_processors", _CODE, neutral=([],)),
    _refused("prompt_embeds", _MEDIA),
    _refused("mm_processor_kwargs", _MEDIA),
    _refused("media_io_kwargs", _MEDIA),
    _refused("images_config", _MEDIA),
    _refused("dry_multiplier", _SAMPLER, neutral=(0, 0.0)),
    _refused("xtc_probability", _SAMPLER, neutral=(0, 0.0)),
    _refused("typical_p", _SAMPLER, neutral=(1, 1.0)),
    _refused("mirostat", _SAMPLER, neutral=(0,)),
    _refused("dynatemp_range", _SAMPLER, neutral=(0, 0.0)),
    _refused("top_n_sigma", _SAMPLER, neutral=(-1, -1.0)),
    _refused("samplers", _SAMPLER),
    _refused("n_probs", "Use logprobs.", neutral=(0,)),
    _refused("n_predict", "Use max_tokens.", neutral=(-1,)),
    _refused("repeat_penalty", "Use repetition_penalty.", neutral=(1, 1.0)),
    _refused("id_slot", "Slots are not for clients to choose.", neutral=(-1,)),
    _refused("t_max_predict_ms", "Use the header x-request-timeout-ms.", neutral=(0,)),
)

_TABLES: Mapping[Endpoint, Mapping[str, Parameter]] = {
    endpoint: {p.name: p for p in PARAMETERS if endpoint in p.endpoints} for endpoint in Endpoint
}


def known(endpoint: Endpoint) -> Mapping[str, Parameter]:
    """The table of one endpoint, by name."""
    return _TABLES[endpoint]


def unhonoured(endpoint: Endpoint, fields: Mapping[str, Any], *, strict: bool) -> list[str]:
    """The fields that are ignored. Raises `ApiError` for one that is refused, or unknown in strict
    mode."""
    table = _TABLES[endpoint]
    ignored = []
    for name, value in fields.items():
        parameter = table.get(name)
        if value is None:
            continue
        if parameter is None:
            if strict:
                raise ApiError(
                    400,
                    f"Unknown field: {name[:64]!r}.",
                    code="unknown_parameter",
                    param=name[:64],
                )
            ignored.append(name)
        elif parameter.handling is Handling.HONOURED or not parameter.asks(value):
            continue
        elif parameter.handling is Handling.REFUSED:
            raise unsupported(name, f"{name} is not supported. {parameter.note}")
        else:
            ignored.append(name)
    return ignored
