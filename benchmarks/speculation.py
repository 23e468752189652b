"""Speculative decoding against plain decoding of the same engine, in one process and in turns.

    python -m benchmarks.speculation --quick
    python -m benchmarks.speculation --streams 1 4 16 64
    python -m benchmarks.speculation --ahead --drafters model --streams 1 4 --lengths

Three kinds of work, each at temperature 0 and 1: answers to questions in wordings that the bundled
model has not seen, continued text that it has not seen, and questions that were asked before. Modes
take turns within every round: plain, the controller, and fixed lengths of drafts by each drafter.
Before each turn the engine writes a few tokens that do not count: the others have had the caches.
Reported are output tokens per second over plain, and over the best of the fixed ones. Texts are
compared too: a token that differs from plain decoding's is an error, not a statistic. Where that
happens, it is told by how much the score of plain decoding's token was ahead there.

With one stream, text has a bound as well: acceptance by position as it was with the longest drafts,
and the time of a step as it was at each length, give the tokens per second that a length allows.
(Answers end after a few steps, which such a bound leaves out.)

Engines that are equal differ by some per cent for as long as a process lives, and the one made
first is the fastest more often than not. So there are two plain ones, made first and last, and
plain is the geometric mean of both; how they differ is reported.

With --itself the engine of `auto` is also compared with itself, drafts declined by every request,
on prompts of the same kind, which leaves that difference out, and what looking after drafts costs.

With --ahead two more modes: a draft model that always works ahead while its drafts are verified,
and one that never does; `auto` finds out which of the two is better, and must not be slower than
the latter. Reported besides are the share of drafting that nobody waited for, and how often what
was written ahead could be used.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import gettempdir

from benchmarks.divergence import first_divergence
from benchmarks.report import Row, json_line, median_interval, rows_table, table
from engine.build import build_worker
from engine.llm import LLM, WILLING
from makers import demo_questions
from makers.demo_data import Corpus, ask
from scheduler.request import Load, SamplingParams, Speculation

Tokens = tuple[int, ...]
Prompts = list[Tokens]

LENGTHS = (2, 4, 8)  # fixed draft lengths
WORK = ("answers", "text", "again")
NEVER_BELOW = 0.98
AHEAD, TURNS = "always ahead", "taking turns"
ITSELF = "itself without drafts"
PLAIN, LAST = "plain", "plain, made last"


@dataclass(slots=True)
class Run:
    """What one mode made of one round."""

    seconds: float
    tokens: int
    steps: int
    drafted: int
    accepted: int
    draft_seconds: float  # of drafting that the target waited for
    hidden_seconds: float  # and that it did not
    ahead: int  # rows
    foreseen: int

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass(slots=True)
class Mode:
    """One engine, asleep while others are measured."""

    name: str
    llm: LLM
    length: int = 0  # of drafts, where it is fixed
    drafters: tuple[str, ...] = ()
    speculation: Speculation = WILLING
    apart: bool = False  # it shares an engine, where prompts of another mode would be cached ones
    runs: list[Run] = field(default_factory=list)
    by_position: list[int] = field(default_factory=list)  # accepted, since they were last cleared
    drafts: int = 0

    @property
    def rates(self) -> list[float]:
        """Tokens per second of every round."""
        return [run.rate for run in self.runs]

    def clear(self) -> None:
        self.runs, self.by_position, self.drafts = [], [], 0

    def wake(self, prompts: Prompts, params: list[SamplingParams]) -> None:
        """A few tokens, so that the caches hold what is this engine's before anything counts."""
        few = [replace(own, max_tokens=16) for own in params[: len(prompts)]]
        self.llm.generate(prompts, few, ignore_eos=True, speculation=self.speculation)

    def run(self, prompts: Prompts, params: list[SamplingParams], ends: bool) -> list[Tokens]:
        before = self.llm.load()
        started = time.perf_counter()
        done = self.llm.generate(prompts, params, ignore_eos=not ends, speculation=self.speculation)
        seconds = time.perf_counter() - started
        after = self.llm.load()
        texts = [completion.choices[0].tokens for completion in done]
        made = sum(len(completion.choices[0].tokens) for completion in done)
        self.runs.append(
            Run(
                seconds,
                made,
                after.steps - before.steps,
                after.draft_tokens - before.draft_tokens,
                after.accepted_tokens - before.accepted_tokens,
                after.draft_seconds - before.draft_seconds,
                after.ahead_seconds - before.ahead_seconds,
                after.ahead_rows - before.ahead_rows,
                after.foreseen_rows - before.foreseen_rows,
            )
        )
        self._positions(before, after)
        return texts

    def _positions(self, before: Load, after: Load) -> None:
        old = list(before.accepted_by_position)
        new = list(after.accepted_by_position)
        old += [0] * (len(new) - len(old))
        gained = [b - a for a, b in zip(old, new, strict=True)]
        self.by_position += [0] * (len(gained) - len(self.by_position))
        for position, count in enumerate(gained):
            self.by_position[position] += count
        self.drafts += after.drafts - before.drafts

    @property
    def survival(self) -> list[float]:
        """By position: the share of rows with drafts in which it and all before it were right."""
        return [count / self.drafts for count in self.by_position] if self.drafts else []


