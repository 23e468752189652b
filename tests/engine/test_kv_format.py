"""A server of every KV format: built, budgeted, and kept apart from the others."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
import torch

from engine.build import build_worker
from engine.config import CacheConfig
from engine.errors import StartupError
from engine.llm import LLM
from kernels.cpu.ops import NativeOps
from kernels.kv.balance import Balance
from kernels.kv.calibration import Calibration
from kernels.kv.presets import AUTO, HALVES, NAMES, SEALED
from kernels.kv.scales import HeadScales
from scheduler.request import SamplingParams
from tests.e2e.serving import REPOSITORY
from tests.engine.test_build import CACHE, build, greedy
from tests.models.checkpoints import save

DEMO = REPOSITORY / "assets" / "demo" / "target"
FORMATS = [name for name in NAMES if name != "int4h64"]  # heads of 32 have no groups of 64


def needs(kv_format: str) -> dict[str, object]:
    """Options: sealed pages are of at least 32 tokens, and heads."""
    return {"kv_format": kv_format, "page_size": 32 if kv_format in SEALED else 16}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("gpt_neox", {"num_key_value_heads": None}),  # by the transformers library
    ],
)
def test_eight_bits_say_the_same_in_torch_and_in_native_code(
    tmp_path: Path, model_type: str, changes: dict
) -> None:
    """And as dense pages do, at first: random models choose between words hardly apart."""
    save(tmp_path, model_type, **changes)
    dense, eight = greedy(*build(tmp_path)), greedy(*build(tmp_path, kv_format="int8n"))
    assert eight[0] == dense[0]
    native = build(tmp_path, kv_format="int8n", compile=True, cache_dir=CACHE)
    assert greedy(*native) == eight


@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_format_serves(tmp_path: Path, kv_format: str) -> None:
    save(tmp_path, "llama", head_dim=32)
    worker, limits = build(tmp_path, **needs(kv_format), compile=True, cache_dir=CACHE)
    assert len(greedy(worker, limits)) == 12
    worker.close()


@pytest.mark.parametrize(
    ("kv_format", "sentence"),
    [
        ("turbo4", "native kernels do not read codes of l4"),
        ("oscar2", "native kernels do not read pages of format sealed-a2g32"),
    ],
)
def test_pages_that_native_code_does_not_read_are_said_and_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kv_format: str, sentence: str
) -> None:
    save(tmp_path, "llama", head_dim=32)
    # `deterministic` waits for the native kernels.
    options = {"compile": True, "deterministic": True, "cache_dir": CACHE}
    worker, _ = build(tmp_path, **needs(kv_format), **options)
    assert worker._runner.name == "torch"
    assert sentence in caplog.text
    worker.close()


def test_the_same_bytes_hold_more_pages(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    pages = {}
    near = {"kv_window": 128, "kv_sink": 64}
    for name, more in ((AUTO, {}), ("int8n", {}), ("int4h", {}), ("k4v2h", {}), ("windows", near)):
        kv_format = "k4v2h" if name == "windows" else name
        options = {"kv_format": kv_format, "kv_bytes": 4_000_000, "num_pages": None}
        worker, limits = build(tmp_path, **options, **more)
        pages[name] = limits.num_pages
        assert sum(layer.nbytes for layer in worker.kv) <= 4_000_000
        worker.close()
    assert pages[AUTO] < pages["int8n"] < pages["int4h"] < pages["k4v2h"]
    assert pages["windows"] < pages["k4v2h"], "dense pages are paid for"


def test_pages_of_different_formats_have_different_hashes(tmp_path: Path) -> None:
    save(tmp_path / "model", "llama", head_dim=32)
    roots = set()
    for name in (AUTO, *FORMATS):
        worker, limits = build(tmp_path / "model", **needs(name))
        roots.add(limits.hash_root)
        worker.close()
    assert len(roots) == len(FORMATS) + 1
    means, nothing = torch.zeros(3, 2, 32), Balance.nothing((3, 2, 32))
    for calibration in (
        Calibration("int4h", (0,), means, nothing),
        Calibration("int4h", (1,), means, nothing),
        Calibration("int4h", (1,), means + 1, nothing),
        Calibration("int4h", (1,), means + 1, Balance(nothing.keys + 1, nothing.values)),
    ):
        (tmp_path / "kv.json").write_text(calibration.dump())
        calibrated = {"kv_format": "int4h", "kv_calibration": str(tmp_path / "kv.json")}
        worker, limits = build(tmp_path / "model", **calibrated)
        roots.add(limits.hash_root)
        worker.close()
    assert len(roots) == len(FORMATS) + 5
    heads = torch.zeros(3, 2, dtype=torch.int64)
    for scales in (HeadScales(heads, heads), HeadScales(heads, heads + 1)):
        (tmp_path / "kv.json").write_text(Calibration("fp8", (), means, nothing, scales).dump())
        calibrated = {"kv_format": "fp8", "kv_calibration": str(tmp_path / "kv.json")}
        worker, limits = build(tmp_path / "model", **calibrated)
        roots.add(limits.hash_root)
        worker.close()
    assert len(roots) == len(FORMATS) + 7


def test_windows_are_the_user_s_to_choose(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    roots = set()
    for window, sink in ((128, 64), (32, 8), (32, 0), (0, 8), (0, 0)):
        windows = {"kv_window": window, "kv_sink": sink}
        worker, limits = build(tmp_path, kv_format="k4v2h", **windows)
        assert limits.prefix_block == window
        assert (worker._slots.windows is None) == (not window and not sink)
        roots.add(limits.hash_root)
        worker.close()
    assert len(roots) == 5


@pytest.mark.parametrize("kv_format", FORMATS)
def test_no_format_has_windows_unasked_but_what_is_sealed(tmp_path: Path, kv_format: str) -> None:
    save(tmp_path, "llama", head_dim=32)
    worker, limits = build(tmp_path, **needs(kv_format))
    assert (worker._slots.windows is None) == (kv_format not in SEALED)
    assert limits.prefix_block == (32 if kv_format in SEALED else 0)
    worker.close()


@pytest.mark.parametrize("kv_format", ["k4v2h", "int2h"])
def test_windows_serve_in_native_code(tmp_path: Path, kv_format: str) -> None:
    save(tmp_path, "llama")
    windows = {"kv_window": 128, "kv_sink": 64}
    # `deterministic` waits for the native kernels.
    options = {"kv_format": kv_format, "compile": True, "deterministic": True, "cache_dir": CACHE}
    worker, limits = build(tmp_path, **options, **windows)
    assert worker._runner.name == NativeOps.name
    assert len(greedy(worker, limits)) == 12
    worker.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kv_window": 64}, "windows are kept dense beside packed pages, and these are dense"),
        ({"kv_format": "int4h", "kv_window": 40}, "a window of 40 tokens is no multiple of a page"),
        ({"kv_format": "int4h", "kv_sink": -1}, "are less than none"),
        ({"kv_format": "oscar2"}, "a page, which has 16: set --page-size to a multiple of 32."),
        ({**needs("oscar2"), "kv_window": 0}, "leave --kv-window out, or set it to a multiple"),
        ({**needs("oscar2"), "kv_window": 48}, "a window of 48 tokens is no multiple of a page"),
        ({**needs("oscar2")}, "oscar2 does not fit this model: 16 numbers"),
        ({**needs("oscar2"), "drafters": ("coarse",)}, "with --kv-format int8n or k8v4"),
    ],
)
def test_windows_that_cannot_be_are_refused(tmp_path: Path, options: dict, sentence: str) -> None:
    save(tmp_path, "llama")
    with pytest.raises(StartupError, match=sentence):
        build(tmp_path, **options)


@pytest.mark.parametrize("windows", [{}, {"kv_window": 32, "kv_sink": 8}], ids=["", "windows"])
@pytest.mark.parametrize("compiled", [False, True])
def test_drafts_by_half_of_the_bits_through_the_whole_engine(compiled: bool, windows: dict) -> None:
    """In torch and in native code."""
    options = {"kv_format": "int8n", "compile": compiled, "cache_dir": CACHE, "num_pages": 200}
    options |= windows
    texts = {}
    for drafters in ((), ("coarse",)):
        with LLM(
            str(DEMO),
            dtype="float32",
            drafters=drafters,
            fixed_draft_tokens=5 if drafters else None,
            max_model_len=1024,
            max_num_seqs=4,
            **options,
        ) as llm:
            prompts = [llm.tokenize(text) for text in ("def main(", "The list is", "import os")]
            params = [
                SamplingParams(max_tokens=40, temperature=t, seed=i)
                for i, t in enumerate((0.0, 1.0, 0.7))
            ]
            done = llm.generate(prompts, params, ignore_eos=True)
            texts[drafters] = [completion.choices[0].tokens for completion in done]
            load = llm.load()
            if drafters:
                assert load.accepted_tokens > 0.5 * load.draft_tokens > 20
    assert texts[()] == texts["coarse",]


def test_the_configuration_knows_every_preset() -> None:
    (choices,) = [f.metadata["choices"] for f in fields(CacheConfig) if f.name == "kv_format"]
    assert choices == (AUTO, *NAMES)
    assert HALVES == ("int8n", "k8v4")


@pytest.mark.parametrize(
    "options",
    [{"kv_format": "int4h64"}, {**needs("oscar2"), "kv_sink": 40, "deterministic": True}],
    ids=["int4h64", "oscar2"],
)
def test_large_groups_give_the_text_of_one_request_alone(options: dict) -> None:
    """As `tests/e2e/test_kv_formats.py` for the others, whose model has heads and pages too small
    for these."""
    options = {"dtype": "float32", "cache_dir": CACHE, "num_pages": 200, **options}
    prompts = ["def main(", "def main(arguments: list[str]) -> int:", "import os\n" * 30]
    params = [
        SamplingParams(max_tokens=30, temperature=t, seed=i) for i, t in enumerate((0.0, 1.0, 0.7))
    ]
    patient = partial(build_worker, patient=True)
    with LLM(str(DEMO), builder=patient, max_model_len=512, drafters=(), **options) as llm:
        ids = [llm.tokenize(text) for text in prompts]
        alone = [
            llm.generate([one], [p], ignore_eos=True)[0].choices[0].tokens
            for one, p in zip(ids, params, strict=True)
        ]
    options |= {"max_step_tokens": 24, "max_num_seqs": 4, "fixed_draft_tokens": 3}
    longest = max(map(len, ids)) + 30
    # The null page, and room for the longest and a page more: some are paused.
    room = 2 + -(-longest // options.get("page_size", 16))
    tight = {"num_pages": room, "policy": "aggressive", "watermark": 0.0}
    for more in ({"max_model_len": 512}, {"max_model_len": longest, **tight}):
        options |= more
        with LLM(str(DEMO), builder=patient, drafters=("suffix",), **options) as llm:
            for _ in range(2):  # the second time with prefix hits
                done = llm.generate(ids, params, ignore_eos=True)
                assert [completion.choices[0].tokens for completion in done] == alone
            load = llm.load()
            assert load.draft_tokens > 0
            assert load.prefix_hits > 0
            assert (load.preemptions > 0) == ("policy" in more)
