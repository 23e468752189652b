"""How many KV pages fit: a budget in which every byte has a name."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1024**3
MIB = 1024**2


class BudgetError(Exception):
    """The KV pool would be too small for one sequence. The message is one sentence for a person."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of device memory, by use; `str()` is the table printed at start-up."""

    total: int  # of the device
    available: int  # free when the model had been loaded
    fraction: float  # of the available memory that may be used
    weights: int  # already taken, printed for the reader's sum
    activations: int  # the largest step's intermediate tensors and logits
    page_bytes: int  # one page, all layers
    page_size: int
    num_pages: int  # the null page included
    limit: str  # what decided the number of pages
    window_bytes: int = 0  # of dense windows beside the pages
    host_pages: int = 0  # that may hold what paused sequences computed, in host memory
    graphs: int = 0  # what recorded steps will take

    @property
    def pool(self) -> int:
        return self.num_pages * self.page_bytes

    @property
    def positions(self) -> int:
        """KV positions that sequences can use."""
        return (self.num_pages - 1) * self.page_size

    def __str__(self) -> str:
        rows = [
            ("device memory", self.total),
            ("weights (loaded)", self.weights),
            ("available after loading", self.available),
            (f"usable at memory_fraction {self.fraction:g}", int(self.available * self.fraction)),
            ("largest step (activations, logits)", self.activations),
            ("CUDA graphs, an allowance", self.graphs),
            (f"KV pool: {self.num_pages} pages of {self.page_bytes} bytes", self.pool),
            (f"host memory: {self.host_pages} pages to swap to", self.host_pages * self.page_bytes),
        ]
        if self.window_bytes:
            rows.insert(-1, ("dense windows", self.window_bytes))
        if not self.graphs:
            rows = [row for row in rows if not row[0].startswith("CUDA graphs")]
        lines = [f"  {name:<48}{size / MIB:>12,.1f} MiB" for name, size in rows]
        tail = f"  room for {self.positions:,} token positions; limited by {self.limit}"
        return "\n".join(["memory budget", *lines, tail])


def activation_bytes(
    max_step_tokens: int,
    max_sample_rows: int,
    hidden_size: int,
    intermediate_size: int,
    attention_size: int,
    vocab_size: int,
    dtype_bytes: int,
) -> int:
    """An upper estimate of a step's intermediate tensors.

    Per token: the residual and its norm, the fused qkv and attention output, the fused gate-up and
    its product; per sampled row the logits and three working copies in fp32.
    """
    per_token = dtype_bytes * (4 * hidden_size + 3 * attention_size + 3 * intermediate_size)
    return max_step_tokens * per_token + max_sample_rows * vocab_size * 4 * 4


def plan_budget(
    *,
    total: int,
    available: int,
    fraction: float,
    weights: int,
    activations: int,
    page_bytes: int,
    page_size: int,
    max_model_len: int,
    max_num_seqs: int,
    default_cap: int | None,
    kv_bytes: int | None,
    num_pages: int | None,
    swap_bytes: int = 0,
    window_bytes: int = 0,
    graphs: int = 0,
) -> Budget:
    """Decides the number of pages. `window_bytes` are needed beside them.

    An explicit `num_pages` or `kv_bytes` wins; otherwise the usable memory less the activations
    and the graphs, bounded by what `max_num_seqs` sequences of full length could ever fill and by
    `default_cap`.
    Raises `BudgetError` when one sequence of `max_model_len` does not fit.
    """
    if num_pages is not None:
        pages, limit = num_pages, "num_pages"
    elif kv_bytes is not None:
        pages, limit = (kv_bytes - window_bytes) // page_bytes, "kv_bytes"
    else:
        usable = int(available * fraction) - activations - window_bytes - graphs
        pages, limit = usable // page_bytes, "memory_fraction"
        full = max_num_seqs * -(-max_model_len // page_size) + 1
        if full < pages:
            pages, limit = full, "max_num_seqs sequences of max_model_len"
        if default_cap is not None and (default_cap - window_bytes) // page_bytes < pages:
            pages = (default_cap - window_bytes) // page_bytes
            limit = "the default pool size on a CPU (kv_bytes)"
    needed = -(-max_model_len // page_size) + 1
    if pages < needed:
        beside = f" beside {window_bytes / MIB:,.1f} MiB of dense windows" if window_bytes else ""
        raise BudgetError(
            f"the KV pool has room for {max(pages - 1, 0) * page_size:,} token positions "
            f"({max(pages, 0) * page_bytes / MIB:,.1f} MiB{beside}, limited by {limit}), "
            f"but one sequence of max_model_len {max_model_len:,} needs "
            f"{needed * page_bytes / MIB:,.1f} MiB: "
            "lower --max-model-len or give the pool more memory."
        )
    return Budget(
        total=total,
        available=available,
        fraction=fraction,
        weights=weights,
        activations=activations,
        page_bytes=page_bytes,
        page_size=page_size,
        num_pages=pages,
        limit=limit,
        window_bytes=window_bytes,
        host_pages=swap_bytes // page_bytes,
        graphs=graphs,
    )
