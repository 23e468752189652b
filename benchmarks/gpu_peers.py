"""Other engines on the same GPU and the same checkpoint, each in a process of its own.

    PYTHONPATH=SITE python -m benchmarks.gpu_peers vllm --model FOLDER --points 1:512:128,32:512:128
    python -m benchmarks.gpu_peers transformers --model FOLDER --points 1:512:128

A point is requests:prompt tokens:output tokens; all requests come at once, greedily, and end at
their length. Weights are random. One JSON object a point: `{"engine", "point", "tokens_per_s"}`.
Written after the peers' documentation; not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

Generate = Callable[[list[list[int]], int], int]  # prompts, output tokens -> tokens made


def vllm(model: Path, length: int, requests: int) -> tuple[str, Generate]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model=str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=length,
        max_num_seqs=requests,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], outputs: int) -> int:
        params = SamplingParams(
            temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False
        )
        made = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in made)

    return f"vllm {importlib.metadata.version('vllm')}", generate


def transformers(model: Path, length: int, requests: int) -> tuple[str, Generate]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(model)
    with torch.device("cuda"):
        made = AutoModelForCausalLM.from_config(
            config, attn_implementation="paged|sdpa", dtype=torch.bfloat16
        ).eval()

    def generate(prompts: list[list[int]], outputs: int) -> int:
        generation = GenerationConfig(
            max_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        done = made.generate_batch(inputs=prompts, generation_config=generation, progress_bar=False)
        return sum(len(output.generated_tokens) for output in done.values())

    return f"transformers {importlib.metadata.version('transformers')}", generate


ENGINES = {"vllm": vllm, "transformers": transformers}


def parse_points(text: str) -> list[tuple[int, int, int]]:
    """`1:512:128,32:512:128` -> requests, prompt tokens, output tokens of each."""
    points = []
    for point in text.split(","):
        requests, prompt, output = (int(part) for part in point.split(":"))
        points.append((requests, prompt, output))
    return points


def prompts_for(requests: int, tokens: int, vocab: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocab // 2) for _ in range(tokens)] for _ in range(requests)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--points", required=True)
    args = parser.parse_args(argv)
    points = parse_points(args.points)
    length = max(prompt + output for _, prompt, output in points) + 16
    name, generate = ENGINES[args.engine](args.model, length, max(point[0] for point in points))
    vocab = json.loads((args.model / "config.json").read_text())["vocab_size"]
    generate(prompts_for(2, 64, vocab), 8)  # warms up
    for requests, prompt, output in points:
        prompts = prompts_for(requests, prompt, vocab)
        started = time.perf_counter()
        made = generate(prompts, output)
        rate = made / (time.perf_counter() - started)
        point = f"{requests}:{prompt}:{output}"
        print(json.dumps({"engine": name, "point": point, "tokens_per_s": rate}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
