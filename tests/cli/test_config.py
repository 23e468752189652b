"""Where a value comes from, which source wins, and what is said about mistakes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest

from cli import document
from cli.config import PROJECT, resolve
from cli.errors import CommandError
from cli.options import options
from engine.config import Config

HOME = {"HOME": "/home/someone"}


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_are_those_of_the_tree():
    resolved = resolve([], HOME)
    assert resolved.server == Config().server
    assert resolved.engine.cache == Config().engine.cache
    assert resolved.engine.device.cache_dir == "/home/someone/.cache/foresight"


def test_bundled_model_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve([], HOME).engine.model.model == str(PROJECT / "assets/demo/target")
    assert resolve(["some/model"], HOME).engine.model.model == "some/model"


def test_each_source_wins_over_the_one_before(yaml_file):
    file = yaml_file("server: {port: 1, host: h1, root_path: /r1}")
    environment = {**HOME, "FORESIGHT_PORT": "2", "FORESIGHT_HOST": "h2"}
    server = resolve(["--config", file, "--port", "3"], environment).server
    assert (server.port, server.host, server.root_path) == (3, "h2", "/r1")
    from_variable = resolve([], {**environment, "FORESIGHT_CONFIG": file}).server
    assert (from_variable.port, from_variable.root_path) == (2, "/r1")


def test_names_known_from_elsewhere():
    config = resolve(
        [
            *("org/model", "--served-model-name", "a", "b", "--max-model-len", "1024"),
            *("--max-num-batched-tokens", "512", "--gpu-memory-utilization", "0.5"),
            *("--block-size", "32", "--no-enable-prefix-caching", "--kv-cache-dtype", "auto"),
            *("--api-key", "k1", "--api-key", "k2", "--allowed-origins", "*"),
            *("--ssl-certfile", "c.pem", "--ssl-keyfile", "k.pem", "--root-path", "/llm"),
            *("--dtype", "bfloat16", "--seed", "5", "--load-format", "dummy", "-tp", "4"),
        ],
        HOME,
    )
    engine, server = config.engine, config.server
    assert engine.model.model == "org/model"
    assert engine.model.served_model_name == ("a", "b")
    assert engine.model.max_model_len == 1024
    assert (engine.model.dtype, engine.model.seed) == ("bfloat16", 5)
    assert engine.schedule.max_step_tokens == 512
    assert (engine.cache.memory_fraction, engine.cache.page_size) == (0.5, 32)
    assert engine.cache.enable_prefix_cache is False
    assert engine.device.tensor_parallel_size == 4
    assert server.api_keys == ("k1", "k2")
    assert (server.tls_certificate, server.tls_key) == ("c.pem", "k.pem")


def test_environment_lists_and_truths():
    environment = {
        **HOME,
        "FORESIGHT_API_KEYS": "one, two",
        "FORESIGHT_STRICT_PARAMS": "true",
        "FORESIGHT_MAX_MODEL_LEN": "77",
        "UNRELATED": "x",
    }
    config = resolve([], environment)
    assert config.server.api_keys == ("one", "two")
    assert config.server.strict_params is True
    assert config.engine.model.max_model_len == 77


def test_variables_of_a_kubernetes_service_are_not_ours():
    environment = {
        **HOME,
        "FORESIGHT_PORT": "tcp://10.0.0.1:8000",
        "FORESIGHT_SERVICE_HOST": "10.0.0.1",
        "FORESIGHT_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert resolve([], environment).server.port == 8000


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--prot", "1"], {}, r"--prot; did you mean --port\?"),
        (["--max-num-sequences=4"], {}, "did you mean --max-num-seqs"),
        (["--port", "many"], {}, "--port: 'many' is not of type int"),
        (["--port"], {}, "expected one argument"),
        (["--dtype", "bfloat61"], {}, "did you mean bfloat16"),
        (["a", "--model", "b"], {}, "given twice"),
        ([], {"FORESIGHT_PROT": "1"}, r"did you mean FORESIGHT_PORT\?"),
        ([], {"FORESIGHT_MAX_NUM_SEQS": "x"}, "FORESIGHT_MAX_NUM_SEQS: 'x'"),
        (["--config", "/nowhere/x.yaml"], {}, "cannot read /nowhere/x.yaml"),
        (["--port", "70000"], {}, "between 0 and 65535"),
        (["--max-num-seqs", "0"], {}, "max_num_seqs must be positive"),
        (["--max-draft-tokens", "-1"], {}, "max_draft_tokens must not be negative, not -1"),
        (["--fixed-draft-tokens", "-2"], {}, "fixed_draft_tokens must not be negative, not -2"),
        (["--num-speculative-tokens", "2.5"], {}, "'2.5' is not of type int"),
        ([], {"FORESIGHT_MAX_DRAFT_TOKENS": "-1"}, "max_draft_tokens must not be negative"),
        (["--ttft-target", "nan"], {}, "ttft_target must be positive"),
        (["--queue-timeout-seconds", "inf"], {}, "queue_timeout_seconds must be positive"),
        (["--gpu-memory-utilization", "1.5"], {}, "memory_fraction"),
        (["--max-num-seqs", "64", "--max-num-batched-tokens", "32"], {}, "at least max_num_seqs"),
    ],
)
def test_mistakes_are_one_sentence(arguments, environment, sentence):
    with pytest.raises(CommandError, match=sentence) as error:
        resolve(arguments, {**HOME, **environment})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sever: {port: 1}", "unknown option sever; did you mean server"),
        ("server: {prot: 1}", r"unknown option server.prot; did you mean port"),
        ("server: {port: '8000'}", "server.port: '8000' is not of type int"),
        ("engine: {cache: {page_size: 1.5}}", "page_size"),
        ("engine: {model: {dtype: half}}", "'half' is not one of"),
        ("engine: {speculation: {max_draft_tokens: -1}}", "max_draft_tokens must not be negative"),
        ("engine: {speculation: {fixed_draft_tokens: '2'}}", "'2' is not of type int"),
        ("engine: {speculation: {drafter: suffix}}", "speculation.drafter; did you mean drafters"),
        ("server: 5", "server must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence(yaml_file, text, sentence):
    with pytest.raises(CommandError, match=sentence) as error:
        resolve(["--config", yaml_file(text)], HOME)
    assert "\n" not in str(error.value)


def test_yaml_lists_and_empty_sections(yaml_file):
    file = yaml_file(
        "engine:\n  cache:\n  model: {served_model_name: demo}\nserver: {api_keys: [a, b]}"
    )
    config = resolve(["--config", file], HOME)
    assert config.engine.model.served_model_name == ("demo",)
    assert config.server.api_keys == ("a", "b")


def test_drafters_are_a_list_everywhere(yaml_file):
    arguments = ["--drafters", "lookup", "model", "--speculative-model", "some/draft"]
    speculation = resolve([*arguments, "--num-speculative-tokens", "0"], HOME).engine.speculation
    assert speculation.drafters == ("lookup", "model")
    assert (speculation.draft_model, speculation.max_draft_tokens) == ("some/draft", 0)
    for text, drafters in (("[suffix]", ("suffix",)), ("suffix", ("suffix",)), ("[]", ())):
        file = yaml_file(f"engine: {{speculation: {{drafters: {text}}}}}")
        assert resolve(["--config", file], HOME).engine.speculation.drafters == drafters
    environment = {**HOME, "FORESIGHT_DRAFTERS": "recycling, suffix"}
    assert resolve([], environment).engine.speculation.drafters == ("recycling", "suffix")
    nobody = resolve([], {**HOME, "FORESIGHT_DRAFTERS": ""})
    assert nobody.engine.speculation.drafters == ()


def test_the_bundled_pair_speculates_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = ["--config", str(PROJECT / "configs" / "demo.yaml")]
    speculation = resolve(demo, HOME).engine.speculation
    assert speculation.draft_model == str(PROJECT / "assets/demo/draft")
    assert "model" in speculation.drafters
    assert resolve([], HOME).engine.speculation.draft_model is None


@pytest.mark.parametrize("file", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configurations_are_valid(file: Path):
    assert resolve(["--config", str(file)], HOME) != resolve([], HOME)


def test_options_have_distinct_names_and_a_help_text():
    flags = Counter(flag for option in options() for flag in option.flags)
    assert [flag for flag, count in flags.items() if count > 1] == []
    assert all(option.help.endswith(".") for option in options())


def test_the_tree_is_frozen():
    config = resolve([], HOME)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.server.port = 1


def test_the_document_is_current():
    assert document.PAGE.read_text() == document.page(), "run: python -m cli.document"


def test_a_flag_that_other_servers_know_turns_graphs_off() -> None:
    assert resolve([], {}).engine.device.cuda_graphs
    assert not resolve(["--enforce-eager"], {}).engine.device.cuda_graphs
    assert not resolve(["--no-cuda-graphs"], {}).engine.device.cuda_graphs
