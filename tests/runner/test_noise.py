"""The noise: as its module's formulae say, computed here in plain integers, and as random as it should be."""

import math

import numpy as np
import torch

from octavo.runner import noise

KNOWN = [468372013, 4030417264, 1660976263, 1885687890]  # of seed 42, counter 3, tokens 0 to 3
MASK32, MASK64 = 2**32 - 1, 2**64 - 1


def plain_hash(seed: int, counter: int, token: int) -> int:
    def splitmix(state: int) -> int:
        z = (state + 0x9E3779B97F4A7C15) & MASK64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
        return x ^ (x >> 16)

    key = splitmix((splitmix(seed) + counter) & MASK64)
    return mix(mix(token ^ (key & MASK32)) ^ (key >> 32))


def keys(seeds: list[int], counters: list[int]) -> torch.Tensor:
    return torch.from_numpy(noise.keys(np.array(seeds, np.uint64), np.array(counters, np.int32)))


def test_bits() -> None:
    seeds, counters = [0, 1, 2**64 - 1, 12345678901234567], [0, 7, 100000, 2**31 - 1]
    found = noise.hash32(keys(seeds, counters), 500).numpy().view(np.uint32)
    for row, (seed, counter) in enumerate(zip(seeds, counters, strict=True)):
        assert found[row].tolist() == [plain_hash(seed, counter, token) for token in range(500)]


def test_known_values() -> None:
    # Written down, so that the noise of a seed never changes from one version to the next.
    assert noise.hash32(keys([42], [3]), 4).numpy().view(np.uint32)[0].tolist() == KNOWN


def test_noise_is_finite_and_gumbel() -> None:
    x = noise.gumbel(keys(list(range(64)), [0] * 64), 20000).double()
    assert torch.isfinite(x).all()
    assert abs(float(x.mean()) - 0.5772156649) < 0.01
    assert abs(float(x.var()) - math.pi**2 / 6) < 0.02
    for low in (-1.0, 0.0, 1.0, 3.0, 6.0):
        assert abs(float((x < low).double().mean()) - math.exp(-math.exp(-low))) < 0.002


def test_the_largest_hash_is_finite_too() -> None:
    x = torch.tensor([-1, 0, 1, -(2**31)], dtype=torch.int32)
    v = (x.long() & MASK32).float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    assert torch.isfinite(-torch.log(-torch.log1p(-v))).all()


def test_neighbours_are_independent() -> None:
    u = noise.hash32(keys([5] * 50 + list(range(100, 150)), list(range(50)) + [0] * 50), 4000).numpy().view(np.uint32)
    correlations = np.corrcoef(u / 2.0**32) - np.eye(100)
    assert np.abs(correlations).max() < 0.08
    assert abs(np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel())[0, 1]) < 0.01
