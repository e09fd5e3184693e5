"""Gumbel noise from a counter: a number for each (seed, counter, token id), the same in any batch.

    state = splitmix64(seed) + counter                         64 bits; the sequence's next token has the next state
    key   = splitmix64(state)                                  64 bits; low and high word k0, k1
    x     = mix32(mix32(token ^ k0) ^ k1)                      32 bits, wrapping
    v     = min((float(x) + 0.5) * 2^-32, 1 - 2^-24)           fp32, x rounded to nearest
    noise = -log(-log1p(-v))                                   fp32

`mix32(x)`: x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16 (logical shifts; the
constants are Chris Wellons' lowbias32). v is exact everywhere, and the last bit of two logarithms is all that
devices may differ in. argmax(logits / T + noise) draws from softmax(logits / T): the Gumbel-max trick. Large
noise comes from small v, where fp32 is finest; the bound on v keeps the noise of every token finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.batch import Ints

if TYPE_CHECKING:
    import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One output of the splitmix64 generator (Steele, Lea and Flood 2014) from each state."""
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def states(seed: NDArray[np.uint64], counter: Ints) -> NDArray[np.uint64]:
    """The state of each sample, [S]."""
    return splitmix64(seed) + counter.astype(np.uint64)


def keys(seed: NDArray[np.uint64], counter: Ints) -> NDArray[np.int32]:
    """The words (k0, k1) of each sample, [S, 2], as int32 with the same bits."""
    return splitmix64(states(seed, counter)).astype("<u8").view("<i4").reshape(-1, 2)


def hash32(keys_S2: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """x for each sample and token id: [S, V], int32 with the bits of the unsigned number."""
    import torch

    x_SV = torch.arange(vocab_size, dtype=torch.int32, device=keys_S2.device) ^ keys_S2[:, :1]
    _mix32(x_SV)
    x_SV ^= keys_S2[:, 1:]
    _mix32(x_SV)
    return x_SV


def _mix32(x: torch.Tensor) -> None:
    # int32 shifts drag the sign along, so the bits that a logical shift leaves clear are cleared here.
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16) & 0xFFFF


def gumbel(keys_S2: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The noise of each sample and token id, [S, V] in fp32."""
    x_SV = hash32(keys_S2, vocab_size)
    v_SV = (x_SV.long() & 0xFFFFFFFF).float()
    v_SV.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return v_SV.neg_().log1p_().neg_().log_().neg_()
