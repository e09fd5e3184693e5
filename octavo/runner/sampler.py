"""From logits to tokens: bias, lists, penalties, temperature, filters, and the draw; and log probabilities.

A token depends on its own row of logits, parameters, seed and counter alone, never on the other rows: only
operations that treat rows apart are used. Work that a row does not ask for is not done for it.

Shapes: S samples, V vocabulary, F samples that ask for a feature, E entries of log probabilities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from octavo.batch import NO_TOKEN, NOT_FINITE, Floats, Ints, LogprobColumns, PromptLogprobs, SamplingColumns
from octavo.ops.transfer import on_device
from octavo.runner import noise

# A nucleus is sought among so many of the likeliest tokens first: sorting a whole vocabulary is slow.
_NUCLEUS_GUESS = 1024
# Prompt positions whose logits are alive at once: a chunk's worth for a large vocabulary would be gigabytes.
_PROMPT_LOGPROBS_AT_ONCE = 64


class Draw(Protocol):
    """The last part of sampling: temperature, filters, and the draw; it may use the logits up."""

    def __call__(self, logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
        """A token a row, or `NO_TOKEN` or `NOT_FINITE`, [S] int64."""


@dataclass(slots=True)
class Found:
    """Log probabilities of some samples where they were computed, perhaps on their way from there. E entries, k + 1 of
    each."""

    token_ids_EK: torch.Tensor
    logprobs_EK: torch.Tensor
    rank_E: torch.Tensor

    def to_host(self) -> "Found":
        """Copied into the host's memory; from a GPU that takes until the device comes to it."""
        tensors = (self.token_ids_EK, self.logprobs_EK, self.rank_E)
        return Found(*(tensor.to("cpu", non_blocking=True) for tensor in tensors))

    def columns(self) -> LogprobColumns:
        """Of what is in the host's memory."""
        return LogprobColumns(self.token_ids_EK.numpy(), self.logprobs_EK.numpy(), self.rank_E.numpy())


def _index(rows: NDArray[np.integer], like: torch.Tensor) -> torch.Tensor:
    return on_device(rows, like.device).long()


def _add_bias(logits_SV: torch.Tensor, columns: SamplingColumns) -> None:
    if len(columns.bias_sample):
        at = (_index(columns.bias_sample, logits_SV), _index(columns.bias_token, logits_SV))
        logits_SV.index_put_(at, on_device(columns.bias_value, logits_SV.device), accumulate=True)


def _keep_allowed(logits_SV: torch.Tensor, columns: SamplingColumns) -> None:
    if len(columns.allowed_sample):
        samples_F = _index(columns.allowed_sample, logits_SV)
        lengths = np.diff(columns.allowed_start)
        of_entry = np.repeat(np.arange(len(lengths)), lengths)
        forbidden_FV = torch.ones(len(lengths), logits_SV.shape[1], dtype=torch.bool, device=logits_SV.device)
        forbidden_FV[_index(of_entry, logits_SV), _index(columns.allowed_token, logits_SV)] = False
        logits_SV[samples_F] = logits_SV[samples_F].masked_fill_(forbidden_FV, float("-inf"))


def penalize(logits_SV: torch.Tensor, columns: SamplingColumns) -> None:
    """Repetition (over prompt and answer, Keskar et al. 2019), then frequency and presence (answer), on the logits of
    the tokens that samples have so far."""
    assert not (columns.penalty_pending < 0).any(), "there is a penalty for a token that nobody knows here"
    of_entry = np.repeat(np.arange(len(columns.penalty_sample)), np.diff(columns.penalty_start))
    at_E = (_index(columns.penalty_sample[of_entry], logits_SV), _index(columns.penalty_token, logits_SV))
    penalties = np.stack((columns.repetition_penalty, columns.presence_penalty, columns.frequency_penalty))
    repetition_E, presence_E, frequency_E = on_device(penalties[:, of_entry], logits_SV.device)
    count_E = on_device(columns.penalty_count, logits_SV.device)
    logits_E = logits_SV[at_E]
    logits_E = torch.where(logits_E > 0, logits_E / repetition_E, logits_E * repetition_E)
    logits_SV[at_E] = logits_E - frequency_E * count_E - presence_E * (count_E > 0)


