"""Rotary angles not met by the parity tests: factors by frequency, partial width, each row's own base."""

import math

import pytest
import torch

from octavo.config import RopeConfig
from octavo.layers.rope import Rope

CPU = torch.device("cpu")


def test_freq_factors_divide_each_frequency() -> None:
    positions = torch.tensor([0, 3, 11], dtype=torch.int32)
    plain = Rope(RopeConfig(theta=100.0, rotary_dim=8), CPU)
    factored = Rope(RopeConfig(theta=100.0, rotary_dim=8, freq_factors=(1.0, 2.0, 4.0, 8.0)), CPU)
    cos, sin = factored.cos_sin(positions)
    angles = positions[:, None] * plain.inv_freq / torch.tensor([1.0, 2.0, 4.0, 8.0])
    torch.testing.assert_close(cos, angles.cos())
    torch.testing.assert_close(sin, angles.sin())


def test_partial_width_has_its_own_frequencies() -> None:
    cos, _ = Rope(RopeConfig(theta=100.0, rotary_dim=4), CPU).cos_sin(torch.tensor([1]))
    torch.testing.assert_close(cos, torch.tensor([[math.cos(1.0), math.cos(0.1)]]))


def test_alpha_stretches_the_base_of_its_rows_only() -> None:
    config = RopeConfig(theta=100.0, rotary_dim=8, scaling="dynamic", factor=2.0, original_max_position=10)
    rope = Rope(config, CPU)
    positions = torch.tensor([5, 5])
    cos, _ = rope.cos_sin(positions, torch.tensor([1.0, config.ntk_alpha(30)]))
    torch.testing.assert_close(cos[:1], rope.cos_sin(positions[:1])[0])
    base = 100.0 * (2 * 30 / 10 - 1) ** (8 / 6)
    torch.testing.assert_close(cos[1], torch.tensor([math.cos(5 / base ** (i / 8)) for i in (0, 2, 4, 6)]))


@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize(
    "config",
    [
        RopeConfig(theta=100.0, rotary_dim=8, freq_factors=(1.0, 2.0, 4.0, 8.0)),
        RopeConfig(theta=5e5, rotary_dim=64, scaling="llama3", factor=8.0, original_max_position=100),
        RopeConfig(theta=1e4, rotary_dim=32, scaling="yarn", factor=4.0, original_max_position=64, logn_length=50),
    ],
    ids=lambda config: config.scaling,
)
def test_tables_are_what_a_step_computes(config: RopeConfig, alpha: float) -> None:
    rope = Rope(config, CPU)
    positions = torch.arange(300)
    stretch = None if alpha == 1.0 else torch.full((300,), alpha)
    for table, wanted in zip(rope.table(300, alpha), rope.cos_sin(positions, stretch), strict=True):
        torch.testing.assert_close(torch.from_numpy(table), wanted, atol=2e-7, rtol=0)
    scale, wanted_scale = rope.q_scale_table(300), rope.q_scale(positions)
    assert (scale is None) == (wanted_scale is None)
    if scale is not None:
        torch.testing.assert_close(torch.from_numpy(scale), wanted_scale)


@pytest.mark.parametrize(("given", "expected"), [(None, 0.1 * math.log(4) + 1), (0.5, 0.5)])
def test_yarn_magnitude(given: float | None, expected: float) -> None:
    config = RopeConfig(rotary_dim=8, scaling="yarn", factor=4.0, original_max_position=32, attention_factor=given)
    cos, sin = Rope(config, CPU).cos_sin(torch.tensor([7]))
    torch.testing.assert_close(cos**2 + sin**2, torch.full((1, 4), expected**2))
