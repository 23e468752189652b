"""The bundled model in our engine against the transformers library, and enlarged against itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.llm import LLM
from makers.enlarge import Size, enlarge
from scheduler.request import SamplingParams
from tests.e2e.serving import REPOSITORY

TARGET = REPOSITORY / "assets" / "demo" / "target"
TOKENS = 16
FUNCTIONS = (
    "os.path.join, os.listdir, os.getcwd, os.walk, shutil.copyfile, glob.glob, json.dumps, "
    "json.loads, re.match, re.sub, time.sleep, time.time, random.choice, random.shuffle, "
    "math.sqrt, math.gcd, len, sorted, map, zip, str.split, str.strip, list.append, dict.get, "
    "itertools.chain, functools.reduce, collections.Counter, threading.Thread, subprocess.run, "
    "socket.socket"
)
PROMPTS = (
    [f"What does {name} do?" for name in FUNCTIONS.split(", ")]
    + [f"import {name}\n" for name in ("os", "sys", "re", "json", "math", "time", "ast", "io")]
    + [f"def {name}(self, " for name in ("read", "write", "open", "close", "get", "put", "run")]
    + ["The", "A class that", "for i in range(", "return", "if __name__ ==", "Hello", "raise"]
)[:50]


def test_there_are_fifty_prompts() -> None:
    assert len(set(PROMPTS)) == 50


@pytest.fixture(scope="module")
def expected() -> list[tuple[list[int], list[int]]]:
    """Prompts and their greedy continuations by transformers' generate, in fp32, one at a time."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TARGET)
    model = transformers.AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    ends = set(model.generation_config.eos_token_id)
    found = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            if prompt.endswith("?"):
                chat = [{"role": "user", "content": prompt}]
                prompt = tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True
                )
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            out = model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
            new = out[0, ids.shape[1] :].tolist()
            found.append((ids[0].tolist(), [token for token in new if token not in ends]))
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["torch", "native"])
def ours(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """`deterministic` waits for the native kernels instead of starting without them."""
    cache = str(REPOSITORY / ".pytest_cache" / "foresight")
    options = {"compile": request.param, "deterministic": request.param, "cache_dir": cache}
    with LLM(str(TARGET), dtype="float32", device="cpu", max_num_seqs=16, **options) as llm:
        yield llm


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_greedy_tokens_equal_those_of_transformers(
    ours: LLM, expected: list[tuple[list[int], list[int]]]
) -> None:
    params = SamplingParams(max_tokens=TOKENS, temperature=0)
    completions = ours.generate([ids for ids, _ in expected], params)
    for (ids, theirs), completion in zip(expected, completions, strict=True):
        assert completion.prompt_tokens == tuple(ids)
        assert list(completion.choices[0].tokens) == theirs
    assert sum(len(theirs) for _, theirs in expected) > 400


@pytest.mark.slow
def test_enlarged_checkpoint_writes_the_same_text(tmp_path: Path) -> None:
    large = Size(hidden=512, layers=8, heads=16, kv_heads=8, intermediate=1024, vocab=4608)
    enlarge(TARGET, tmp_path / "large", large, dtype="float32")
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=0)
    found = []
    for model in (TARGET, tmp_path / "large"):
        with LLM(str(model), dtype="float32", device="cpu", compile=False, num_pages=600) as llm:
            found.append(llm.generate(PROMPTS[:10], params))
    for small, big in zip(*found, strict=True):
        assert small.choices[0].tokens == big.choices[0].tokens
        assert [p.logprob for p in small.choices[0].logprobs] == pytest.approx(
            [p.logprob for p in big.choices[0].logprobs], abs=2e-3
        )
