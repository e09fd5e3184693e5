"""Workloads as lists of token ids with a number of tokens to generate each, made from a seed: the same everywhere."""

import math
from collections.abc import Callable
from random import Random

from octavo.errors import ConfigError, nearest

Workload = tuple[list[list[int]], list[int]]  # prompts, tokens to generate
_LOW, _HIGH = 100, 40_000  # ids drawn: past the special tokens, within every common vocabulary


def fixed(count: int, input_len: int, output_len: int, seed: int = 1, high: int = _HIGH) -> Workload:
    """`count` prompts of one length."""
    random = Random(seed)
    return [[random.randint(_LOW, high) for _ in range(input_len)] for _ in range(count)], [output_len] * count


def between(count: int, inputs: tuple[int, int], outputs: tuple[int, int], seed: int) -> Workload:
    """Prompts and answers of lengths from the first to the second of each, prompts of tokens that every model has."""
    random = Random(seed)
    prompts = [[random.randint(_LOW, 1000) for _ in range(random.randint(*inputs))] for _ in range(count)]
    return prompts, [random.randint(*outputs) for _ in range(count)]


def mixed(count: int, low: int, high: int, seed: int = 0) -> Workload:
    """Prompts and answers of `low` to `high` tokens."""
    random = Random(seed)
    prompts = [[random.randint(_LOW, _HIGH) for _ in range(random.randint(low, high))] for _ in range(count)]
    return prompts, [random.randint(low, high) for _ in range(count)]


def shared(count: int, prefix_len: int, own_len: int, output_len: int, seed: int = 2) -> Workload:
    """Prompts that begin alike."""
    random = Random(seed)
    prefix = [random.randint(_LOW, _HIGH) for _ in range(prefix_len)]
    prompts = [prefix + [random.randint(_LOW, _HIGH) for _ in range(own_len)] for _ in range(count)]
    return prompts, [output_len] * count


# Mean tokens of a prompt and of an answer in two data sets (Kwon et al. 2023, figure 11).
LENGTHS = {"alpaca": (19.31, 58.45), "sharegpt": (161.31, 337.99)}
_SPREAD = 1.0  # standard deviation of the logarithm of a length: an assumption, the means alone are published


def drawn(name: str, count: int, seed: int = 3) -> Workload:
    """Prompts and answers whose lengths are log-normal with the means of `LENGTHS`, and at most 1024 tokens each."""
    random = Random(seed)

    def length(mean: float) -> int:
        return min(1024, max(1, round(mean * math.exp(random.gauss(-(_SPREAD**2) / 2, _SPREAD)))))

    mean_input, mean_output = LENGTHS[name]
    shapes = [(length(mean_input), length(mean_output)) for _ in range(count)]
    prompts = [[random.randint(_LOW, _HIGH) for _ in range(given)] for given, _ in shapes]
    return prompts, [answer for _, answer in shapes]


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "decode1": lambda: fixed(1, 64, 128),
    "decode8": lambda: fixed(8, 64, 128),
    "mixed64": lambda: mixed(64, 32, 256),
    "prefill8x1024": lambda: fixed(8, 1024, 1),
    "shared512x32": lambda: shared(32, 512, 32, 64),
}


def workload(name: str) -> Workload:
    """A workload by its name."""
    if name not in WORKLOADS:
        raise ConfigError(f"there is no workload {name!r}.{nearest(name, WORKLOADS)} Known: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]()
