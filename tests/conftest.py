"""What many tests share: the default model, fetched once as a user would fetch it."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from octavo.checkpoint import hub
from octavo.log import logger

# Triton's own functions become the interpreter's when Triton is first imported, whoever does that.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# They have an environment of their own, see scripts/clients.
collect_ignore = ["clients"]

# Tiny tensors gain nothing from threads, and spinning ones slow every other process of the machine down.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, in the cache of the user (or of the CI job) that runs the tests."""
    return hub.pull("smollm2:135m")


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """The command line sets the logger up for its process; here each test finds it as it is imported."""
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before
