"""What positions do to queries and keys: cos and sin under every scaling rule that `RopeConfig` names, and logn.

Rotating and scaling is an op; here only the numbers are made, in fp32: once a step in torch on its device, or as tables
by position for who has no torch. Frequencies are computed once, by numpy.

Shapes: T tokens, r/2 angles of a head (r its rotary width).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from octavo.config import RopeConfig

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float32]


class Rope:
    """Angles of one model: `RopeConfig` made into frequencies, on a device unless only `table` is asked for.

    Sources: linear, dynamic NTK and llama3 as in Hugging Face's `config.json` convention; YaRN by Peng et al.
    2023 (arXiv:2309.00071).
    """

    def __init__(self, config: RopeConfig, device: torch.device | None = None):
        self.config = config
        self.magnitude = _magnitude(config)
        self._frequencies = _scaled_frequencies(config)
        if device is not None:
            import torch

            self.inv_freq = torch.from_numpy(self._frequencies).to(device)
            self.exponents = torch.from_numpy(_exponents(config.rotary_dim)).to(device)

    def table(self, length: int, alpha: float = 1.0) -> tuple[Floats, Floats]:
        """cos and sin of the positions up to `length`, each [length, r/2]; `alpha` is the factor on the base."""
        frequencies = self._frequencies
        if alpha != 1.0:
            width = self.config.rotary_dim
            base = self.config.theta * alpha ** (width / (width - 2))
            frequencies = (1.0 / base ** _exponents(width).astype(np.float64)).astype(np.float32)
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
        # In fp64, since numpy's fp32 functions are the less exact ones.
        wide = angles.astype(np.float64)
        magnitude = np.float32(self.magnitude)
        return np.cos(wide).astype(np.float32) * magnitude, np.sin(wide).astype(np.float32) * magnitude

    def q_scale_table(self, length: int) -> Floats | None:
        """`q_scale` of the positions up to `length`."""
        if not self.config.logn_length:
            return None
        growth = np.log(np.arange(1, length + 1, dtype=np.float64)) / math.log(self.config.logn_length)
        return np.maximum(growth, 1.0).astype(np.float32)

    def angles(
        self, positions_T: torch.Tensor, alpha_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """cos and sin, as `cos_sin`, and `q_scale`."""
        return *self.cos_sin(positions_T, alpha_T), self.q_scale(positions_T)

    def cos_sin(
        self, positions_T: torch.Tensor, alpha_T: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each [T, r/2] in fp32. `alpha_T`: each token's factor on the base (`ntk_alpha`)."""
        if alpha_T is None:
            inv_freq = self.inv_freq[None]
        else:
            width = self.config.rotary_dim
            base_T = self.config.theta * alpha_T.double() ** (width / (width - 2))
            stretched = (1.0 / base_T[:, None] ** self.exponents).float()
            # A sequence without a stretch has the bits that it has in a step where nobody is stretched.
            inv_freq = stretched.where(alpha_T[:, None] != 1.0, self.inv_freq)
        angles_Tr = positions_T.float()[:, None] * inv_freq
        return angles_Tr.cos() * self.magnitude, angles_Tr.sin() * self.magnitude

    def q_scale(self, positions_T: torch.Tensor) -> torch.Tensor | None:
        """Each query's factor, [T] in fp32: it keeps attention as sharp over many keys as over the trained length.

        Source: Su 2021, https://kexue.fm/archives/8823. None for a model without this rule; for one with it always
        a tensor, so that a step's calls do not depend on its lengths.
        """
        length = self.config.logn_length
        if not length:
            return None
        return ((positions_T + 1).double().log() / math.log(length)).clamp(min=1.0).float()


def _exponents(rotary_dim: int) -> Floats:
    return np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)


def _scaled_frequencies(config: RopeConfig) -> Floats:
    # The power in fp64, rounded: what torch and the models' own code have, where fp32's of numpy is a bit off.
    inv_freq: Floats = np.float32(1) / (config.theta ** _exponents(config.rotary_dim).astype(np.float64)).astype(
        np.float32
    )
    if config.freq_factors:
        factors: Floats = np.array(config.freq_factors, np.float32)
        inv_freq = inv_freq / factors
    if config.scaling == "linear":
        return inv_freq / np.float32(config.factor)
    if config.scaling == "llama3":
        return _llama3(inv_freq, config)
    if config.scaling == "yarn":
        return _yarn(inv_freq, config)
    return inv_freq


def _llama3(inv_freq: Floats, config: RopeConfig) -> Floats:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended by wavelength."""
    turns = config.original_max_position * inv_freq / np.float32(2 * math.pi)
    low, high = np.float32(config.low_freq_factor), np.float32(config.high_freq_factor)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    scaled: Floats = keep * inv_freq + (1 - keep) * inv_freq / np.float32(config.factor)
    return scaled


def _yarn(inv_freq: Floats, config: RopeConfig) -> Floats:
    """As llama3, but blended along the index, from the one that turns beta_fast times to beta_slow."""

    def index_of(turns: float) -> float:
        wavelength = config.original_max_position / (turns * 2 * math.pi)
        return config.rotary_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = index_of(config.beta_fast), index_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    if low == high:
        high += 0.001  # a step, without a division by zero
    index = np.arange(len(inv_freq), dtype=np.float32)
    scaled = np.clip((index - np.float32(low)) / np.float32(high - low), 0, 1)
    blended: Floats = scaled * inv_freq / np.float32(config.factor) + (1 - scaled) * inv_freq
    return blended


def _magnitude(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.scaling == "yarn" and config.factor > 1:
        return 0.1 * math.log(config.factor) + 1.0
    return 1.0
