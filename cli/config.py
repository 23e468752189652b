"""Resolves the configuration: defaults < YAML file < environment < flags. Then it is frozen."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from cli.errors import CommandError
from cli.options import ENVIRONMENT_PREFIX, Option, options
from engine.config import Config, ModelConfig

CONFIG_VARIABLE = ENVIRONMENT_PREFIX + "CONFIG"
PROJECT = Path(__file__).resolve().parent.parent
DEMO_DRAFT = "assets/demo/draft"

# In a cluster with a service called "foresight", Kubernetes sets variables of these shapes.
_KUBERNETES = re.compile(rf"{ENVIRONMENT_PREFIX}(SERVICE_.+|PORT_\d+_.+)")
_KUBERNETES_PORT = re.compile(r"(tcp|udp)://")

Values = dict[tuple[str, ...], Any]


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> Config:
    """The configuration of `foresight serve`. Raises `CommandError` for whatever is wrong in it."""
    flags, file = _from_flags(arguments)
    file = file or environment.get(CONFIG_VARIABLE)
    values: Values = {}
    if file:
        values |= _from_yaml(Path(file))
    values |= _from_environment(environment)
    values |= flags
    config = _with_places(_build(Config, (), values), environment)
    _check(config)
    return config


def parser() -> argparse.ArgumentParser:
    """The flags of `foresight serve`, one group per section of the tree."""
    made = _Parser(
        prog="foresight serve",
        description="Serve a model over the OpenAI API.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument("positional_model", nargs="?", metavar="MODEL", help="short for --model")
    made.add_argument("--config", metavar="FILE", help="a YAML file; see configs/")
    groups: dict[tuple[str, ...], argparse._ArgumentGroup] = {}
    for option in options():
        section = option.path[:-1]
        if section not in groups:
            groups[section] = made.add_argument_group(".".join(section))
        groups[section].add_argument(*option.flags, dest=option.key, **_argument(option))
        if option.opposites:
            groups[section].add_argument(
                *option.off_flags,
                dest=option.key,
                action="store_false",
                help=f"the same as --no-{option.flags[0].removeprefix('--')}",
            )
    return made


def _argument(option: Option) -> dict[str, Any]:
    help_text = option.help.replace("%", "%%")
    if option.is_bool:
        return {"action": argparse.BooleanOptionalAction, "help": help_text}
    shape: dict[str, Any] = {"metavar": option.type_name.split()[-1].upper(), "help": help_text}
    if option.choices:
        shape |= {"metavar": "|".join(option.choices)}
    if option.is_list:
        shape |= {"nargs": "+", "action": "extend"}
    return shape


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _from_flags(arguments: Sequence[str]) -> tuple[Values, str | None]:
    found, unknown = parser().parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        known = [flag for option in options() for flag in (*option.flags, *option.off_flags)]
        raise CommandError(f"unknown argument {flag}{_nearest(flag, [*known, '--config'])}.")
    given: dict[str, Any] = vars(found)
    file = given.pop("config", None)
    model = given.pop("positional_model", None)
    if model is not None:
        if "engine.model.model" in given:
            raise CommandError("the model is given twice, as an argument and as --model.")
        given["engine.model.model"] = model
    by_key = {option.key: option for option in options()}
    return {
        by_key[key].path: _convert(by_key[key], value, by_key[key].flags[0])
        for key, value in given.items()
    }, file


def _from_environment(environment: Mapping[str, str]) -> Values:
    by_variable = {option.variable: option for option in options()}
    values: Values = {}
    for variable, text in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if _KUBERNETES.fullmatch(variable) or _KUBERNETES_PORT.match(text):
            continue
        option = by_variable.get(variable)
        if option is None:
            near = _nearest(variable, by_variable)
            raise CommandError(f"unknown environment variable {variable}{near}.")
        value: Any = text
        if option.is_list:
            value = [part for part in (part.strip() for part in text.split(",")) if part]
        values[option.path] = _convert(option, value, variable)
    return values


def _from_yaml(file: Path) -> Values:
    try:
        tree = yaml.safe_load(file.read_text())
    except OSError as error:
        raise CommandError(f"cannot read {file}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise CommandError(f"{file} is not valid YAML: {where}.") from error
    values: Values = {}
    _flatten(tree or {}, (), file, values)
    return values


def _flatten(node: Any, path: tuple[str, ...], file: Path, values: Values) -> None:
    """Walks a YAML tree along the options."""
    if not isinstance(node, dict):
        raise CommandError(f"{file}: {'.'.join(path) or 'the file'} must be a mapping.")
    below = {option.path[len(path)] for option in options() if option.path[: len(path)] == path}
    for key, value in node.items():
        here = (*path, str(key))
        if key not in below:
            near = _nearest(str(key), below)
            raise CommandError(f"{file}: unknown option {'.'.join(here)}{near}.")
        option = next((option for option in options() if option.path == here), None)
        if option is None:
            _flatten({} if value is None else value, here, file, values)
        else:
            values[here] = _convert(option, value, f"{file}: {option.key}", strict=True)


def _convert(option: Option, value: Any, where: str, *, strict: bool = False) -> Any:
    """Checks and converts one value; text from flags and variables may stand for numbers."""
    if option.is_list and isinstance(value, str):
        value = [value]
    try:
        converted = msgspec.convert(value, option.type, strict=strict)
    except msgspec.ValidationError:
        raise CommandError(f"{where}: {value!r} is not of type {option.type_name}.") from None
    if option.choices and converted not in option.choices:
        known = ", ".join(option.choices)
        near = _nearest(str(converted), option.choices)
        raise CommandError(f"{where}: {converted!r} is not one of {known}{near}.")
    return converted


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def _build(node: Any, path: tuple[str, ...], values: Values) -> Any:
    annotations = typing.get_type_hints(node)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        here = (*path, field.name)
        if dataclasses.is_dataclass(annotations[field.name]):
            given[field.name] = _build(annotations[field.name], here, values)
        elif here in values:
            given[field.name] = values[here]
    return node(**given)


def _check(config: Config) -> None:
    """What no source may ask for. Raises `CommandError`."""
    cache, schedule, server = config.engine.cache, config.engine.schedule, config.server
    positive = {
        "max_model_len": config.engine.model.max_model_len,
        "page_size": cache.page_size,
        "kv_bytes": cache.kv_bytes,
        "num_pages": cache.num_pages,
        "max_num_seqs": schedule.max_num_seqs,
        "max_step_tokens": schedule.max_step_tokens,
        "max_queued_requests": schedule.max_queued_requests,
        "max_queued_tokens": schedule.max_queued_tokens,
        "ttft_target": schedule.ttft_target,
        "mtpot_target": schedule.mtpot_target,
        "tensor_parallel_size": config.engine.device.tensor_parallel_size,
        "threads": config.engine.device.threads,
        "length_window": schedule.length_window,
        "max_body_bytes": server.max_body_bytes,
        "max_json_depth": server.max_json_depth,
        "max_choices": server.max_choices,
        "keep_alive_seconds": server.keep_alive_seconds,
        "heartbeat_seconds": server.heartbeat_seconds,
        "request_timeout_seconds": server.request_timeout_seconds,
        "queue_timeout_seconds": server.queue_timeout_seconds,
        "tokenizer_threads": server.tokenizer_threads,
    }
    for name, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise CommandError(f"{name} must be positive, not {value}.")
    if cache.swap_bytes is not None and cache.swap_bytes < 0:
        raise CommandError(f"swap_bytes must not be negative, not {cache.swap_bytes}.")
    if not 0 < cache.memory_fraction <= 1:
        raise CommandError(f"memory_fraction must be in (0, 1], not {cache.memory_fraction}.")
    if not 0 <= schedule.watermark < 1:
        raise CommandError(f"watermark must be in [0, 1), not {schedule.watermark}.")
    speculation = config.engine.speculation
    for name in ("max_draft_tokens", "fixed_draft_tokens"):
        count = getattr(speculation, name)
        if count is not None and count < 0:
            raise CommandError(f"{name} must not be negative, not {count}.")
    core = config.engine.device.worker_core
    if core is not None and core < 0:
        raise CommandError(f"worker_core must not be negative, not {core}.")
    if not 0 <= server.port < 65536:
        raise CommandError(f"port must be between 0 and 65535, not {server.port}.")
    if server.drain_seconds < 0:
        raise CommandError(f"drain_seconds must not be negative, not {server.drain_seconds}.")
    if schedule.max_step_tokens is not None and schedule.max_step_tokens < schedule.max_num_seqs:
        raise CommandError(
            f"max_step_tokens {schedule.max_step_tokens} must be at least max_num_seqs "
            f"{schedule.max_num_seqs}: each running sequence gets a token a step."
        )


def _with_places(config: Config, environment: Mapping[str, str]) -> Config:
    """Fills in the defaults that depend on the machine: folders."""
    engine = config.engine
    model, device = engine.model, engine.device
    if model.model == ModelConfig().model and not Path(model.model).is_dir():
        model = dataclasses.replace(model, model=str(PROJECT / model.model))
    speculation = engine.speculation
    draft = speculation.draft_model
    if draft == DEMO_DRAFT and not Path(draft).is_dir():
        speculation = dataclasses.replace(speculation, draft_model=str(PROJECT / draft))
    if device.cache_dir is None:
        device = dataclasses.replace(device, cache_dir=_cache_folder(environment))
    return dataclasses.replace(
        config,
        engine=dataclasses.replace(engine, model=model, device=device, speculation=speculation),
    )


def _cache_folder(environment: Mapping[str, str]) -> str | None:
    base = environment.get("XDG_CACHE_HOME")
    home = environment.get("HOME")
    if not base and not home:
        return None
    return str((Path(base) if base else Path(str(home)) / ".cache") / "foresight")
