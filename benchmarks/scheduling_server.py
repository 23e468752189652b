"""The scheduler in the real server: does it do what the simulator says, and keep its promises?

    python -m benchmarks.scheduling_server

Three parts, each with servers of its own on free loopback ports (the bundled model on a CPU):

    traces       three open-loop traces, served and simulated: goodput within 10 % of each other
                 (see benchmarks/fidelity.py for how)
    long-prompt  8 running streams, and prompts of nearly the whole context arriving among them:
                 their largest gap, with a gap target and without
    tenants      a modest tenant's time to first token, alone and while another one floods

Step times come from `--profile FILE`, made by `foresight profile`; without it they are measured
first, and kept where `--keep-profile FILE` says. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

from benchmarks.fidelity import NATIVE_PATIENCE, TRACES, Setting, fidelity, measure_profile, say
from benchmarks.local_server import LocalServer, local_server
from benchmarks.replay import replay
from benchmarks.report import Row, json_line, percentile, rows_table
from benchmarks.streaming import Connection, Endpoint, Sample
from benchmarks.workload import call, tokenized_text
from scheduler.trace import TraceRequest

PARTS = ("traces", "long-prompt", "tenants")


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """The second part's sizes. Seconds, tokens."""

    streams: int = 8
    stream_prompt: int = 64
    tokens: int = 7900  # of each long prompt; the context has 8,192
    prompts: int = 2  # one after the other
    settle: float = 2.0  # before anything counts
    calm: float = 3.0  # without a long prompt
    targets: tuple[float, ...] = (0.05, 0.1)  # for the largest gap: 20 and 10 tokens a second


@dataclass(frozen=True, slots=True)
class Flood:
    """The third part's sizes."""

    streams: int = 64  # of the flooding tenant, in a closed loop
    seconds: float = 20.0  # of the modest tenant's trace, each time
    share: float = 0.25  # of the requests a second that the server does: half of a fair share
    warm: float = 10.0  # seconds of flood before anything counts


# --- a long prompt among running streams --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Gaps:
    """Of all streams together, in seconds."""

    calm: list[float]
    during: list[float]  # touched by a long prompt, from its arrival to its first token
    ttft: list[float]  # of the long prompts
    slower: float = 1.0  # how many times as long as by the profile a step took


def gaps_between(sample: Sample, start: float, end: float) -> Iterator[float]:
    """The gaps of a stream that overlap with the time from `start` to `end`."""
    if sample.first is None:
        return
    now = sample.first
    for gap in sample.gaps:
        if now < end and now + gap > start:
            yield gap
        now += gap


