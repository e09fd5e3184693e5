"""What is sent for a step's samples, and what of it stays for the next."""

import numpy as np
import pytest
import torch

from tests import interpreter
from tests.steps import columns

pytestmark = interpreter.MARKS


def test_padding_asks_for_nothing(without_a_gpu: list[object]) -> None:
    from octavo.runner.step_buffers import TURNS, StepBuffers

    buffers = StepBuffers(64, 4, torch.device("cpu"))
    for _ in range(TURNS + 1):
        for count in (4, 1):
            asked = columns(count, temperature=0.7, top_k=40, top_p=0.9, seed=range(count))
            buffers.send(np.arange(count) + 5, asked, {}, {})
            assert buffers.sample_index(4).tolist() == [5, 6, 7, 8][:count] + [0] * (4 - count)
            found = buffers.asked(4)
            assert found.temperature_S.tolist() == pytest.approx([0.7] * count + [0.0] * (4 - count))
            assert found.top_k_S[:count].tolist() == [40] * count
