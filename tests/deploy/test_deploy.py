"""The Dockerfile, the compose file, Prometheus and Grafana, as far as seen without Docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy.dockerfile import base_image, health_command, in_context, last, parse, steps
from deploy.grafana import dashboard
from deploy.replay import project_files
from deploy.requirements import requirements
from engine.messages import EngineFacts
from scheduler.request import Load
from server.metrics import Metrics

root = Path(__file__).parent.parent.parent
stages = parse((root / "Dockerfile").read_text())
ignore = (root / ".dockerignore").read_text()


def exported() -> set[str]:
    """Every sample name that /metrics can show."""
    facts = EngineFacts(
        max_model_len=8192,
        vocab_size=4096,
        num_pages=64,
        page_size=16,
        max_num_seqs=64,
        max_logprobs=20,
        device="cpu",
        dtype="bfloat16",
    )
    metrics = Metrics("demo", lambda: Load(accepted_by_position=(0,)), lambda: facts)
    for _, counter in metrics.counters():
        counter.add(label="x" if counter.label else "")
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_run_as_an_ordinary_user_with_a_health_check(target: str) -> None:
    instructions = steps(stages, target)
    assert last(instructions, "USER").text not in ("root", "0")
    assert "/health" in " ".join(health_command(instructions))
    command = last(instructions, "ENTRYPOINT").words + last(instructions, "CMD").words
    assert command[:2] == ["foresight", "serve"]
    assert re.fullmatch(r"python:3\.\d+-slim", base_image(stages, target))
    # After USER nothing may need root.
    names = [instruction.name for instruction in instructions]
    assert "RUN" not in names[names.index("USER") :]


def test_cuda_is_the_default_target() -> None:
    assert list(stages)[-1] == "cuda"


def test_the_context_is_the_program_and_nothing_else() -> None:
    sent = {path.split("/")[0] for path in project_files() if in_context(path, ignore)}
    project = tomllib.loads((root / "pyproject.toml").read_text())
    packages = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert packages <= sent
    assert {"pyproject.toml", "README.md", "LICENSE", "assets", "configs"} <= sent
    assert not {"tests", ".git", "benchmarks", "loadtest", "docs", ".venv"} & sent


def test_an_installed_copy_has_every_file_of_its_packages() -> None:
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = set(setup["packages"])
    top = {name for name in packages if "." not in name}
    installed = {
        path
        for name, patterns in setup["package-data"].items()
        for pattern in patterns
        for path in (root / name.replace(".", "/")).glob(pattern)
    }
    for path in project_files():
        file = root / path
        if path.split("/")[0] not in top:
            continue
        if file.suffix == ".py":
            assert ".".join(Path(path).parent.parts) in packages, f"{path}: not in packages"
        else:
            assert file in installed, f"{path}: not in package-data"


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("cli/main.py", True),
        ("cli", True),
        ("client/main.py", False),
        ("cli/__pycache__/main.pyc", False),
        ("deploy/requirements.py", True),
        ("deploy/replay.py", False),
        ("tests/x.py", False),
    ],
)
def test_dockerignore_rules(path: str, sent: bool) -> None:
    assert in_context(path, ignore) is sent


def test_parser_joins_lines_and_follows_stages() -> None:
    text = """
# comment
ARG V=3
FROM image:${V} AS a
RUN one \\
 && two
FROM a AS b
ENV X=1
CMD ["x", "y z"]
"""
    parsed = parse(text)
    assert [(i.name, i.text) for i in steps(parsed, "b")] == [
        ("RUN", "one && two"),
        ("ENV", "X=1"),
        ("CMD", '["x", "y z"]'),
    ]
    assert base_image(parsed, "b") == "image:3"
    assert last(steps(parsed, "b"), "CMD").words == ["x", "y z"]
    with pytest.raises(LookupError):
        last(steps(parsed, "a"), "CMD")
    with pytest.raises(ValueError, match="without a name"):
        parse("FROM image")


def test_requirements_come_from_the_project() -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    every = requirements(project, [], None)
    assert every == project["dependencies"]
    assert (
        requirements(project, ["gpu"], None)[len(every) :]
        == (project["optional-dependencies"]["gpu"])
    )
    (torch,) = requirements(project, [], "torch")
    assert torch.startswith("torch")
    with pytest.raises(SystemExit):
        requirements(project, [], "no-such-package")
    with pytest.raises(SystemExit):
        requirements(project, ["no-such-group"], None)


def compose(*names: str) -> dict:
    return [yaml.safe_load((root / name).read_text()) for name in names][-1]


def test_compose_file_fits_the_rest() -> None:
    services = compose("docker-compose.yml")["services"]
    assert set(services) == {"server", "prometheus", "grafana"}
    assert services["server"]["build"]["target"] in stages
    for service in services.values():
        assert "build" in service or re.search(r":v?\d", service["image"]), "images are pinned"
        for port in service["ports"]:
            assert port.startswith("127.0.0.1:"), "loopback only"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = compose("docker-compose.yml")["volumes"]
            assert (root / source).exists() if source.startswith(".") else source in known
        for needed in service.get("depends_on", []):
            assert needed in services
    scrape = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text())
    targets = scrape["scrape_configs"][0]["static_configs"][0]["targets"]
    assert targets == ["server:8000"]
    port = last(steps(stages, "cpu"), "EXPOSE").text
    assert services["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_compose_overlay_for_cuda() -> None:
    overlay = compose("deploy/docker-compose.cuda.yml")["services"]
    assert set(overlay) == {"server"}
    assert overlay["server"]["build"]["target"] == "cuda"


def test_grafana_is_provisioned_with_the_dashboard() -> None:
    source = yaml.safe_load(
        (root / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    assert source["uid"] == dashboard.source["uid"]
    assert source["url"] == "http://prometheus:9090"
    assert dashboard.target.read_text() == dashboard.text(), (
        "run python -m deploy.grafana.dashboard"
    )
    panels = json.loads(dashboard.target.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


def metric_names(text: str) -> set[str]:
    return set(re.findall(r"\b(?:foresight_|vllm:)\w+", text))


def test_every_metric_of_the_dashboard_is_exported() -> None:
    queries = [
        target["expr"]
        for panel in dashboard.dashboard()["panels"]
        for target in panel.get("targets", [])
    ]
    asked = metric_names("\n".join(queries))
    assert len(asked) > 15
    assert asked <= exported()


def test_every_metric_of_the_alerts_is_exported() -> None:
    asked = metric_names((root / "deploy/prometheus/alerts.yml").read_text())
    assert asked
    assert asked <= exported()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration() -> None:
    subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"],
        cwd=root / "deploy/prometheus",
        check=True,
        capture_output=True,
    )
