"""Cases for draws, against the sampler in torch: the same tokens."""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from octavo.batch import NO_TOKEN, NOT_FINITE
from octavo.ops.triton import sampling
from octavo.ops.triton.noise import gumbel, key_of
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
    elif kind == "rivals":  # two hold everything, and often the better score has the lower bound
        made[:] = -40.0
        made[:, 3], made[:, vocab_size // 2] = 1.0, 0.0
    elif kind == "huge":  # noise is lost in roundings, so that scores are equal; the sampler's are not
        made = -3e6 + 4e5 * made.round()
    else:
        assert kind == "flat"
    return made


KINDS = ("peaked", "flat", "wide", "ties", "constant", "forbidden", "one", "rivals")


def drawn(logits_SV: torch.Tensor, num_tokens: int, **given: Any) -> list[int]:
    """By the kernels; `given` are columns, as numbers or lists."""
    device = logits_SV.device
    out_S = torch.full((len(logits_SV),), -1, dtype=torch.int32, device=device)
    draw(logits_SV, _asked(_columns(len(logits_SV), given), device), num_tokens, out_S)
    return out_S.tolist()


def _asked(chosen: sampler.SamplingColumns, device: torch.device) -> Asked:
    states = noise.states(chosen.seed, chosen.counter).view(np.int64)
    arrays = (states, chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p)
    return Asked(*(torch.tensor(array, device=device) for array in arrays))


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


@triton.jit
def _score(logits, states, temperature, scores, num_tokens, stride, BLOCK: tl.constexpr):
    sample = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = token < num_tokens
    low, high = key_of(states, sample)
    value = tl.load(logits + sample * stride + token, mask=inside).to(tl.float32)
    score = tl.div_rn(value, tl.load(temperature + sample)) + gumbel(token.to(tl.uint32), low, high)
    tl.store(scores + sample * num_tokens + token, score, mask=inside)


def check_scores(logits_SV: torch.Tensor, num_tokens: int, **given: Any) -> torch.Tensor:
    """The best of each chunk, bit for bit what it is when all tokens are scored, and the lowest that has it. Returns
    all scores."""
    S, V = logits_SV.shape
    device = logits_SV.device
    asked = _asked(_columns(S, given), device)
    scores_SV = torch.empty((S, num_tokens), device=device)
    _score[(triton.cdiv(num_tokens, 512), S)](
        logits_SV, asked.states_S, asked.temperature_S, scores_SV, num_tokens, V, BLOCK=512
    )
    chunk = sampling._CHUNK
    chunks, groups = triton.cdiv(num_tokens, chunk), triton.cdiv(num_tokens, sampling._GROUP)
    best_SC, peak_SC, mass_SC = torch.zeros((3, S, chunks), device=device).unbind()
    token_SC = torch.full((S, chunks), -1, dtype=torch.int32, device=device)
    peaks_SG = torch.zeros((S, groups), dtype=logits_SV.dtype, device=device)
    of_chunks = (best_SC, token_SC, peak_SC, mass_SC, peaks_SG)
    sizes = {"CHUNK": chunk, "GROUP": sampling._GROUP, "PIECE": sampling._PIECE, "CUDA": logits_SV.is_cuda}
    sampling._look_at_chunk[(chunks, S)](logits_SV, *asked, *of_chunks, num_tokens, V, groups, **sizes, num_warps=8)
    lowest = float("-inf")
    padded_SCN = torch.nn.functional.pad(scores_SV, (0, chunks * chunk - num_tokens), value=lowest).view(S, chunks, -1)
    top_SC = torch.where(padded_SCN.isnan(), lowest, padded_SCN).amax(2)
    numbers_SV = logits_SV[:, :num_tokens].float()
    numbers_SCN = torch.nn.functional.pad(numbers_SV, (0, chunks * chunk - num_tokens), value=lowest)
    finite_SC = (numbers_SCN.view(S, chunks, -1) < float("inf")).all(2)
    assert torch.equal(best_SC.isnan(), ~finite_SC), given
    assert torch.equal(best_SC[finite_SC].view(torch.int32), top_SC[finite_SC].view(torch.int32)), given
    wins_SCN = padded_SCN == top_SC[:, :, None]
    token_of_top_SC = wins_SCN.int().argmax(2) + chunk * torch.arange(chunks, device=device)
    numbers_SC = wins_SCN.any(2)  # a chunk of nothing but NaN has no best token
    assert torch.equal(token_SC[numbers_SC], token_of_top_SC[numbers_SC].int()), given
    return scores_SV


def check_no_numbers(device: torch.device) -> None:
    """Infinities and NaN, alone and among others."""
    low, high, none = float("-inf"), float("inf"), float("nan")
    logits_SV = torch.randn(9, 1100, device=device)
    logits_SV[0] = low
    logits_SV[1] = none
    logits_SV[2, :600] = none  # a whole chunk and some of the next
    logits_SV[3, ::2] = none
    logits_SV[4, :40] = none
    logits_SV[4, 40:] = low
    logits_SV[5, [9, 70, 400]] = high
    logits_SV[6, 30:] = low
    logits_SV[7, 100:] = none
    logits_SV[8, 700:] = low
    for temperature in (0.5, 3e38):
        check_scores(logits_SV, 1100, temperature=temperature)
    wanted = [NO_TOKEN, *[NOT_FINITE] * 5, None, NOT_FINITE, None]
    for given in ({"temperature": 0.0}, {"temperature": 0.5}, *FILTERS[:5:4]):
        found = drawn(logits_SV, 1100, **given)
        assert [None if token >= 0 else token for token in found] == wanted, given
        assert 0 <= found[6] < 30, given
        assert 0 <= found[8] < 700, given


# Seeds and tokens whose noise is the largest, twice, and the least that there is: x is 0 and 2^32 - 1.
ENDS = [(1654281, 819), (2232082, 591), (1343759, 21), (2077678, 410)]


def check_ends(seed: int, token: int, device: torch.device) -> None:
    """A token of extreme noise alone, and beside one that is nearly as good, or better or worse by far, or as good."""
    noise_V = check_scores(torch.zeros(1, 1100, device=device), 1100, seed=seed, counter=0)[0].cpu()
    key_S2 = torch.from_numpy(noise.keys(np.array([seed], np.uint64), np.zeros(1, np.int32)))
    torch.testing.assert_close(noise_V, noise.gumbel(key_S2, 1100)[0])
    # In another piece of the same chunk, or in another chunk, and such that the two can have equal scores.
    rivals = (token + 137 + 32 * torch.arange(8)) % 512
    equals = noise_V[token] - noise_V[rivals]
    i = int((equals + noise_V[rivals] == noise_V[token]).nonzero()[0])
    rival, equal = int(rivals[i]), equals[i].numpy()
    ahead = [-np.inf, -3, -1, -1e-3, 1e-3, 1, 3, *(np.spacing(equal) * np.arange(-4, 5))]
    logits_SV = torch.full((len(ahead), 1100), float("-inf"), device=device)
    logits_SV[:, token] = 0.0
    logits_SV[:, rival] = torch.tensor(equal + np.array(ahead, np.float32), device=device)
    scores_SV = check_scores(logits_SV, 1100, seed=seed, counter=0)
    assert (scores_SV[7:, token] == scores_SV[7:, rival]).any(), "no row has a tie"
    assert drawn(logits_SV, 1100, seed=seed, counter=0)[:7] == [token] * 4 + [rival] * 3
