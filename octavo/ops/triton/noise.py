"""The noise of `octavo.runner.noise`, which gives its formulae, for kernels that draw."""

import triton
import triton.language as tl


@triton.jit
def key_of(states, sample):
    """What a sample's two words are to `hash32`."""
    z = tl.load(states + sample).to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z ^= z >> 31
    return fold(z.to(tl.uint32)), fold((z >> 32).to(tl.uint32))


@triton.jit
def gumbel(token, low, high):
    x = hash32(fold(token) ^ low, high)
    v = tl.minimum((x.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994039535522)
    # -log1p(-v) from log alone, to the last bits: the rounding of 1 - v is divided out again.
    u = 1.0 - v
    spread = tl.where(u == 1.0, 1.0, 1.0 - u)
    return -tl.log(tl.where(u == 1.0, v, -tl.log(u) * (v / spread)))


@triton.jit
def hash32(z, high):
    """x of a token, where z is `fold(token) ^ low`. Folding is linear in xor and undoes itself: where one mix ends and
    the next begins two folds meet, and what is left of them is that of the key."""
    return fold(_mix(_mix(z) ^ high))


@triton.jit
def fold(x):
    return x ^ (x >> 16)


@triton.jit
def _mix(x):
    """`mix32` between its folds."""
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x
