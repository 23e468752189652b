"""How many drafts the rules of verification accept: coupled noise, token by token, and by block.

    python -m benchmarks.verification
    python -m benchmarks.verification --length 4 --temperatures 0.7 1

The bundled pair at temperatures above 0, after held-out text and after questions that it has not
seen. A draft model writes `length` tokens, the target reads them, and each rule is asked for the
drafts it expects to accept:

- coupled: draft and target choose with the same noise, and what is equal is accepted. It is what
  this server does; a seed's text is the same with drafts and without.
- by token: speculative sampling (Leviathan et al., arXiv 2211.17192): draft i is accepted with
  probability min(1, p / q).
- by block: block verification (Sun et al., arXiv 2403.10444, algorithm 2): drafts are accepted
  together, never fewer on average than by token. A seed's text then depends on the drafts.

Paths are drawn, the last two expectations over acceptance are exact. What a rule gains is given as
tokens a step, accepted drafts and one more, over coupled noise.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import fmean, stdev

import torch
from torch import Tensor

from benchmarks.divergence import noise_at
from benchmarks.report import Row, json_line, rows_table
from engine.llm import LLM
from kernels.cpu.build import start_build
from kernels.kv.format import DENSE
from makers import demo_questions
from makers.demo_data import Corpus, ask
from models.loader import load_decoder
from worker.kv_quality import Reader

CPU = torch.device("cpu")


def accepted_by_token(p: Tensor, q: Tensor) -> float:
    """p, q: [length] probabilities of the drafts -> how many are expected to be accepted."""
    return float(torch.cumprod((p / q).clamp(max=1.0), 0).sum())


def block_chances(p: Tensor, q: Tensor, after_p: Tensor, after_q: Tensor) -> list[float]:
    """p, q: [length] fp64, of the drafts; after_p, after_q: [length, vocab], of what may follow the
    first i + 1 of them; the last row is not read -> for each prefix of drafts, the chance of its
    own coin. The longest prefix whose coin falls well is taken."""
    length, weight, chances = len(p), 1.0, []
    for i in range(length):
        weight = min(weight * float(p[i] / q[i]), 1.0)
        if i == length - 1:
            chances.append(weight)
            continue
        more = float((weight * after_p[i] - after_q[i]).clamp(min=0.0).sum())
        room = more + 1.0 - weight
        chances.append(more / room if room > 0.0 else 1.0)
    return chances


def accepted_by_block(p: Tensor, q: Tensor, after_p: Tensor, after_q: Tensor) -> float:
    """See `block_chances` -> how many drafts are expected to be accepted."""
    expected, none_longer = 0.0, 1.0
    chances = block_chances(p, q, after_p, after_q)
    for count, chance in reversed(list(enumerate(chances, 1))):
        expected += count * chance * none_longer
        none_longer *= 1.0 - chance
    return expected


class Pair:
    """Both models, read from dense pages."""

    def __init__(self, target: Path, draft: Path, cache: Path | None) -> None:
        ops = start_build(cache).result()
        models = [
            load_decoder(folder, dtype=torch.float32, device=CPU) for folder in (target, draft)
        ]
        self._readers = [Reader(model, ops, torch.float32, CPU) for model in models]

    def after(self, which: int, tokens: Sequence[int], last: int, temperature: float) -> Tensor:
        """[last, vocab] fp64: distributions after the last tokens. 0: target, 1: draft model."""
        reader = self._readers[which]
        formats = [DENSE] * reader.model.spec.num_layers
        found = reader.log_probabilities(tokens, formats)[-last:].double()
        return (found / temperature).softmax(-1)

    def accepted(
        self, context: Sequence[int], length: int, temperature: float, seed: int
    ) -> tuple[float, float, float]:
        """Coupled, by token, by block. The path is drawn with the noise that both share; a draw
        from the draft model it is all the same, so it serves all three."""
        tokens, q, after_q, noises = list(context), [], [], []
        for _ in range(length):
            distribution = self.after(1, tokens, 1, temperature)[0]
            noise = noise_at(seed, len(tokens), len(distribution)).double()
            token = int((distribution.log() + noise).argmax())
            noises.append(noise)
            q.append(distribution[token])
            after_q.append(distribution)
            tokens.append(token)
        p_all = self.after(0, tokens, length + 1, temperature)
        drafts = torch.tensor(tokens[len(context) :])
        p, q_of = p_all[torch.arange(length), drafts], torch.stack(q)
        equal = (p_all[:-1].log() + torch.stack(noises)).argmax(-1) == drafts
        coupled = float(torch.cumprod(equal.double(), 0).sum())
        # What may follow the first i + 1 drafts, by each.
        following = torch.stack([*after_q[1:], after_q[-1]])
        return coupled, accepted_by_token(p, q_of), accepted_by_block(p, q_of, p_all[1:], following)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.verification",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", type=Path, default=Path("assets/demo/target"))
    add("--draft", type=Path, default=Path("assets/demo/draft"))
    add("--length", type=int, default=8, help="drafts a step (8)")
    add("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    add("--contexts", type=int, default=200, help="of each kind (200)")
    add("--cache-dir", type=Path, help="where compiled kernels are kept")
    args = parser.parse_args(argv)
    pair, rng = Pair(args.target, args.draft, args.cache_dir), Random("verification")
    rows: list[Row] = []
    for kind, contexts in contexts_of(args.target, args.contexts, rng).items():
        for temperature in args.temperatures:
            found = [
                pair.accepted(context, args.length, temperature, rng.getrandbits(63))
                for context in contexts
            ]
            rows += judge(f"{kind}, temperature {temperature:g}", found)
    print(rows_table(rows))
    print(json_line("verification", rows))
    return 0


def contexts_of(model: Path, count: int, rng: Random) -> dict[str, list[tuple[int, ...]]]:
    corpus = Corpus.load()
    with LLM(str(model), compile=False, max_num_seqs=1, drafters=()) as llm:
        questions = [
            llm.tokenize_chat(
                [{"role": "user", "content": ask(rng, fact, demo_questions.HELD_OUT)}]
            )
            for fact in rng.sample(corpus.facts, count)
        ]
        texts = [text for text in corpus.unseen_texts if len(text) > 1200]
        starts = [(text, rng.randrange(len(text) - 600)) for text in rng.choices(texts, k=count)]
        pieces = [llm.tokenize(text[at : at + 500])[:96] for text, at in starts]
    return {"text": pieces, "answers": questions}


def judge(name: str, found: Sequence[tuple[float, float, float]]) -> list[Row]:
    """Means, and the gain over coupled noise with twice its standard error either way."""
    coupled = fmean(c for c, _, _ in found)
    rows = [Row(f"{name}: drafts accepted, coupled", coupled)]
    for rule, place in (("by token", 1), ("by block", 2)):
        values = [case[place] for case in found]
        more = [case[place] - case[0] for case in found]
        error = 2 * stdev(more) / len(more) ** 0.5
        gain = 1 + fmean(more) / (1 + coupled)
        reach = error / (1 + coupled)
        rows.append(Row(f"{name}: drafts accepted, {rule}", fmean(values)))
        interval = (gain - reach, gain + reach)
        rows.append(Row(f"{name}: tokens a step, {rule} / coupled", gain, interval=interval))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
