"""How close decoding one stream comes to the memory bandwidth of a bf16 matrix-vector product.

    python -m benchmarks.bandwidth --model DIR

A model whose weights exceed the caches reads all of them for every token, so the bytes of its
checkpoint times tokens per second is a bandwidth. In turns: a plain product of bf16 weights of the
same total size with one vector, and the server's own decode rate of one stream (the inverse of its
median inter-token time). The untied embedding is read row by row and left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import struct
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import uvloop

from benchmarks.closed_loop import Load, Server, measure
from benchmarks.freezing import ProcessTree
from benchmarks.local_server import local_server, model_flags
from benchmarks.report import Row, json_line, median_interval, percentile, rows_table
from benchmarks.streaming import Endpoint
from benchmarks.workload import PromptPool, tokenized_text

target = 0.85
columns = 1024  # of the plain product's matrices


def weight_bytes(model: Path) -> int:
    """Bytes of weights read for one token, from the safetensors headers. Raises `OSError`."""
    config = json.loads((model / "config.json").read_text())
    total = 0
    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as data:
            (length,) = struct.unpack("<Q", data.read(8))
            header = json.loads(data.read(length))
        for name, tensor in header.items():
            embedding = "embed_tokens" in name and not config.get("tie_word_embeddings")
            if name != "__metadata__" and not embedding:
                start, end = tensor["data_offsets"]
                total += end - start
    return total


def product_process(pipe: Pipe, size: int) -> None:
    """Answers anything but None with the bandwidth of one pass over the weights, bytes a second."""
    import torch

    rows = 16384
    count = max(1, size // (rows * columns * 2))
    weights = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(count)]
    vector = torch.randn(columns, dtype=torch.bfloat16)
    with torch.inference_mode():
        pipe.send("ready")
        while pipe.recv() is not None:
            passes = 5
            for weight in weights:  # warms up
                weight.mv(vector)
            started = time.perf_counter()
            for _ in range(passes):
                for weight in weights:
                    weight.mv(vector)
            seconds = time.perf_counter() - started
            pipe.send(passes * count * rows * columns * 2 / seconds)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bandwidth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="a bf16 checkpoint larger than the caches")
    add("--max-model-len", type=int, default=4096)
    add("--output-tokens", type=int, default=32)
    add("--repeats", type=int, default=7, help="interleaved pairs (7)")
    add("--quick", action="store_true", help="3 pairs")
    args = parser.parse_args(argv)
    rows = run(args, 3 if args.quick else args.repeats)
    print(rows_table(rows))
    print(json_line("bandwidth", rows))
    return 0


def run(args: argparse.Namespace, repeats: int) -> list[Row]:
    size = weight_bytes(args.model)
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=product_process, args=(theirs, size), daemon=True)
    flags = model_flags(args.model, ["--max-model-len", str(args.max_model_len)])
    with local_server(*flags) as running:
        running.native_seconds(300)
        process.start()
        assert process.pid is not None
        pipe.recv()
        product, tree = ProcessTree(process.pid), running.tree
        endpoint = Endpoint.parse(running.url)
        pool = PromptPool(tokenized_text(endpoint, "m", 2000), 16, 0, 0)
        server = Server("server", endpoint, "m", pool, tree)
        load = Load(False, args.output_tokens, 1, 300)
        shares, plain, served = [], [], []
        try:
            for repeat in range(-1, repeats):  # -1 warms up
                product.stop()
                one = uvloop.run(measure(server, 1, load))
                if one.errors:
                    raise SystemExit(f"a request failed: {one.errors[0]}")
                product.resume()
                tree.stop()
                pipe.send("measure")
                bandwidth = pipe.recv()
                tree.resume()
                if repeat >= 0:
                    plain.append(bandwidth / 1e9)
                    served.append(size / percentile(one.gaps, 0.5) * 1e3 / 1e9)
                    shares.append(served[-1] / plain[-1])
        finally:
            tree.resume()
            process.kill()
            process.join(10)
    share, low, high = median_interval(shares)
    return [
        Row("decode bandwidth / matrix-vector bandwidth", share, target, interval=(low, high)),
        Row("decode of one stream, GB/s", median_interval(served)[0]),
        Row("matrix-vector product, GB/s", median_interval(plain)[0]),
        Row("weights read per token, GB", size / 1e9),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
