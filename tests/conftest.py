"""What many tests share: the default model, fetched once as a user would fetch it."""

import os
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import hub

# Triton's own functions become the interpreter's when Triton is first imported, whoever does that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Tiny tensors gain nothing from threads, and spinning ones slow every other process of the machine down.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, in the cache of the user (or of the CI job) that runs the tests."""
    return hub.pull("smollm2:135m")