class Source:
    """Prompts that no two rounds share, but for those asked again."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        corpus = Corpus.load()
        rng = Random("speculation")
        facts = rng.sample(corpus.facts, min(2000, len(corpus.facts)))
        self._questions = [ask(rng, fact, demo_questions.HELD_OUT) for fact in facts]
        self._texts = [text for text in corpus.unseen_texts if len(text) > 1200]
        self._rng = rng
        self._asked = 0

    def take(self, work: str, count: int) -> tuple[Prompts, int, bool]:
        """Prompts, the most tokens of an answer, and whether end tokens end it."""
        encode = self._llm.tokenize
        if work == "text":
            prompts = []
            for _ in range(count):
                text = self._rng.choice(self._texts)
                start = self._rng.randrange(len(text) - 1100)
                prompts.append(encode(text[start : start + 1000])[:128])
            return prompts, 96, False
        if work == "again":
            asked = self._questions[-8:] * (count // 8 + 1)
            return [self._chat(question) for question in asked[:count]], 96, True
        first = self._asked
        self._asked += count
        wrapped = [
            self._questions[i % (len(self._questions) - 8)] for i in range(first, first + count)
        ]
        return [self._chat(question) for question in wrapped], 96, True

    def _chat(self, question: str) -> tuple[int, ...]:
        return self._llm.tokenize_chat([{"role": "user", "content": question}])


def measure(
    modes: Sequence[Mode],
    source: Source,
    work: str,
    streams: int,
    temperature: float,
    rounds: int,
    requests: int,
) -> int:
    """Every mode on the same prompts, round by round. How many texts differed from plain's."""
    for mode in modes:
        mode.clear()
    differing = 0
    for number in range(rounds + 1):
        prompts, most, ends = source.take(work, requests)
        params = [
            SamplingParams(max_tokens=most, temperature=temperature, seed=1000 * number + i)
            for i in range(requests)
        ]
        order = list(modes[number % len(modes) :]) + list(modes[: number % len(modes)])
        texts = {}
        for mode in order:
            own = source.take(work, requests)[0] if mode.apart else prompts
            mode.wake(source.take(work, max(requests // 4, 1))[0], params)
            texts[mode.name] = mode.run(own, params, ends)
        if number == 0:  # warms up, and learns
            for mode in modes:
                mode.clear()
            continue
        for mode in modes:
            if not mode.apart:
                each = zip(prompts, params, texts[PLAIN], texts[mode.name], strict=True)
                parted = [case for case in each if case[2] != case[3]]
                differing += len(parted)
                for case in parted:
                    found = first_divergence(modes[0].llm, *case)
                    print(f"{mode.name} differs from plain: {found}", file=sys.stderr)
    return differing


def ceiling(modes: Sequence[Mode]) -> float:
    """Tokens per second that the best length and drafter allow, prompts included."""
    best = median(plain_rates(modes))
    fixed = [mode for mode in modes if mode.length]
    longest = {mode.drafters: mode for mode in fixed}  # they come by length
    for mode in fixed:
        survival = longest[mode.drafters].survival[: mode.length]
        tokens = sum(run.tokens for run in mode.runs)
        seconds = sum(run.seconds for run in mode.runs)
        steps = sum(run.steps for run in mode.runs)
        # As many steps as the survivals say, each as long as it was.
        best = max(best, tokens / (tokens / (1 + sum(survival)) * seconds / steps))
    return best


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.speculation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--target", type=Path, default=Path("assets/demo/target"))
    add("--draft", type=Path, default=Path("assets/demo/draft"))
    add("--drafters", nargs="+", default=["suffix", "model"])
    add("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    add("--work", nargs="+", choices=WORK, default=list(WORK))
    add("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    add("--lengths", type=int, nargs="*", default=list(LENGTHS), help="fixed ones to compare with")
    add("--ahead", action="store_true", help="compare working ahead with taking turns")
    add("--itself", action="store_true", help="compare auto's engine with itself without drafts")
    add("--rounds", type=int, default=7)
    add("--least", type=int, default=8, help="requests a round; more where there are more streams")
    add("--most-drafts", type=int, default=8)
    add("--dtype", default="auto")
    add("--cache-dir", help="where compiled kernels are kept")
    add("--quick", action="store_true", help="three rounds of answers at 1 and 8 streams")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.quick:
        args.streams, args.rounds, args.work, args.lengths = [1, 8], 3, ["answers"], [2, 4]
    rows: list[Row] = []
    lines: list[tuple[str, ...]] = []
    for streams in args.streams:
        with ExitStack() as stack:
            modes = make_modes(args, streams, stack)
            source = Source(modes[0].llm)
            gc.unfreeze()  # engines of before
            gc.collect()
            gc.freeze()  # as the engine's process does, so that no round has to look at all this
            for work in args.work:
                for temperature in args.temperatures:
                    requests = max(args.least, streams * 4)
                    wrong = measure(
                        modes, source, work, streams, temperature, args.rounds, requests
                    )
                    name = f"{work}, temperature {temperature:g}, {streams} streams"
                    rows += judge(name, modes, wrong, bound=streams == 1 and work == "text")
                    lines += [line(name, mode) for mode in modes]
                    print(f"{name}: done", file=sys.stderr, flush=True)
    header = (
        *("work", "mode", "tok/s", "tokens/step", "drafted", "right", "drafting"),
        *("hidden", "foreseen"),
    )
    print(table(header, lines) + "\n")
    print(rows_table(rows))
    print(json_line("speculation", rows))
    return 0


def make_modes(args: argparse.Namespace, streams: int, stack: ExitStack) -> list[Mode]:
    """An engine each, of the same size."""
    make = partial(
        LLM,
        str(args.target),
        builder=partial(build_worker, patient=True),
        max_num_seqs=streams,
        max_model_len=1024,
        num_pages=65 * streams + 1,
        dtype=args.dtype,
        cache_dir=args.cache_dir,
        length_history=str(Path(gettempdir()) / "foresight-no-lengths"),
        enable_prefix_cache=False,  # modes that share an engine would find each other's prompts
    )
    drafting = {
        "drafters": tuple(args.drafters),
        "draft_model": str(args.draft),
        "max_draft_tokens": args.most_drafts,
    }
    modes = [
        Mode(PLAIN, stack.enter_context(make(drafters=()))),
        Mode("auto", stack.enter_context(make(**drafting))),
    ]
    if args.itself:
        declined = Speculation(enabled=False)
        modes.append(Mode(ITSELF, modes[1].llm, speculation=declined, apart=True))
    if args.ahead:
        for name, how in ((AHEAD, "on"), (TURNS, "off")):
            llm = stack.enter_context(make(**drafting, draft_ahead=how))
            modes.append(Mode(name, llm))
    for name in args.drafters:
        one = drafting | {"drafters": (name,)}
        if name != "model":
            one["draft_model"] = None
        for length in args.lengths:
            llm = stack.enter_context(make(**one, fixed_draft_tokens=length))
            modes.append(Mode(f"{name} {length}", llm, length, (name,)))
    return [*modes, Mode(LAST, stack.enter_context(make(drafters=())))]


def plain_rates(modes: Sequence[Mode]) -> list[float]:
    """Of every round: the geometric mean of the plain engines' tokens per second."""
    first, last = modes[0], modes[-1]
    return [math.sqrt(a.rate * b.rate) for a, b in zip(first.runs, last.runs, strict=True)]


def line(name: str, mode: Mode) -> tuple[str, ...]:
    tokens = sum(run.tokens for run in mode.runs)
    steps = sum(run.steps for run in mode.runs)
    drafted = sum(run.drafted for run in mode.runs)
    accepted = sum(run.accepted for run in mode.runs)
    seconds = sum(run.seconds for run in mode.runs)
    drafting = sum(run.draft_seconds for run in mode.runs)
    return (
        name,
        mode.name,
        f"{median(mode.rates):.0f}",
        f"{tokens / steps:.2f}",
        f"{drafted / tokens:.2f}",
        f"{accepted / drafted:.0%}" if drafted else "",
        f"{drafting / seconds:.0%}",
        hidden(mode),
        foreseen(mode),
    )


def hidden(mode: Mode) -> str:
    """Of the seconds of drafting ahead, those that nobody waited for, at least."""
    beside = sum(run.hidden_seconds for run in mode.runs)
    waited = sum(run.draft_seconds for run in mode.runs)
    # What was drafted late after all was waited for, too, so this is a lower bound.
    return f"{max(beside - waited, 0.0) / beside:.0%}" if beside else ""


def foreseen(mode: Mode) -> str:
    rows = sum(run.ahead for run in mode.runs)
    return f"{sum(run.foreseen for run in mode.runs) / rows:.0%}" if rows else ""


def judge(name: str, modes: Sequence[Mode], wrong: int, bound: bool) -> list[Row]:
    first, auto, *others, last = modes
    fixed = [mode for mode in others if mode.length]
    plain = plain_rates(modes)

    def over(rates: Sequence[float], what: str, least: float | None, of: Mode = auto) -> Row:
        ratios = [run.rate / rate for run, rate in zip(of.runs, rates, strict=True)]
        middle, low, high = median_interval(ratios)
        return Row(f"{name}: {what}", middle, least, interval=(low, high))

    rows = [
        Row(f"{name}: texts that differ from plain's", wrong, 0, "at most"),
        over(plain, "auto / plain", NEVER_BELOW),
        over(first.rates, f"{last.name} / made first", None, last),
    ]
    for mode in others:
        if mode.name in (AHEAD, TURNS, ITSELF):
            least = None if mode.name == AHEAD else NEVER_BELOW
            rows.append(over(mode.rates, f"auto / {mode.name}", least))
    if fixed:
        best = max(fixed, key=lambda mode: median(mode.rates))
        known, rates = best.name, best.rates
        if median(plain) > median(rates):
            known, rates = PLAIN, plain
        rows.append(over(rates, f"auto / {known}, the best", NEVER_BELOW))
    if fixed and bound:
        rate, most = median(auto.rates), ceiling(modes)
        rows.append(Row(f"{name}: auto / what acceptance allows", rate / most, 0.9))
        rows.append(Row(f"{name}: tok/s that acceptance allows", most))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
