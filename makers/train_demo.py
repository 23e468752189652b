"""Train the bundled target or draft model from the text that ships with CPython.

    python -m makers.train_demo target --work build/demo --out assets/demo/target
    python -m makers.train_demo draft --work build/demo --out assets/demo/draft
    python -m makers.train_demo plot --work build/demo --out docs/benchmarks

Training is deterministic given the seed and the number of threads, writes a checkpoint every few
minutes, and continues from it exactly. The schedule is measured in tokens: a warm-up, a constant
part, and a linear decay to zero over the last `--decay` tokens. `--cooldown N`, on resuming, starts
that decay at once and ends N tokens later.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from makers.demo_data import (
    END,
    FACTS_FIRST,
    LAST,
    STOP,
    Corpus,
    Mixture,
    check_python,
    save_tokenizer,
    train_tokenizer,
)
from makers.demo_model import SHAPES, DemoModel, export
from makers.muon import Optimizer

CHAT = (48, 128)  # rows and length of the part of every step that is conversations
WARMUP = 300_000  # tokens
EVALUATE = 100  # steps between held-out losses
COUNTS = ("step", "tokens")


def parts(step: int, staged: bool) -> list[tuple[str, int, int]]:
    """The parts of a step: a name, rows and length.

    Conversations are learned first; then, for the target, every third step is text and recall
    alone, until the last part. Most of that is short and little of it long, because attention over
    a long row costs several times what the rest does.
    """
    made = []
    if step % 3 < 2 or not staged or not FACTS_FIRST <= step < LAST:
        made.append(("chat", *CHAT))
    if step % 64 == 63:
        made.append(("other", 1, 8192))
    elif step % 16 == 7:
        made.append(("other", 1, 4096))
    else:
        made.append(("other", 2, 1024) if step % 4 == 1 else ("other", 4, 512))
    if len(made) == 1:
        made.append(("more", 2, 1024) if step % 4 == 3 else ("more", 4, 512))
    return made


@dataclass
class Schedule:
    """Learning rate by tokens seen."""

    total: int
    decay: int

    def scale(self, done: int) -> float:
        """The factor in (0, 1] of the learning rates after `done` tokens."""
        return max(0.0, min(1.0, (done + 8192) / WARMUP, (self.total - done) / self.decay))


def tokenizer_of(work: Path, corpus: Corpus, vocab: int) -> Tokenizer:
    """The tokenizer in the work folder, trained there first if missing."""
    path = work / "tokenizer.json"
    if not path.exists():
        train_tokenizer(corpus, vocab).save(str(path))
    return Tokenizer.from_file(str(path))


@torch.no_grad()
def held_out(model: DemoModel, mixture: Mixture) -> float:
    """Nats per token on the beginnings of the texts that are not trained on."""
    rows = [mixture.tokenizer.encode(t).ids[:513] for t in mixture.corpus.unseen_texts]
    total, count = 0.0, 0
    for ids in rows:
        x = torch.tensor([ids])
        total += float(model(x[:, :-1], x[:, 1:], torch.ones(1, len(ids) - 1)))
        count += len(ids) - 1
    return total / count


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint so that a crash midway leaves the old one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def train(args: argparse.Namespace) -> None:
    """Run or continue one training."""
    check_python(args.any_python)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[args.what]
    corpus = Corpus.load(args.seed)
    tokenizer = tokenizer_of(args.work, corpus, shape.vocab)
    mixture = Mixture(corpus, tokenizer, args.seed, staged=args.what == "target")
    model = DemoModel(shape)
    optimizer = Optimizer(model, args.lr, args.adam_lr)
    schedule = Schedule(args.tokens, args.decay or int(args.tokens * 0.5))
    step = done = 0
    checkpoint = args.work / f"{args.what}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, done = state["step"], state["done"]
        if args.cooldown:
            schedule = Schedule(done + args.cooldown, args.cooldown)
        elif not args.reschedule:
            schedule = Schedule(state["total"], state["decay"])
        print(f"continuing at step {step}, {done:,} tokens of {schedule.total:,}", flush=True)
    # Four shapes of input, each compiled once; the rare long ones are not worth a compilation.
    fast: Any = torch.compile(model, dynamic=False) if args.compile else model
    eos = [tokenizer.encode(token).ids[0] for token in (STOP, END)]
    log = (args.work / f"{args.what}.jsonl").open("a")

    def keep() -> None:
        save(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "done": done,
                "total": schedule.total,
                "decay": schedule.decay,
            },
        )
        export(model, args.out, eos, eos[1])
        save_tokenizer(tokenizer, args.out)

    print(
        f"{args.what}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{len(corpus.facts)} facts, {schedule.total:,} tokens",
        flush=True,
    )
    started, began, saved = time.monotonic(), done, time.monotonic()
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.append(number))
    while done < schedule.total:
        losses = {}
        batches = [mixture.batch(step, *part) for part in parts(step, mixture.staged)]
        weight = sum(float(w.sum()) for *_, w in batches)
        for (name, *_), (tokens, targets, weights) in zip(
            parts(step, mixture.staged), batches, strict=True
        ):
            call = fast if tokens.shape[1] <= 1024 else model
            loss = call(tokens, targets, weights)
            (loss / weight).backward()
            losses[name] = float(loss.detach()) / float(weights.sum().clamp(min=1))
        optimizer.step(schedule.scale(done))
        done += sum(t.numel() for t, *_ in batches)
        step += 1
        record: dict[str, Any] = {"step": step, "tokens": done} | losses
        if step % EVALUATE == 0 or done >= schedule.total:
            record["held_out"] = held_out(model, mixture)
        log.write(json.dumps(record) + "\n")
        if step % 10 == 0 or "held_out" in record:
            log.flush()
            rate = (done - began) / (time.monotonic() - started)
            left = (schedule.total - done) / rate / 60
            told = "  ".join(f"{k} {v:.3f}" for k, v in record.items() if k not in COUNTS)
            print(
                f"step {step:5d}  {done / 1e6:6.2f}M  {rate:5.0f}/s  {left:5.1f} min left  {told}",
                flush=True,
            )
        if time.monotonic() - saved > args.save_every * 60 or stopped:
            keep()
            saved = time.monotonic()
        if stopped:
            print("stopped; the same command continues", flush=True)
            return
    keep()
    print(f"done: {args.out}", flush=True)


def plot(work: Path, out: Path) -> None:
    """Draw the loss curves of both models from their logs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "foresight"
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for axis, what in zip(axes, ("target", "draft"), strict=True):
        path = work / f"{what}.jsonl"
        if not path.exists():
            continue
        rows = {r["step"]: r for r in map(json.loads, path.read_text().splitlines())}
        steps = sorted(rows)
        for name, label in (("chat", "conversations, answers only"), ("other", "text and recall")):
            mean, points, curve = 0.0, [], []
            for row in (rows[s] for s in steps if name in rows[s]):
                points.append(row["tokens"] / 1e6)
                mean += (row[name] - mean) / min(len(points), 20)
                curve.append(mean)
            axis.plot(points, curve, label=label, lw=1)
        seen = [rows[s] for s in steps if "held_out" in rows[s]]
        axis.plot(
            [r["tokens"] / 1e6 for r in seen],
            [r["held_out"] for r in seen],
            label="held-out text",
            lw=1,
        )
        axis.set(title=what, xlabel="million tokens", ylim=(0, 6))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("nats per token")
    figure.tight_layout()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "demo_model_loss.svg", metadata={"Date": None})


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*SHAPES, "plot"], help="the model to train, or its curves")
    parser.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="checkpoints and logs"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="length of the schedule")
    parser.add_argument("--decay", type=int, default=0, help="tokens of the decay (default: half)")
    parser.add_argument(
        "--reschedule",
        action="store_true",
        help="on resuming, follow --tokens and --decay rather than the checkpoint's",
    )
    parser.add_argument(
        "--cooldown",
        type=int,
        default=0,
        metavar="N",
        help="on resuming, decay to zero over the next N tokens",
    )
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--adam-lr", type=float, default=4e-3, help="AdamW's learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=float, default=5, metavar="MINUTES")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--any-python", action="store_true", help="accept another CPython's text")
    args = parser.parse_args()
    if args.what == "plot":
        plot(args.work, args.out)
    else:
        train(args)


if __name__ == "__main__":
    main()
