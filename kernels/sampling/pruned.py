"""The CPU form of `reference.choose`: the same tokens for the cost of the few candidates.

Everything works on tiles of 32 consecutive tokens whose maxima are taken in one pass over the
logits. A tile too far below the row's maximum to hold the winner is never scaled, exponentiated
or given noise. Data-dependent shapes make this a CPU form: on a GPU they would synchronise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.sampling import reference
from kernels.sampling.accept import Drafts
from kernels.sampling.philox import GUMBEL_SPAN, gumbel, noise_blocks, noise_uniform
from kernels.sampling.processors import penalize as penalize
from kernels.sampling.reference import Chosen, Draws, Truncation, conclude, scale

TILE = 32  # tokens; a multiple of the four that share a Philox block
# Slack of the float32 filters below, in nats: orders of magnitude above their rounding.
_SLACK = 1e-3
_BUCKETS, _PER_NAT = 128, 4  # of the histogram that bounds a nucleus


def usable(logits: Tensor) -> Tensor:
    """As `reference.usable`."""
    return reference.usable(logits)


def argmax_rows(logits: Tensor) -> Tensor:
    """As `reference.argmax_rows`.

    Torch vectorises `amax` on the CPU but not `argmax`, so the maxima of tiles are searched first.
    """
    n, vocab = logits.shape
    tile = min(vocab & -vocab, 128)  # a power of two that divides the vocabulary
    if tile < TILE:
        return logits.argmax(-1)
    tiles = logits.view(n, vocab // tile, tile)
    best = tiles.amax(-1).argmax(-1)
    return best * tile + tiles[torch.arange(n), best].argmax(-1)


def choose(
    logits: Tensor,
    draws: Draws | None = None,
    raw_usable: Tensor | None = None,
    drafts: Drafts | None = None,
) -> Chosen:
    """As `reference.choose`; every row's token depends on that row alone."""
    tokens = argmax_rows(logits) if draws is None else draw(logits, draws)
    return conclude(tokens, usable(logits), raw_usable, drafts)


def draw(logits: Tensor, by: Draws) -> Tensor:
    """As `reference.draw`, kind by kind of row."""
    n, vocab = logits.shape
    greedy, limits = by.temperature == 0, by.limits
    limited = torch.zeros_like(greedy)
    if limits is not None:
        limited = ~limits.log_min_p.isneginf() | (limits.top_k < vocab) | (limits.top_p < 1.0)
    tokens = torch.empty(n, dtype=torch.int64)
    for members, choose_kind in (
        (greedy, _most_likely),
        (~greedy & ~limited, _draw_full),
        (~greedy & limited, _draw_truncated),
    ):
        at = members.nonzero().squeeze(1)
        if len(at) == n:
            return choose_kind(logits, by)
        if len(at):
            tokens[at] = choose_kind(logits[at], by.rows(at))
    return tokens


def _most_likely(logits: Tensor, by: Draws) -> Tensor:
    return argmax_rows(logits)


