"""Penalties for the tokens that samples have so far, on logits where they lie.

One of them may be known to the device alone: it was drawn in the step before. Shapes: S samples, V vocabulary, F
samples with penalties.
"""

import numpy as np
import torch
import triton
import triton.language as tl

from octavo.batch import SamplingColumns
from octavo.ops.transfer import on_device


def penalize(logits_SV: torch.Tensor, columns: SamplingColumns, before_S: torch.Tensor) -> None:
    """As `octavo.runner.sampler.penalize`; a pending token is looked up in `before_S` (int32)."""
    F = len(columns.penalty_sample)
    numbers = (
        columns.penalty_start,
        columns.penalty_sample,
        columns.penalty_pending,
        columns.repetition_penalty.view(np.int32),
        columns.presence_penalty.view(np.int32),
        columns.frequency_penalty.view(np.int32),
        columns.penalty_token,
        columns.penalty_count,
    )
    sent = on_device(np.concatenate(numbers), logits_SV.device)
    start, sample, pending, *penalties, token, count = sent.split([len(each) for each in numbers])
    repetition, presence, frequency = (each.view(torch.float32) for each in penalties)
    _penalize[(F,)](
        *(logits_SV, before_S, start, sample, pending, repetition, presence, frequency, token, count),
        logits_SV.stride(0),
        BLOCK=1024,
        num_warps=4,
    )


# Where arrays begin, and how long rows are, makes no difference to speak of, but each would be a compilation.
@triton.jit(
    do_not_specialize=["stride"],
    do_not_specialize_on_alignment=[
        *("start", "sample", "pending", "repetition", "presence", "frequency", "token", "count"),
    ],
)
def _penalize(
    logits,
    before,
    start,
    sample,
    pending,
    repetition,
    presence,
    frequency,
    token,
    count,
    stride,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(0)
    row = logits + tl.load(sample + which).to(tl.int64) * stride
    penalties = (tl.load(repetition + which), tl.load(presence + which), tl.load(frequency + which))
    waiting = tl.load(pending + which)
    last = tl.load(before + (-1 - waiting), mask=waiting < 0, other=-1)
    last = tl.where(waiting < 0, tl.maximum(last, 0), -1)  # where none could be drawn, nobody reads this row
    found = 0
    end = tl.load(start + which + 1)
    for first in range(tl.load(start + which), end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        known = tl.load(token + at, mask=at < end, other=0)
        again = (known == last) & (at < end)
        found += tl.sum(again.to(tl.int32), 0)
        value = tl.load(row + known, mask=at < end)
        times = tl.load(count + at, mask=at < end, other=0) + again.to(tl.int32)
        tl.store(row + known, _penalized(value, times, penalties), mask=at < end)
    if (waiting < 0) & (found == 0):
        tl.store(row + last, _penalized(tl.load(row + last), 1, penalties))


@triton.jit
def _penalized(value, times, penalties):
    repetition, presence, frequency = penalties
    value = tl.where(value > 0, tl.div_rn(value, repetition), value * repetition)
    return value - frequency * times - tl.where(times > 0, presence, 0.0)
