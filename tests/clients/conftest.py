"""Servers for other people's clients: real processes, the default model, a key, two names."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-test"
NAME = "smollm2"


@contextmanager
def running(log: Path, *words: str) -> Iterator[str]:
    """The URL of a server that `octavo WORDS` starts in Octavo's own environment."""
    python = os.environ.get("OCTAVO_PYTHON") or ROOT / ".venv/bin/python"
    command = [str(python), "-m", "octavo", *words, "--port", "0", "--api-key", KEY]
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert " is served at http://" in first, log.read_text()
        yield first.split()[-1]
    finally:
        process.terminate()
        process.wait(30)
        sys.stderr.write("".join(log.read_text().splitlines(keepends=True)[-20:]))


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`octavo serve`, up to /v1."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(log, "serve", "smollm2:135m", "--served-model-name", NAME, "org/model", "--log-requests") as found:
        yield f"{found}/v1"
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="session")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`octavo deploy`, up to /v1."""
    log = tmp_path_factory.mktemp("deploy") / "log"
    words = ("--model", "smollm2:135m", "--served-model-name", NAME, "--host", "127.0.0.1")
    with running(log, "deploy", "--template_type", "chatml", *words) as found:
        yield f"{found}/v1"
    assert "Traceback" not in log.read_text()
