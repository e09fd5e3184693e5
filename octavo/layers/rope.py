"""What positions do to queries and keys: cos and sin under every scaling rule that `RopeConfig` names, and logn.

Rotating and scaling is an op; here only the numbers are made, in fp32, once a step.

Shapes: T tokens, r/2 angles of a head (r its rotary width).
"""

import math

import torch

from octavo.config import RopeConfig


class Rope:
    """Angles of one model: `RopeConfig` made into frequencies on a device.

    Sources: linear, dynamic NTK and llama3 as in Hugging Face's `config.json` convention; YaRN by Peng et al.
    2023 (arXiv:2309.00071).
    """

    def __init__(self, config: RopeConfig, device: torch.device):
        self.config = config
        self.inv_freq = _scaled_frequencies(config).to(device)
        self.exponents = _exponents(config.rotary_dim).to(device)
        self.magnitude = _magnitude(config)

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
            inv_freq = torch.where(alpha_T[:, None] == 1.0, self.inv_freq, stretched)
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


def _exponents(rotary_dim: int) -> torch.Tensor:
    return torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim


def _scaled_frequencies(config: RopeConfig) -> torch.Tensor:
    inv_freq = 1.0 / config.theta ** _exponents(config.rotary_dim)
    if config.freq_factors:
        inv_freq = inv_freq / torch.tensor(config.freq_factors, dtype=torch.float32)
    if config.scaling == "linear":
        return inv_freq / config.factor
    if config.scaling == "llama3":
        return _llama3(inv_freq, config)
    if config.scaling == "yarn":
        return _yarn(inv_freq, config)
    return inv_freq


def _llama3(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Slow frequencies are divided by the factor, fast ones kept, those between blended by wavelength."""
    turns = config.original_max_position * inv_freq / (2 * math.pi)
    keep = ((turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)).clamp(0, 1)
    return keep * inv_freq + (1 - keep) * inv_freq / config.factor


def _yarn(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
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
    scaled = ((torch.arange(len(inv_freq), dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return scaled * inv_freq / config.factor + (1 - scaled) * inv_freq


def _magnitude(config: RopeConfig) -> float:
    if config.attention_factor is not None:
        return config.attention_factor
    if config.scaling == "yarn" and config.factor > 1:
        return 0.1 * math.log(config.factor) + 1.0
    return 1.0
