"""From the host's memory to a device's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


def on_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`. A GPU makes it when it comes to it: nobody waits."""
    import torch  # whoever computes on the CPU's kernels alone never loads it

    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
