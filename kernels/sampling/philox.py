"""The noise of the sampler: a pure function of (seed, choice, position, token).

`x` is word `token mod 4` of Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers:
as easy as 1, 2, 3", SC 2011) with the 64-bit seed as key and the counter
`(token div 4, position, choice, NOISE_VERSION)`. Then, in float32,

    v = min((float32(x) + 0.5) * 2^-32, 1 - 2^-24)      g = -log(-log1p(-v))

is a standard Gumbel variable: `argmax(z + g)` samples from softmax(z). It follows that
`GUMBEL_MIN < g < GUMBEL_MAX`. Each of the two logarithms is evaluated in float64 and rounded to
float32 once, so libraries and devices with different float32 logarithms agree on every bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOISE_VERSION = 1  # the last counter word; another rule for the noise takes another number
GUMBEL_MIN = -2.9
GUMBEL_MAX = 22.9
# Below the row's maximum by more than this, a token cannot win against it whatever the noise.
GUMBEL_SPAN = GUMBEL_MAX - GUMBEL_MIN

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_V_MAX = 1.0 - 2.0**-24


def philox4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32. All arguments int64 holding uint32 values, broadcast together.

    What is constant along a dimension should come with size 1 there: the first rounds then run on
    the small shape. Returns the four words, int64 holding uint32 values.
    """
    # Torch has no 32-bit multiply-high, but the int64 product of two uint32 values keeps all 64
    # bits. c1 and c3 carry rubbish above bit 31 (the product's high half, the shift's sign); it
    # only ever meets an xor, and the mask on c0 and c2 removes it before the next product.
    rounds = torch.arange(_ROUNDS, device=k0.device).view(-1, *(1,) * k0.dim())
    keys0 = ((k0 + rounds * _W0) & _MASK).unbind(0)
    keys1 = ((k1 + rounds * _W1) & _MASK).unbind(0)
    for k0, k1 in zip(keys0, keys1, strict=True):
        p0, p1 = c0 * _M0, c2 * _M1
        c0 = ((p1 >> 32) ^ (c1 ^ k0)).bitwise_and_(_MASK)
        c2 = ((p0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_MASK)
        c1, c3 = p1, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def noise_blocks(blocks: Tensor, seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """The noise words of whole blocks of four tokens, as uniforms.

    blocks: [..., b] int64, token div 4; seed (the 64 bits in two's complement), choice, position:
    int64, broadcastable with blocks. Returns v: [..., 4 * b] float32 in (0, 1), in token order.
    """
    words = philox4x32(
        blocks,
        position & _MASK,
        choice & _MASK,
        torch.full_like(position, NOISE_VERSION),
        seed & _MASK,
        (seed >> 32) & _MASK,
    )
    return uniform_from_word(torch.stack([w.to(torch.float32) for w in words], -1).flatten(-2))


def noise_uniform(tokens: Tensor, seed: Tensor, choice: Tensor, position: Tensor) -> Tensor:
    """As `noise_blocks` for single tokens: all [...] int64 of one shape, which v has too."""
    v = noise_blocks(
        (tokens >> 2)[..., None], seed[..., None], choice[..., None], position[..., None]
    )
    return v.gather(-1, (tokens & 3)[..., None].expand(*v.shape[:-1], 1)).squeeze(-1)


def uniform_from_word(word: Tensor) -> Tensor:
    """v of a word converted to float32 (round to nearest). May write into `word`."""
    return word.add_(0.5).mul_(2.0**-32).clamp_(max=_V_MAX)


def exponential(v: Tensor) -> Tensor:
    """-log1p(-v), correctly rounded to float32: a standard exponential variable."""
    return v.double().neg_().log1p_().neg_().to(torch.float32)


def gumbel(v: Tensor) -> Tensor:
    """-log(-log1p(-v)), each logarithm correctly rounded to float32."""
    return exponential(v).double().log_().neg_().to(torch.float32)