def completion(
    tokens: Sequence[int], count: int, temperature: float = 0.0, seed: int = 0
) -> dict[str, object]:
    """An answer of exactly so many tokens; greedy, unless told otherwise."""
    return {
        "model": "m",
        "prompt": list(tokens),
        "max_tokens": count,
        "temperature": temperature,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def whole_characters(endpoint: Endpoint, tokens: Iterable[int]) -> list[int]:
    """Of `tokens` those of ASCII text, once each. Half a character is shown with the next token,
    which from outside looks like a gap of two steps."""
    shown = []
    for token in sorted(set(tokens)):
        answer = call(endpoint, "/detokenize", {"model": "m", "tokens": [token]})
        assert isinstance(answer, dict)
        if str(answer["prompt"]).isascii():
            shown.append(token)
    return shown


async def among_streams(
    endpoint: Endpoint, text: Sequence[int], allowed: Sequence[int], sizes: LongPrompt
) -> Gaps:
    """Streams of `allowed` tokens run from before the first long prompt until after the last."""
    longest = sizes.tokens + sizes.stream_prompt
    # Greedy texts that nothing ends soon repeat themselves, and drafts make them grow eightfold.
    bodies = [
        completion(text[i * sizes.stream_prompt : (i + 1) * sizes.stream_prompt], longest, 1.0, i)
        | {"allowed_token_ids": list(allowed)}
        for i in range(sizes.streams)
    ]
    connections = [Connection(endpoint) for _ in bodies]
    running = [
        asyncio.create_task(connection.send(endpoint.post("/v1/completions", body), 600))
        for connection, body in zip(connections, bodies, strict=True)
    ]
    loop = asyncio.get_running_loop()
    await asyncio.sleep(sizes.settle)
    calm = (loop.time(), loop.time() + sizes.calm)
    await asyncio.sleep(sizes.calm)
    long_ones: list[Sample] = []
    for number in range(sizes.prompts):
        prompt = text[sizes.streams * sizes.stream_prompt + number :][: sizes.tokens]
        data = endpoint.post("/v1/completions", completion(prompt, 1))
        connection = Connection(endpoint)
        long_ones.append(await connection.send(data, 120))
        connection.close()
        await asyncio.sleep(0.5)
    for connection in connections:
        connection.close()
    samples = await asyncio.gather(*running)
    if any(long.error for long in long_ones) or any(sample.events < 2 for sample in samples):
        problems = [s.error for s in (*long_ones, *samples) if s.error]
        raise RuntimeError(f"a request failed: {problems[:1]}")
    spans = [(long.started, long.finished) for long in long_ones]
    return Gaps(
        calm=[gap for sample in samples for gap in gaps_between(sample, *calm)],
        during=[g for sample in samples for span in spans for g in gaps_between(sample, *span)],
        ttft=[long.finished - long.started for long in long_ones],
    )


def slower(endpoint: Endpoint) -> float:
    """Seconds from step to step since the server's start, over those of its profile."""
    load = call(endpoint, "/load")
    assert isinstance(load, dict)
    return float(load["step_seconds"] / load["step_seconds_profiled"])


def long_prompt(setting: Setting, profile_file: Path, sizes: LongPrompt) -> list[Row]:
    """Without a target, and with each of the targets, on a server of its own."""
    base = setting.model_flags(["--profile", str(profile_file)])

    def one(*flags: str) -> Gaps:
        with tempfile.TemporaryDirectory() as folder:
            history = ["--length-history", str(Path(folder) / "lengths.json")]
            with local_server(*base, *history, *flags) as server:
                server.native_seconds(NATIVE_PATIENCE)
                endpoint = Endpoint.parse(server.url)
                needed = sizes.streams * sizes.stream_prompt + sizes.tokens + sizes.prompts
                text = tokenized_text(endpoint, "m", needed)
                allowed = whole_characters(endpoint, text)
                gaps = asyncio.run(among_streams(endpoint, text, allowed, sizes))
                return replace(gaps, slower=slower(endpoint))

    out: list[Row] = []
    for target in (None, *sizes.targets):
        gaps = one() if target is None else one("--mtpot-target", str(target))
        aim = "no target" if target is None else f"target {target * 1e3:.0f} ms"
        name = f"{sizes.streams} streams, prompts of {sizes.tokens:,} tokens arrive, {aim}"
        largest = f"{name}: largest gap, s"
        if target is None:
            out.append(Row(largest, max(gaps.during)))
        else:
            late = sum(gap > target for gap in gaps.during)
            out.append(Row(largest, max(gaps.during), target, "at most"))
            out.append(Row(f"{name}: gaps within the target", 1 - late / len(gaps.during)))
        out += [
            Row(f"{name}: median gap, s", median(gaps.during)),
            Row(f"{name}: gap p99, s", percentile(gaps.during, 0.99)),
            Row(f"{name}: median gap before, s", median(gaps.calm)),
            Row(f"{name}: largest gap before, s", max(gaps.calm)),
            Row(f"{name}: TTFT of the long prompts, s", median(gaps.ttft)),
            Row(f"{name}: a step's seconds over the profile's", gaps.slower),
        ]
        say(f"{aim}: largest gap {max(gaps.during) * 1e3:.0f} ms")
    return out


# --- one tenant floods, another does not --------------------------------------------------------


class Prompts:
    """Chat requests of one tenant: lengths of the trace maker, text of their own, fixed lengths of
    answers. The same seed gives the same lengths; texts are never used twice."""

    def __init__(self, vocabulary: Sequence[int], setting: Setting) -> None:
        self._vocabulary = vocabulary
        self._setting = setting
        self._random = random.Random(0)

    def requests(self, rate: float, count: int) -> list[TraceRequest]:
        return TRACES["chat"].make(rate, count, self._setting.max_model_len)

    def bytes(self, endpoint: Endpoint, request: TraceRequest) -> bytes:
        prompt = self._random.choices(self._vocabulary, k=request.prompt_tokens)
        body = completion(prompt, request.output_tokens)
        return endpoint.post("/v1/completions", body)


async def flood(
    endpoint: Endpoint, prompts: Prompts, streams: int, stop: asyncio.Event
) -> list[Sample]:
    """A closed loop until told to stop. The samples of what was finished."""
    wanted = prompts.requests(1.0, 500)
    samples: list[Sample] = []
    turn = 0

    async def stream(connection: Connection) -> None:
        nonlocal turn
        while not stop.is_set():
            turn += 1
            data = prompts.bytes(endpoint, wanted[turn % len(wanted)])
            sample = await connection.send(data, 120)
            if sample.error and not stop.is_set():
                raise RuntimeError(f"a request of the flood failed: {sample.error}")
            if not sample.error:
                samples.append(sample)

    connections = [Connection(endpoint) for _ in range(streams)]
    tasks = [asyncio.create_task(stream(connection)) for connection in connections]
    await asyncio.wait([asyncio.create_task(stop.wait()), *tasks], return_when="FIRST_COMPLETED")
    for connection in connections:
        connection.close()
    await asyncio.gather(*tasks)
    return samples


async def pace(endpoint: Endpoint, prompts: Prompts, sizes: Flood) -> float:
    """Requests per second that a flood gets done, in its second half: slots fill up first."""
    stop = asyncio.Event()
    running = asyncio.create_task(flood(endpoint, prompts, sizes.streams, stop))
    await asyncio.sleep(sizes.warm / 2)
    half = perf_counter()
    await asyncio.sleep(sizes.warm / 2)
    stop.set()
    samples = await running
    return sum(sample.finished > half for sample in samples) / (sizes.warm / 2)


async def modest(
    endpoint: Endpoint,
    prompts: Prompts,
    trace: Sequence[TraceRequest],
    flooder: Endpoint | None,
    sizes: Flood,
) -> list[float]:
    """Times to first token of the trace, while a flood runs or not."""
    stop = asyncio.Event()
    running: asyncio.Task[list[Sample]] | None = None
    if flooder is not None:
        running = asyncio.create_task(flood(flooder, prompts, sizes.streams, stop))
        await asyncio.sleep(sizes.warm)
    bodies = [prompts.bytes(endpoint, request) for request in trace]
    _, samples = await replay(endpoint, bodies, [request.arrival for request in trace])
    stop.set()
    if running is not None:
        await running
    await asyncio.sleep(1.0)  # what was cut off has ended
    if errors := [sample.error for sample in samples if sample.error]:
        raise RuntimeError(f"{len(errors)} requests failed: {errors[0]}")
    return [s.first - s.started for s in samples if s.first is not None]


def tenants(setting: Setting, profile_file: Path, sizes: Flood) -> list[Row]:
    """Alone, flooded, and flooded under the flooder's key, which is first come, first served."""
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys"
        keys.write_text("loud:key-of-loud\nmodest:key-of-modest\n")
        flags = ["--profile", str(profile_file), "--api-key-file", str(keys)]
        flags += ["--length-history", str(Path(folder) / "lengths.json")]
        flags += ["--max-num-seqs", str(setting.max_num_seqs)]
        with local_server(*setting.model_flags(flags)) as server:
            server.native_seconds(NATIVE_PATIENCE)
            return _tenants(server, setting, sizes)


def _tenants(server: LocalServer, setting: Setting, sizes: Flood) -> list[Row]:
    own = Endpoint.parse(server.url, "key-of-modest")
    loud = Endpoint.parse(server.url, "key-of-loud")
    prompts = Prompts(sorted(set(tokenized_text(own, "m", 4000))), setting)
    done = asyncio.run(pace(loud, prompts, sizes))
    rate = sizes.share * done
    count = max(math.ceil(rate * sizes.seconds), 20)
    trace = [replace(r, tenant="modest") for r in prompts.requests(rate, count)]
    say(f"a flood gets {done:.1f} requests/s done; the other tenant sends {rate:.2f}")
    alone = asyncio.run(modest(own, prompts, trace, None, sizes))
    flooded = asyncio.run(modest(own, prompts, trace, loud, sizes))
    mixed = asyncio.run(modest(loud, prompts, trace, loud, sizes))
    p95 = {
        name: percentile(times, 0.95)
        for name, times in (("alone", alone), ("flooded", flooded), ("mixed", mixed))
    }
    name = "a modest tenant while another floods"
    return [
        Row(f"{name}: TTFT p95 / alone", p95["flooded"] / p95["alone"], 2.0, "at most"),
        Row(f"{name}: TTFT p95, s", p95["flooded"]),
        Row(f"{name}: TTFT p50, s", median(flooded)),
        Row(f"{name}: TTFT p95 alone, s", p95["alone"]),
        Row(f"{name}: TTFT p50 alone, s", median(alone)),
        Row(f"{name}, both under one key: TTFT p95, s", p95["mixed"]),
        Row(f"{name}: its requests", float(len(trace))),
    ]


# --- all of it ----------------------------------------------------------------------------------


def rows(
    setting: Setting | None = None,
    profile: Path | None = None,
    parts: Sequence[str] = PARTS,
    traces: Sequence[str] = tuple(TRACES),
    *,
    keep_profile: Path | None = None,
) -> list[Row]:
    """What the parts bring; tables of single traces are printed on the way.

    Without a profile the machine is measured first, into `keep_profile` if that is given.
    """
    setting = setting or Setting()
    out: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        if profile is None:
            profile = keep_profile or Path(folder) / "profile.json"
            measure_profile(setting, profile.resolve())
        profile = profile.resolve()
        if "traces" in parts:
            out += fidelity(setting, profile, traces)
        if "long-prompt" in parts:
            out += long_prompt(setting, profile, LongPrompt())
        if "tenants" in parts:
            out += tenants(setting, profile, Flood())
    return out


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduling_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--model", type=Path, default=Path("assets/demo/target"))
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    add("--traces", nargs="+", choices=TRACES, default=list(TRACES))
    add("--seconds", type=float, default=30.0, help="of arrivals of a trace (30)")
    add("--threads", type=int, help="of the worker (all cores)")
    add("--profile", type=Path, metavar="FILE", help="measured step times of this machine")
    add("--keep-profile", type=Path, metavar="FILE", help="where to keep those measured now")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    setting = Setting(model=args.model, seconds=args.seconds, threads=args.threads)
    found = rows(setting, args.profile, args.parts, args.traces, keep_profile=args.keep_profile)
    print(rows_table(found))
    print(json_line("scheduling_server", found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
