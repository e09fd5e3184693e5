"""Drawing tokens on the device without a sort: argmax of logits over temperature plus Gumbel noise from a counter.

The noise is that of `octavo.runner.noise`, which gives its formulae; where the temperature is 0 there is none. Ties go
to the lowest token id. Shapes: S samples, V vocabulary, C chunks of it.
"""

import torch
import triton
import triton.language as tl

_CHUNK = 8192
# Below it, logits over the temperature could overflow: such draws are left to the sampler that subtracts a maximum.
MIN_TEMPERATURE = 1e-4


def draw(
    logits_SV: torch.Tensor, states_S: torch.Tensor, temperature_S: torch.Tensor, num_tokens: int, out_S: torch.Tensor
) -> None:
    """Writes a token for each sample into `out_S` (int32), from the first `num_tokens` of the vocabulary.

    `states_S` are those of the noise, int64 with the same bits.
    """
    S, V = logits_SV.shape
    chunks = triton.cdiv(num_tokens, _CHUNK)
    best_SC = torch.empty((2, S, chunks), dtype=torch.float32, device=logits_SV.device)
    _best_of_chunk[(chunks, S)](
        logits_SV,
        states_S,
        temperature_S,
        best_SC,
        best_SC[1].view(torch.int32),
        num_tokens,
        V,
        BLOCK=_CHUNK,
        num_warps=8,
    )
    _best_of_row[(S,)](
        best_SC, best_SC[1].view(torch.int32), out_S, chunks, BLOCK=triton.next_power_of_2(chunks), num_warps=1
    )


@triton.jit
def _best_of_chunk(logits, states, temperature, best, token_of_best, num_tokens, stride, BLOCK: tl.constexpr):
    chunk = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    token = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    value = tl.load(logits + sample * stride + token, mask=inside, other=float("-inf")).to(tl.float32)
    heat = tl.load(temperature + sample)
    if heat > 0:
        low, high = key_of(states, sample)
        value = value / heat + gumbel(token.to(tl.uint32), low, high)
        value = tl.where(inside, value, float("-inf"))
    top = tl.max(value, 0)
    place = sample * tl.num_programs(0) + chunk
    tl.store(best + place, top)
    tl.store(token_of_best + place, tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0))


@triton.jit
def _best_of_row(best, token_of_best, out, chunks, BLOCK: tl.constexpr):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, BLOCK)
    value = tl.load(best + sample * chunks + chunk, mask=chunk < chunks, other=float("-inf"))
    token = tl.load(token_of_best + sample * chunks + chunk, mask=chunk < chunks, other=0x7FFFFFFF)
    tl.store(out + sample, tl.min(tl.where(value == tl.max(value, 0), token, 0x7FFFFFFF), 0))


@triton.jit
def key_of(states, sample):
    """The two words that a sample's noise begins with."""
    z = tl.load(states + sample).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^= z >> 31
    return z.to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def gumbel(token, low, high):
    x = _mix32(_mix32(token ^ low) ^ high)
    v = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # -log1p(-v) from log alone, to the last bits: the rounding of 1 - v is divided out again.
    u = 1.0 - v
    spread = tl.where(u == 1.0, 1.0, 1.0 - u)
    return -tl.log(tl.where(u == 1.0, v, -tl.log(u) * (v / spread)))


@triton.jit
def _mix32(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x