def sample(
    logits_SV: torch.Tensor,
    columns: SamplingColumns,
    draw_tokens: Draw | None = None,
    put_penalties: Callable[[torch.Tensor, SamplingColumns], None] = penalize,
) -> tuple[torch.Tensor, Found | None]:
    """A token a row, [S] int64, and log probabilities of the rows that ask. `logits_SV` (fp32) is used up.

    Order: bias, allowed lists, penalties; then argmax where temperature is 0, else temperature, top_k, top_p,
    min_p and a Gumbel-max draw. Ties go to the lowest token id. Two parts may be another's, that do the same.
    """
    asks = np.flatnonzero(columns.num_logprobs >= 0)
    raw_EV = logits_SV[_index(asks, logits_SV)] if len(asks) else None
    _add_bias(logits_SV, columns)
    _keep_allowed(logits_SV, columns)
    if len(columns.penalty_sample):
        put_penalties(logits_SV, columns)
    tokens_S = (draw_tokens or draw)(logits_SV, columns)
    if raw_EV is None:
        return tokens_S, None
    return tokens_S, logprobs(raw_EV, tokens_S[_index(asks, logits_SV)], int(columns.num_logprobs.max()))


def _column(values: Floats | Ints, like: torch.Tensor) -> torch.Tensor:
    return on_device(values, like.device)[:, None]