@dataclass(frozen=True, slots=True)
class _Tiled:
    tiles: Tensor  # [n, tiles, TILE] the logits, padded with -inf
    top: Tensor  # [n] each row's maximum
    temperature: Tensor  # [n]
    z_top: Tensor  # [n, tiles] the maximum of z in each tile

    @staticmethod
    def of(logits: Tensor, temperature: Tensor) -> _Tiled:
        n, vocab = logits.shape
        if vocab % TILE:
            logits = pad(logits, (0, -vocab % TILE), value=-torch.inf)
        tiles = logits.view(n, -1, TILE)
        maxima = tiles.amax(-1)
        top = maxima.amax(-1)
        # Rounding is monotone, so this is the maximum over the tile of what `scale` computes.
        z_top = (maxima - top[:, None]) / temperature[:, None]
        return _Tiled(tiles, top, temperature, z_top)

    def above(self, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tiles holding some z >= floor: [n] -> row [k], tile [k], z [k, TILE].

        A row without a finite maximum has none.
        """
        row, tile = (self.z_top >= floor[:, None]).nonzero(as_tuple=True)
        if len(row) == self.z_top.numel():
            z = (self.tiles - self.top[:, None, None]) / self.temperature[:, None, None]
            return row, tile, z.view(-1, TILE)
        z = (self.tiles[row, tile] - self.top[row, None]) / self.temperature[row, None]
        return row, tile, z


def _draw_full(logits: Tensor, by: Draws) -> Tensor:
    n, key = len(logits), by.key
    tiled = _Tiled.of(logits, by.temperature)
    row, tile, z = tiled.above(torch.full((n,), -GUMBEL_SPAN))
    blocks = tile[:, None] * (TILE // 4) + torch.arange(TILE // 4)
    v = noise_blocks(blocks, key.seed[row, None], key.choice[row, None], key.position[row, None])
    # A cheap upper bound of every score: E = -log1p(-v) >= v, so z + g <= -log(v * exp(-z)).
    q = v * (-z).exp_()
    q_tile = q.amin(-1)
    q_row = torch.full((n,), torch.inf).scatter_reduce_(0, row, q_tile, "amin")
    # The exact score of the token with the best bound, then of all whose bound reaches it.
    lead = (q_tile == q_row[row]).nonzero().squeeze(1)
    column = q[lead].argmin(-1)
    score = z[lead, column] + gumbel(v[lead, column])
    reached = torch.full((n,), -torch.inf).scatter_reduce_(0, row[lead], score, "amax")
    bound = (_SLACK - reached).exp_()[row]
    lead = (q_tile <= bound).nonzero().squeeze(1)
    at, column = (q[lead] <= bound[lead, None]).nonzero(as_tuple=True)
    at = lead[at]
    score = z[at, column] + gumbel(v[at, column])
    return _winners(n, row[at], tile[at] * TILE + column, score)


def _draw_truncated(logits: Tensor, by: Draws) -> Tensor:
    n, vocab = logits.shape
    key, limits = by.key, by.limits
    assert limits is not None
    tiled = _Tiled.of(logits, by.temperature)
    floor, total = _floors(logits, tiled, limits)
    row, tile, z = tiled.above(floor)
    at, column = ((z >= floor[row, None]) & (z > -torch.inf)).nonzero(as_tuple=True)
    row, token, z = row[at], tile[at] * TILE + column, z[at, column]

    # Candidates come ordered by row, then id: lay them out as [n, most of any row] and sort.
    counts = row.bincount(minlength=n)
    width = max(int(counts.max()), 1)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    laid = torch.full((n, width), -torch.inf).index_put_((row, place), z)
    tokens = torch.zeros(n, width, dtype=torch.int64).index_put_((row, place), token)
    ordered, order = laid.sort(dim=-1, descending=True, stable=True)

    kth = ordered.gather(-1, limits.top_k.clamp(max=width)[:, None] - 1)
    kept = (ordered >= kth) & (ordered > -torch.inf)
    mass = ordered.double().exp_().masked_fill_(~kept, 0.0)
    running = mass.cumsum(-1)
    whole = running[:, -1]
    total = torch.where(total.isnan() | (counts == vocab), whole, total)
    kept &= (running - mass < (limits.top_p * total)[:, None]) | (limits.top_p >= 1.0)[:, None]

    row, place = kept.nonzero(as_tuple=True)
    token = tokens[row, order[row, place]]
    v = noise_uniform(token, key.seed[row], key.choice[row], key.position[row])
    return _winners(n, row, token, ordered[row, place] + gumbel(v))


def _floors(logits: Tensor, tiled: _Tiled, limits: Truncation) -> tuple[Tensor, Tensor]:
    """A lower bound [n] of every z that survives, cheap to compute and mostly close.

    Also the mass [n] float64 that top-p refers to, of rows where tokens below the floor belong to
    it; NaN elsewhere.
    """
    n, vocab = logits.shape
    floor = limits.log_min_p.clone()
    total = torch.full((n,), torch.nan, dtype=torch.float64)
    has_k, has_p = limits.top_k < vocab, limits.top_p < 1.0
    by_k = has_k.nonzero().squeeze(1)
    if len(by_k):
        # The k-th largest tile maximum is at most the k-th largest token.
        k = limits.top_k[by_k]
        widest = int(k.max())
        z = tiled.z_top[by_k]
        if widest > z.shape[1]:
            z = scale(logits[by_k], tiled.temperature[by_k])
        kth = z.topk(widest, dim=-1).values.gather(-1, k[:, None] - 1).squeeze(1)
        floor[by_k] = torch.maximum(floor[by_k], kth)
    by_p = (has_p & ~has_k & floor.isneginf()).nonzero().squeeze(1)
    if len(by_p):
        # A histogram of the mass over z shows in which bucket the nucleus ends.
        z = scale(logits[by_p], tiled.temperature[by_p]).nan_to_num_(nan=-torch.inf)
        bucket = (z * -_PER_NAT).clamp_(max=_BUCKETS - 1).long()
        mass = torch.zeros(len(by_p), _BUCKETS, dtype=torch.float64)
        mass.scatter_add_(1, bucket, z.exp_().double())
        running = mass.cumsum(-1)
        total[by_p] = running[:, -1]
        wanted = limits.top_p[by_p] * running[:, -1] * (1 + 1e-6)
        end = (running < wanted[:, None]).sum(-1)
        bottom = (end + 1) / -_PER_NAT - _SLACK
        floor[by_p] = bottom.masked_fill_(end >= _BUCKETS - 1, -torch.inf).to(torch.float32)
    # Without top-p, what cannot win need not be counted either.
    floor[~has_p] = floor[~has_p].clamp_(min=-GUMBEL_SPAN)
    return floor, total


def _winners(n: int, row: Tensor, token: Tensor, score: Tensor) -> Tensor:
    """The token of each row's best score, the lowest among equals; 0 for a row without any."""
    best = torch.full((n,), -torch.inf).scatter_reduce_(0, row, score, "amax")
    contender = torch.where(score == best[row], token, torch.iinfo(torch.int64).max)
    tokens = torch.full((n,), torch.iinfo(torch.int64).max)
    tokens.scatter_reduce_(0, row, contender, "amin")
    return tokens.masked_fill_(best.isneginf(), 0)
