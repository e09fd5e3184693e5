"""What many tests share: the default model, fetched once as a user would fetch it."""

from pathlib import Path

import pytest

from octavo.checkpoint import hub


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file, in the cache of the user (or of the CI job) that runs the tests."""
    return hub.pull("smollm2:135m")