def draw(logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    """`Draw` in torch, on any device."""
    most_S = logits_SV.amax(dim=-1)  # NaN if there is one
    nothing_S = torch.where(most_S == float("-inf"), NO_TOKEN, NOT_FINITE)
    return torch.where(most_S.isfinite(), _draw(logits_SV, columns), nothing_S)


def _draw(logits_SV: torch.Tensor, columns: SamplingColumns) -> torch.Tensor:
    drawn = np.flatnonzero(columns.temperature > 0)
    if not len(drawn):
        return logits_SV.argmax(dim=-1)
    everyone = len(drawn) == len(logits_SV)
    rows_F = _index(drawn, logits_SV)
    scaled_FV = logits_SV if everyone else logits_SV[rows_F]
    # Relative to the likeliest token, so that a tiny temperature cannot overflow.
    scaled_FV = (scaled_FV - scaled_FV.amax(dim=-1, keepdim=True)) / _column(columns.temperature[drawn], logits_SV)
    _filter(scaled_FV, columns.top_k[drawn], columns.top_p[drawn], columns.min_p[drawn])
    keys_F2 = on_device(noise.keys(columns.seed[drawn], columns.counter[drawn]), logits_SV.device)
    tokens_F = scaled_FV.add_(noise.gumbel(keys_F2, logits_SV.shape[1])).argmax(dim=-1)
    return tokens_F if everyone else logits_SV.argmax(dim=-1).index_copy_(0, rows_F, tokens_F)


def _filter(scaled_FV: torch.Tensor, top_k: Ints, top_p: Floats, min_p: Floats) -> None:
    """Sets what the filters drop to -inf. Each filter is a threshold, so equal logits stay or go together."""
    rows = np.flatnonzero((top_k > 0) & (top_k < scaled_FV.shape[1]))
    if len(rows):
        _drop_below(scaled_FV, rows, _kth_largest(scaled_FV[_index(rows, scaled_FV)], top_k[rows]))
    rows = np.flatnonzero(top_p < 1)
    if len(rows):
        _drop_below(scaled_FV, rows, _nucleus_edge(scaled_FV[_index(rows, scaled_FV)], top_p[rows]))
    rows = np.flatnonzero(min_p > 0)
    if len(rows):
        # The likeliest token stands at 0 and survives every filter: min_p of its probability is log(min_p).
        _drop_below(scaled_FV, rows, _column(np.log(min_p[rows]), scaled_FV))


def _drop_below(scaled_FV: torch.Tensor, rows: NDArray[np.integer], edge_F1: torch.Tensor) -> None:
    index = _index(rows, scaled_FV)
    kept_FV = scaled_FV[index]
    scaled_FV[index] = kept_FV.masked_fill_(kept_FV < edge_F1, float("-inf"))


def _kth_largest(scaled_FV: torch.Tensor, top_k: Ints) -> torch.Tensor:
    largest = scaled_FV.topk(int(top_k.max()), dim=-1).values
    return largest.gather(1, _index(top_k, scaled_FV)[:, None] - 1)


def _nucleus_edge(scaled_FV: torch.Tensor, top_p: Floats) -> torch.Tensor:
    """The nucleus' smallest logit, [F, 1]: a token is in it while those above hold less than top_p."""
    probs_FV = torch.softmax(scaled_FV, dim=-1)
    size = min(_NUCLEUS_GUESS, scaled_FV.shape[1])
    logits, order = scaled_FV.topk(size, dim=-1)
    edge_F1, found_F = _edge(logits, probs_FV.gather(1, order), top_p)
    # A row's answer must not depend on its neighbours: only rows whose nucleus is larger are sorted as a
    # whole.
    if size < scaled_FV.shape[1] and not bool(found_F.all()):
        wide = (~found_F).nonzero()[:, 0]
        logits, order = scaled_FV[wide].sort(dim=-1, descending=True)
        edge_F1[wide] = _edge(logits, probs_FV[wide].gather(1, order), top_p[wide.cpu().numpy()])[0]
    return edge_F1


def _edge(logits: torch.Tensor, probs: torch.Tensor, top_p: Floats) -> tuple[torch.Tensor, torch.Tensor]:
    """(the nucleus' smallest logit, whether it certainly lies among the given, which fall)."""
    above = probs.cumsum(dim=-1) - probs
    inside = above < _column(top_p, logits)
    last = inside.sum(dim=-1, keepdim=True).clamp_(min=1) - 1
    return logits.gather(1, last), ~inside[:, -1]


def logprobs(logits_EV: torch.Tensor, tokens_E: torch.Tensor, k: int) -> Found:
    """Log probabilities of `tokens_E` and of the `k` likeliest tokens; ties share the better rank. A token below 0
    stands for none, and its numbers for nothing."""
    tokens_E = tokens_E.clamp(min=0)
    all_EV = torch.log_softmax(logits_EV, dim=-1)
    chosen_E1 = all_EV.gather(1, tokens_E[:, None])
    best = all_EV.topk(min(k, all_EV.shape[1]), dim=-1)
    return Found(
        token_ids_EK=torch.cat((tokens_E[:, None], best.indices), dim=1).int(),
        logprobs_EK=torch.cat((chosen_E1, best.values), dim=1),
        rank_E=((all_EV > chosen_E1).sum(dim=-1) + 1).int(),
    )


def prompt_logprobs(logits_of: Callable[[Ints], torch.Tensor], asked: PromptLogprobs) -> LogprobColumns:
    """Log probabilities of the prompts' tokens that are `asked` for; `logits_of` gives those of some of the tokens."""
    k = int(asked.num_logprobs.max())
    parts = []
    for start in range(0, len(asked.target), _PROMPT_LOGPROBS_AT_ONCE):
        part = slice(start, start + _PROMPT_LOGPROBS_AT_ONCE)
        logits = logits_of(asked.token_index[part])
        found = logprobs(logits, _index(asked.target[part], logits), k)
        parts.append(Found(*(tensor.cpu() for tensor in (found.token_ids_EK, found.logprobs_EK, found.rank_E))))
    return LogprobColumns.of([part.columns() for part in parts])
