"""`foresight simulate` and `foresight plan`, as a user calls them."""

from __future__ import annotations

import json

import pytest

from cli.main import main
from scheduler.profile import Profile, StepShape

POINTS = (
    (StepShape(1, 1, 100, 0), 0.010),
    (StepShape(64, 64, 6400, 0), 0.020),
    (StepShape(1, 512, 0, 131_328), 0.060),
    (StepShape(1, 1, 8000, 0), 0.012),
)
LINE = '{"arrival": %s, "prompt_tokens": 40, "output_tokens": 20, "max_tokens": 200}\n'


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(Profile(points=POINTS, model="m", machine="box").dump())
    return str(path)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(LINE % (i / 20) for i in range(100)))
    return str(path)


def test_policies_side_by_side(capsys, profile, trace):
    policies = ["past-future", "aggressive", "conservative", "oracle"]
    arguments = ["simulate", "--trace", trace, "--profile", profile, "--kv-tokens", "2000"]
    assert main([*arguments, "--policy", *policies]) == 0
    shown = capsys.readouterr().out
    assert all(policy in shown for policy in policies)
    assert "goodput, requests/s" in shown
    assert main([*arguments, "--policy", *policies, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["policies"]) == policies
    assert {summary["requests"] for summary in data["policies"].values()} == {100}
    assert data["policies"]["oracle"]["evictions"] == 0


def test_a_made_trace_is_kept_and_played_again(capsys, profile, tmp_path):
    made = str(tmp_path / "made.jsonl")
    common = ["--profile", profile, "--kv-tokens", "4000", "--json"]
    workload = ["--workload", "chat", "--requests", "50", "--scale", "0.2", "--save-trace", made]
    assert main(["simulate", *workload, *common]) == 0
    assert main(["simulate", "--trace", made, *common]) == 0
    first, second = (
        json.loads(line)["policies"]["past-future"] for line in capsys.readouterr().out.splitlines()
    )
    del first["real_seconds"], second["real_seconds"]
    assert first == second


def test_plots(capsys, profile, trace, tmp_path):
    plots = tmp_path / "plots"
    common = ["--trace", trace, "--profile", profile, "--kv-tokens", "4000"]
    assert main(["simulate", *common, "--plot", str(plots)]) == 0
    curve = tmp_path / "curve.svg"
    assert main(["plan", *common, "--max-num-seqs", "8", "--plot", str(curve)]) == 0
    files = [*plots.iterdir(), curve]
    assert {path.name for path in files} == {
        "utilisation.svg", "requests.svg", "evictions.svg", "curve.svg",
    }  # fmt: skip
    assert all("<svg" in path.read_text() for path in files)


def test_plan(capsys, profile, trace):
    arguments = ["plan", "--trace", trace, "--profile", profile, "--kv-tokens", "4000"]
    arguments += ["--ttft", "0.2", "--max-num-seqs", "2", "32"]
    assert main([*arguments, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    best, other = data["plans"]
    assert (best["max_num_seqs"], other["max_num_seqs"]) == (32, 2)
    assert best["replicas"] == 1 < other["replicas"]
    assert best["attainment"] >= 0.99
    assert best["load_per_replica"] > other["load_per_replica"]
    assert len(best["curve"]) == 9
    assert main(arguments) == 0
    assert "need 1 replica: machine, 32 sequences" in capsys.readouterr().out.replace("\n", " ")


def test_who_would_be_late_is_refused(capsys, profile):
    """More than the machine takes: either nearly all come late, or many are refused."""
    arguments = ["simulate", "--workload", "chat", "--requests", "400", "--scale", "0.2"]
    arguments += ["--rate", "120", "--profile", profile, "--kv-tokens", "2000", "--ttft", "3"]

    def summary(name: str, *more: str) -> float:
        """The mean of four traces: who is in time on one of them hangs on when who arrives."""
        found = []
        for seed in range(4):
            assert main([*arguments, *more, "--seed", str(seed), "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out)["policies"]["past-future"][name])
        return sum(found) / len(found)

    late = "--refuse-late"
    assert summary("refused") == 0 < summary("refused", late)
    assert summary("ttft_p50", late) < 3 < summary("ttft_p50")
    assert summary("goodput_requests", late) > 1.2 * summary("goodput_requests")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--trace", "none.jsonl"], "none.jsonl: No such file or directory."),
        (["--profile", "none.json"], "none.json: No such file or directory."),
        (["--ttft", "0"], "the ttft target must be a positive number of seconds."),
        (["--mtpot", "nan"], "the mtpot target must be a positive number of seconds."),
        (["--kv-tokens", "3"], "--kv-tokens must hold at least one page of --page-size."),
        (["--max-num-seqs", "0"], "max_num_seqs must be at least 1."),
        (["--watermark", "2"], "the watermark must be in [0, 1), not 2.0."),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "plan"])
def test_bad_arguments_are_one_sentence(capsys, profile, trace, command, change, sentence):
    arguments = [command, "--trace", trace, "--profile", profile, "--kv-tokens", "4000"]
    assert main([*arguments, *change]) == 1
    assert capsys.readouterr().err == f"foresight: {sentence}\n"


def test_bad_files_are_one_sentence(capsys, profile, trace, tmp_path):
    bad = tmp_path / "bad"
    bad.write_text((LINE % 1) + (LINE % -1))
    common = ["--kv-tokens", "4000"]
    assert main(["simulate", "--trace", str(bad), "--profile", profile, *common]) == 1
    assert capsys.readouterr().err == f"foresight: {bad}: line 2: arrival must not be negative.\n"
    assert main(["simulate", "--trace", trace, "--profile", str(bad), *common]) == 1
    assert capsys.readouterr().err.startswith(f"foresight: {bad}: the profile is not JSON")


def test_impossible_targets_are_one_sentence(capsys, profile, trace):
    common = ["--trace", trace, "--profile", profile, "--kv-tokens", "4000", "--ttft", "0.001"]
    assert main(["simulate", *common]) == 1
    error = capsys.readouterr().err
    assert error.startswith("foresight: no request of the trace can meet the targets: ")
    assert "more than the TTFT target of 0.001 s" in error
    assert main(["plan", *common]) == 1
    assert capsys.readouterr().err.startswith("foresight: no configuration meets the targets: ")
    assert main(["plan", *common, "--attainment", "1.5"]) == 1
    assert capsys.readouterr().err == "foresight: --attainment must be above 0 and at most 1.\n"
