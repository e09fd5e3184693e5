"""Cases for draws, against the sampler in torch: the same tokens."""

from typing import Any

import numpy as np
import torch

from octavo.ops.triton.penalties import penalize
from octavo.ops.triton.sampling import Asked, draw
from octavo.runner import noise, sampler
from tests.steps import columns

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
# What users send, then what is hard: sets that are nearly nothing or nearly everything.
FILTERS: list[dict[str, Any]] = [
    {"top_k": 20, "top_p": 0.95, "temperature": 0.6},
    {"top_p": 0.8},
    {"top_k": 50},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    {"top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
    {"top_k": 1},
    {"top_k": 1 << 20, "top_p": 0.5},
    {"top_k": 400, "top_p": 0.7, "temperature": 3.0},
    {"top_p": 1e-6},
    {"top_p": 0.999, "temperature": 2.0},
    {"min_p": 1.0},
    {"min_p": 1e-9},
    {"temperature": 1e-4, "top_k": 3, "top_p": 0.5},
]


def logits(kind: str, rows: int, vocab_size: int, device: torch.device) -> torch.Tensor:
    """Rows of one kind, in fp32."""
    made = torch.randn(rows, vocab_size, device=device)
    if kind == "peaked":  # a few dozen tokens hold nearly everything, wherever they stand
        some = torch.randint(vocab_size, (rows, 40), device=device)
        made.scatter_(1, some, 18 + 3 * torch.randn(rows, 40, device=device))
    elif kind == "wide":
        made *= 3
    elif kind == "ties":  # both zeros among them
        made = (2 * made).round() / 2
    elif kind == "constant":
        made[:] = -1.5
    elif kind == "forbidden":  # all but five
        allowed = torch.randint(vocab_size, (rows, 5), device=device)
        made = torch.full_like(made, float("-inf")).scatter_(1, allowed, made.gather(1, allowed))
    elif kind == "one":
        made[:, vocab_size // 3] = 80.0
    else:
        assert kind == "flat"
    return made


KINDS = ("peaked", "flat", "wide", "ties", "constant", "forbidden", "one")


def drawn(logits_SV: torch.Tensor, num_tokens: int, **given: Any) -> list[int]:
    """By the kernels; `given` are columns, as numbers or lists."""
    chosen = _columns(len(logits_SV), given)
    device = logits_SV.device
    states = noise.states(chosen.seed, chosen.counter).view(np.int64)
    arrays = (states, chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
    out_S = torch.full((len(logits_SV),), -1, dtype=torch.int32, device=device)
    draw(logits_SV, Asked(*(torch.tensor(array, device=device) for array in arrays)), num_tokens, out_S)
    return out_S.tolist()


def expected(logits_SV: torch.Tensor, num_tokens: int, **given: Any) -> list[int]:
    """By the sampler."""
    return sampler.draw(logits_SV[:, :num_tokens].float(), _columns(len(logits_SV), given)).tolist()


def _columns(rows: int, given: dict[str, Any]) -> sampler.SamplingColumns:
    several = np.arange(rows)
    return columns(rows, **{"temperature": 1.0, "seed": several * 977 + 5, "counter": several, **OFF, **given})


def check_alike(kind: str, dtype: torch.dtype, rows: int, vocab_size: int, device: torch.device) -> None:
    """Each of `FILTERS` for all rows; what lies behind the last token is likelier than all tokens."""
    for given in FILTERS:
        logits_SV = logits(kind, rows, vocab_size, device).to(dtype)
        logits_SV[:, vocab_size - 7 :] = 100.0
        found, wanted = (function(logits_SV, vocab_size - 7, **given) for function in (drawn, expected))
        assert found == wanted, (kind, dtype, given)


def check_mixed(dtype: torch.dtype, vocab_size: int, device: torch.device) -> None:
    """Rows of all kinds with all filters, greedy and plain ones between them; and each row alone."""
    every = [{}, {"temperature": 0.0, "top_k": 5, "top_p": 0.1}, *FILTERS]
    given = {
        name: [filters.get(name, default) for filters in every for _ in KINDS]
        for name, default in {**OFF, "temperature": 1.0}.items()
    }
    rows = len(every) * len(KINDS)
    given["seed"], given["counter"] = list(range(rows)), [5 * i for i in range(rows)]
    logits_SV = torch.cat([logits(kind, 1, vocab_size, device) for _ in every for kind in KINDS]).to(dtype)
    found = drawn(logits_SV, vocab_size, **given)
    assert found == expected(logits_SV, vocab_size, **given)
    for i in range(0, rows, 4):
        alone = {name: column[i : i + 1] for name, column in given.items()}
        assert drawn(logits_SV[i : i + 1], vocab_size, **alone) == found[i : i + 1], (i, alone)


def check_edges(dtype: torch.dtype, rows: int, device: torch.device) -> None:
    """Sets that are known, each drawn from so often that all of it is seen, and nothing else."""
    low = float("-inf")
    cases: list[tuple[list[float], dict[str, Any], set[int]]] = [
        # Equal logits stay or go together.
        ([1, 2, 1, 0, 1, -3], {"top_k": 2}, {0, 1, 2, 4}),
        ([0.0, -0.0, 0.0, -1.0], {"top_k": 1}, {0, 1, 2}),
        ([0.0, *[-1.0] * 149, -0.0], {"top_k": 1}, {0, 150}),
        ([0, 0, 0, 0], {"top_p": 1e-6}, {0, 1, 2, 3}),
        # Two tokens hold exactly everything, or exactly half, where less than top_p must stand above.
        ([0, -200, 0, -200], {"top_p": 0.99}, {0, 2}),
        ([0, 0, low, low], {"top_p": 0.5, "top_k": 3}, {0, 1}),
        # top_p counts among what top_k left: 0.667 of it, but 0.615 of everything, stand above the third.
        ([2, 2, 1.3068528, 1.3068528, 0.5], {"top_k": 3, "top_p": 0.7}, {0, 1, 2, 3}),
        ([2, 2, 0.9, -9, 0.5], {"top_k": 3, "top_p": 0.85}, {0, 1}),
        ([2, 2, 0.9, -9, 0.5], {"top_p": 0.85}, {0, 1, 2}),
        # min_p is of the likeliest token.
        ([4, 2, 1.5, 1], {"min_p": 0.1}, {0, 1}),
        ([4, 2, 1.5, 1], {"min_p": 0.1, "top_k": 3}, {0, 1}),
        ([4, 2, 1.5, 1], {"min_p": 0.1, "temperature": 2.0}, {0, 1, 2, 3}),
        ([4, 2, 1.5, 1], {"min_p": 0.1, "temperature": 2.0, "top_k": 3}, {0, 1, 2}),
        ([low, 5, low, low], {"top_k": 3, "top_p": 0.9}, {1}),
    ]
    for row, given, wanted in cases:
        logits_SV = torch.tensor([row] * rows, device=device).to(dtype)
        assert set(drawn(logits_SV, len(row), **given)) == wanted, (row, given)


def check_many_groups(k: int, group: int, rows: int, dtype: torch.dtype, device: torch.device) -> None:
    """A top_k over more groups than are held at once: of `k` + 1 likely tokens, two a group, the last is not drawn."""
    several = torch.arange(k + 1, device=device)
    likely = several // 2 * group + several % 2 * (group - 1)
    logits_SV = torch.full((rows, (k + 1) * group), -20.0, device=device)
    logits_SV[:, likely] = 2 - several / 128
    logits_SV = logits_SV.to(dtype)
    found = drawn(logits_SV, logits_SV.shape[1], top_k=k)
    assert found == expected(logits_SV, logits_SV.shape[1], top_k=k)
    assert set(found) <= set(likely[:k].tolist())
    assert int(likely[k]) in drawn(logits_SV, logits_SV.shape[1], top_k=k + 1), "it is never drawn anyway"


def check_penalties(device: torch.device) -> None:
    """Tokens that only the device knows: one that is new, one that stands in the prompt, one that was drawn before."""
    logits_SV = torch.randn(5, 4000, device=device)
    before_S = torch.tensor([8, 3, 700, 2999], dtype=torch.int32, device=device)
    own = [{3: 0, 4: 2}, {700: 1, 5: 0}, {token: token % 3 for token in range(2, 3000)}, {1: 1}]
    pending = [~0, ~2, ~3, 0]
    common = {
        "penalty_sample": [1, 4, 0, 2],
        "repetition_penalty": [1.5, 1.1, 1.2, 1.0],
        "presence_penalty": [0.3, 0.0, 0.1, -0.5],
        "frequency_penalty": [0.2, 0.4, 0.0, 0.0],
    }
    known = [dict(counts) for counts in own]
    for counts, name in zip(known, pending, strict=True):
        if name < 0:
            token = int(before_S[~name])
            counts[token] = counts.get(token, 0) + 1

    def given(counts: list[dict[int, int]], pending: list[int]) -> sampler.SamplingColumns:
        return columns(
            5,
            **common,
            penalty_pending=pending,
            penalty_start=np.cumsum([0, *map(len, counts)]),
            penalty_token=[token for each in counts for token in each],
            penalty_count=[count for each in counts for count in each.values()],
        )

    found, wanted = logits_SV.clone(), logits_SV.clone()
    penalize(found, given(own, pending), before_S)
    sampler.penalize(wanted, given(known, [0] * 4))
    torch.testing.assert_close(found, wanted)
    assert not torch.equal(wanted, logits_SV)
