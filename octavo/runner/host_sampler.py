"""What `sampler` does before and beside a draw, in numpy: bias, lists and penalties on logits, and log probabilities.

For a CPU whose engine runs without torch: no request may load it in the middle of a step (docs/decisions/0105). Rows
are computed one by one, so a row's numbers are the same bits in any batch.

Shapes: S samples, V vocabulary, E entries of log probabilities.
"""

from collections.abc import Callable

import numpy as np

from octavo.batch import Floats, Ints, LogprobColumns, PromptLogprobs, SamplingColumns

# Prompt positions whose logits are alive at once.
_PROMPT_LOGPROBS_AT_ONCE = 64


def change_logits(logits_SV: Floats, columns: SamplingColumns) -> None:
    """Bias, allowed lists and penalties, in this order, in place; the rules are those of `sampler`."""
    if len(columns.bias_sample):
        np.add.at(logits_SV, (columns.bias_sample, columns.bias_token), columns.bias_value)
    for i, sample in enumerate(columns.allowed_sample.tolist()):
        allowed = columns.allowed_token[columns.allowed_start[i] : columns.allowed_start[i + 1]]
        kept = logits_SV[sample, allowed]
        logits_SV[sample] = -np.inf
        logits_SV[sample, allowed] = kept
    if len(columns.penalty_sample):
        _penalize(logits_SV, columns)


def _penalize(logits_SV: Floats, columns: SamplingColumns) -> None:
    assert not (columns.penalty_pending < 0).any(), "there is a penalty for a token that nobody knows here"
    of_entry = np.repeat(np.arange(len(columns.penalty_sample)), np.diff(columns.penalty_start))
    at_E = columns.penalty_sample[of_entry], columns.penalty_token
    count_E = columns.penalty_count.astype(np.float32)
    repetition_E = columns.repetition_penalty[of_entry]
    logits_E = logits_SV[at_E]
    logits_E = np.where(logits_E > 0, logits_E / repetition_E, logits_E * repetition_E)
    logits_E -= columns.frequency_penalty[of_entry] * count_E
    logits_SV[at_E] = logits_E - columns.presence_penalty[of_entry] * (count_E > 0)


def logprobs(logits_EV: Floats, tokens_E: Ints, k: int) -> LogprobColumns:
    """Log probabilities of `tokens_E` and of the `k` likeliest tokens.

    Ties share the better rank, and of equally likely tokens the lowest come first. A token below 0 stands for none, and
    its numbers for nothing.
    """
    E, V = logits_EV.shape
    k = min(k, V)
    found = LogprobColumns(
        token_ids=np.empty((E, 1 + k), np.int32),
        logprobs=np.empty((E, 1 + k), np.float32),
        rank=np.empty(E, np.int32),
    )
    for e in range(E):
        row_V = logits_EV[e] - logits_EV[e].max()
        row_V -= np.log(np.exp(row_V).sum())
        token = max(0, int(tokens_E[e]))
        best = _likeliest(row_V, k)
        found.token_ids[e, 0], found.token_ids[e, 1:] = token, best
        found.logprobs[e, 0], found.logprobs[e, 1:] = row_V[token], row_V[best]
        found.rank[e] = np.count_nonzero(row_V > row_V[token]) + 1
    return found


def _likeliest(row_V: Floats, k: int) -> Ints:
    """The `k` largest entries' places, the largest first."""
    if k == 0:
        return np.empty(0, np.int32)
    edge = np.partition(row_V, len(row_V) - k)[len(row_V) - k]
    above = np.flatnonzero(row_V > edge)
    others = np.flatnonzero(~(row_V > edge) & ~(row_V < edge))[: k - len(above)]  # NaN among them
    chosen = np.concatenate((above, others))
    return chosen[np.lexsort((chosen, -row_V[chosen]))].astype(np.int32)


def prompt_logprobs(logits_of: Callable[[Ints], Floats], asked: PromptLogprobs) -> LogprobColumns:
    """Log probabilities of the prompts' tokens that are `asked` for; `logits_of` gives those of some of the tokens."""
    k = int(asked.num_logprobs.max())
    parts = []
    for start in range(0, len(asked.target), _PROMPT_LOGPROBS_AT_ONCE):
        part = slice(start, start + _PROMPT_LOGPROBS_AT_ONCE)
        parts.append(logprobs(logits_of(asked.token_index[part]), asked.target[part], k))
    return LogprobColumns.of(parts)
