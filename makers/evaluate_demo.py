"""Measure the bundled models: held-out loss, right answers, draft acceptance, recall by length.

    python -m makers.evaluate_demo
    python -m makers.evaluate_demo --target DIR --draft DIR --questions 50

It prints a table and, as its last line, one JSON object. The questions are about names the models
were trained on, in wordings that they never saw; the held-out texts and names were not trained on.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from makers import demo_questions as q
from makers.demo_data import Corpus, Mixture, ask, check_python
from makers.demo_facts import Fact
from makers.demo_recall import lookup, needles

CHAIN = 4  # drafted tokens per verification
Rows = list[dict[str, Any]]


@dataclass
class Bench:
    """Both models, the data, and the rows measured so far."""

    target: Any
    draft: Any
    tokenizer: Tokenizer
    corpus: Corpus
    seed: int
    rows: Rows = field(default_factory=list)

    def report(self, metric: str, value: float, target: float | None = None) -> None:
        """Keep and print one row; `target` is the least value wanted."""
        met = None if target is None else value >= target
        self.rows.append({"metric": metric, "value": round(value, 4), "target": target, "met": met})
        wanted = "" if target is None else f"   wanted >= {target}: {'met' if met else 'MISSED'}"
        print(f"{metric:<62} {value:8.3f}{wanted}", flush=True)

    def prompt(self, question: str) -> list[int]:
        """A question as the chat template writes it."""
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        return list(self.tokenizer.encode(text).ids)


def gumbel(seed: int, row: int, steps: int, vocab: int) -> Tensor:
    """The noise [steps, vocab] of one sequence, the same for target and draft."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
    u = torch.rand(steps, vocab, generator=generator).clamp(1e-9, 1 - 1e-7)
    return -torch.log(-torch.log(u))


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    steps: int,
    ends: set[int],
    noise: Sequence[Tensor] | None = None,
) -> list[list[int]]:
    """Continue prompts, padded on the left, greedily or with added noise (temperature 1)."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = None
    made: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for step in range(steps):
        out = model(
            tokens,
            attention_mask=mask,
            position_ids=places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        logits = out.logits[:, -1].float()
        if noise is not None:
            logits = logits + torch.stack([n[step] for n in noise])
        chosen = logits.argmax(-1)
        for i, token in enumerate(chosen.tolist()):
            if not done[i]:
                made[i].append(token)
                done[i] = token in ends
        if all(done):
            break
        tokens = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        places = places[:, -1:] + 1
    return made


def in_groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive groups of at most `size`."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def ends_of(bench: Bench) -> set[int]:
    """The ids that end an answer."""
    return {bench.tokenizer.encode(t).ids[0] for t in ("<|im_end|>", "<|endoftext|>")}


@torch.no_grad()
def held_out_loss(bench: Bench) -> None:
    """Nats per token and per byte on texts that were not trained on, and on held-out wordings."""
    rng = Random(f"{bench.seed}/loss")
    mixture = Mixture(bench.corpus, bench.tokenizer)
    asked = [
        mixture.render([(ask(rng, f, q.HELD_OUT), f.answer)])
        for f in rng.sample(bench.corpus.facts, 200)
    ]
    for name in ("target", "draft"):
        model = getattr(bench, name)
        nats = count = size = 0.0
        for text in bench.corpus.unseen_texts:
            ids = bench.tokenizer.encode(text[:12_000]).ids[:1025]
            logits = model(torch.tensor([ids[:-1]])).logits.float()[0]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            nats += float(loss)
            count += len(ids) - 1
            size += len(bench.tokenizer.decode(ids[1:]).encode())
        bench.report(f"{name}: held-out text, nats per token", nats / count)
        bench.report(f"{name}: held-out text, nats per byte", nats / size)
        nats = count = 0.0
        for ids, weights in asked:
            logits = model(torch.tensor([ids[:-1]])).logits.float()[0]
            loss = torch.nn.functional.cross_entropy(
                logits, torch.tensor(ids[1:]), reduction="none"
            )
            keep = torch.tensor(weights[1:]) == 1.0
            nats += float(loss[keep].sum())
            count += int(keep.sum())
        bench.report(f"{name}: answers to held-out wordings, nats per token", nats / count)


def sample_questions(bench: Bench, count: int) -> list[tuple[str, Fact]]:
    """Names that were trained on, in wordings that were not."""
    rng = Random(f"{bench.seed}/questions")
    facts = rng.sample(bench.corpus.facts, count)
    return [(ask(rng, fact, q.HELD_OUT), fact) for fact in facts]


def right_answers(bench: Bench, count: int, show: int) -> None:
    """The share of answers that begin with the right first sentence, greedily."""
    asked = sample_questions(bench, count)
    for name, wanted in (("target", 0.7), ("draft", None)):
        right = 0
        told = []
        for group in in_groups(asked, 50):
            prompts = [bench.prompt(question) for question, _ in group]
            made = generate(getattr(bench, name), prompts, 90, ends_of(bench))
            for (question, fact), ids in zip(group, made, strict=True):
                answer = bench.tokenizer.decode(ids)
                hit = answer.startswith(fact.sentences[0])
                right += hit
                if not hit:
                    told.append(f"  {question}\n    said   {answer}\n    wanted {fact.answer}")
        bench.report(
            f"{name}: right first sentence, {count} held-out wordings", right / count, wanted
        )
        print("\n".join(told[:show]), end="\n" if told[:show] else "")


@torch.no_grad()
def acceptance(bench: Bench, kind: str, prompts: Sequence[list[int]], steps: int) -> None:
    """How many of `CHAIN` drafted tokens the target accepts, greedily and with coupled noise."""
    vocab = bench.target.config.vocab_size
    for label, sampled in (("greedy", False), ("temperature 1", True)):
        noise = [gumbel(bench.seed, i, steps, vocab) for i in range(len(prompts))]
        survived = [0] * CHAIN
        chains = 0
        for start in range(0, len(prompts), 50):
            part = prompts[start : start + 50]
            used = noise[start : start + 50] if sampled else None
            made = generate(bench.target, part, steps, ends_of(bench), used)
            for i, (prompt, ids) in enumerate(zip(part, made, strict=True)):
                logits = bench.draft(torch.tensor([prompt + ids[:-1]])).logits.float()
                guesses = logits[0, len(prompt) - 1 :]
                if used is not None:
                    guesses = guesses + used[i][: len(ids)]
                same = (guesses.argmax(-1) == torch.tensor(ids)).tolist()
                at = 1  # the first token comes with the prompt's own pass
                # Only whole chains count: one cut short by the end says nothing about its tail.
                while at + CHAIN <= len(ids):
                    length = next((j for j in range(CHAIN) if not same[at + j]), CHAIN)
                    for j in range(length):
                        survived[j] += 1
                    chains += 1
                    at += length + 1
        for j in range(CHAIN):
            bench.report(
                f"acceptance, {kind}, {label}: at least {j + 1} of {CHAIN}",
                survived[j] / max(1, chains),
            )
        bench.report(
            f"acceptance, {kind}, {label}: mean accepted of {CHAIN}", sum(survived) / max(1, chains)
        )


def recall_by_length(bench: Bench, lengths: Sequence[int], count: int) -> None:
    """Needles and look-ups answered exactly, by length of the prompt."""
    mixture = Mixture(bench.corpus, bench.tokenizer)
    for length in lengths:
        for name, task in (("needle", needles), ("key-value look-up", lookup)):
            rng = Random(f"{bench.seed}/recall/{length}/{name}")
            right = made = 0
            size = length
            while made < count:
                question, answer = task(rng, partial(mixture.filler, rng), size)[0]
                prompt = bench.prompt(question)
                if not 0.75 * length <= len(prompt) <= length:
                    # Characters per token vary with the text: steer towards the wanted length.
                    size = min(2 * length, max(length // 4, size * length // (len(prompt) + 1)))
                    continue
                made += 1
                ids = generate(bench.target, [prompt], 40, ends_of(bench))[0]
                right += bench.tokenizer.decode(ids) == answer
            bench.report(f"target: {name} in {length} tokens, exact", right / count)


def commit() -> str:
    """The commit of the working tree, or "unknown"."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, default=Path("assets/demo/target"))
    parser.add_argument("--draft", type=Path, default=Path("assets/demo/draft"))
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 2048, 4096, 8100])
    parser.add_argument("--recall", type=int, default=10, help="tasks of a kind and length")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of questions and noise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--any-python", action="store_true", help="accept another CPython's text")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    check_python(args.any_python)
    torch.set_num_threads(args.threads)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        for path in (args.target, args.draft)
    ]
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    bench = Bench(models[0], models[1], tokenizer, Corpus.load(), args.seed)
    held_out_loss(bench)
    right_answers(bench, args.questions, args.show)
    asked = [bench.prompt(question) for question, _ in sample_questions(bench, 100)]
    acceptance(bench, "answers", asked, 64)
    texts = [tokenizer.encode(t[:3000]).ids for t in bench.corpus.unseen_texts]
    stretches = [t[i : i + 64] for t in texts for i in range(0, len(t) - 64, 128)][:50]
    acceptance(bench, "held-out text", stretches, 64)
    recall_by_length(bench, args.lengths, args.recall)
    machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
    result = {
        "benchmark": "demo_model",
        "machine": machine,
        "commit": commit(),
        "rows": bench.rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
