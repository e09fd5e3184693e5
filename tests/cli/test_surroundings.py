"""Users without a home, terminals that are not UTF-8, streams that are closed: it works, or one line says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.served import save_tiny_model

# A user id without an entry in the user database, as containers have them.
NOBODY = """
import pwd

def unknown(*asked):
    raise KeyError("uid not found")

pwd.getpwuid = pwd.getpwnam = unknown
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def octavo(
    *words: str, text: bytes = b"", shell: str = "", without: tuple[str, ...] = (), path: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """`octavo WORDS`, or that behind a shell's redirections."""
    left = {name: value for name, value in os.environ.items() if name not in without}
    left["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), path)))
    command = [sys.executable, "-m", "octavo", *words]
    if shell:
        command = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *command]
    return subprocess.run(command, input=text, capture_output=True, env=left | environment, timeout=120)


CACHES = ("HOME", "OCTAVO_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "MODELSCOPE_CACHE")


@pytest.fixture
def nobody(tmp_path: Path) -> str:
    (tmp_path / "nobody").mkdir()
    (tmp_path / "nobody" / "sitecustomize.py").write_text(NOBODY)
    return str(tmp_path / "nobody")


def test_a_user_without_a_home(model: str, nobody: str, tmp_path: Path):
    def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
        done = octavo(*words, without=CACHES, path=nobody, **environment)
        assert b"Traceback" not in done.stderr
        return done

    assert run("--help").returncode == 0
    done = run("doctor")
    assert b"Octavo: this user has no home folder for a cache; set OCTAVO_HOME to a folder" in done.stdout
    for words in (["pull", model], ["plan", model, "--device", "cpu"], ["plan", "~someone/model"]):
        done = run(*words)
        assert done.returncode == (2 if "~" in words[1] else 0), done.stderr
    for words, variable in (
        (["pull", "smollm2:135m"], "OCTAVO_HOME"),
        (["pull", "org/name", "--hub", "modelscope"], "MODELSCOPE_CACHE"),
    ):
        done = run(*words, MODELSCOPE_DOMAIN="http://127.0.0.1:1")
        assert done.returncode == 2
        assert len(done.stderr.decode().splitlines()) == 1
        assert variable in done.stderr.decode() or "could not be fetched" in done.stderr.decode()
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a", "max_tokens": 2}')
    done = run("generate", model, "-i", str(source), "-o", str(target), "--device", "cpu", "--kv-cache-memory", "1MiB")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "environment",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=["C", "ascii", "latin-1"],
)
def test_terminals_that_are_not_utf8(model: str, environment: dict[str, str]):
    options = ["--device", "cpu", "--kv-cache-memory", "1MiB"]
    done = octavo("chat", model, *options, "--max-tokens", "40", text="é 世 🙂".encode(), **environment)
    assert done.returncode == 0, done.stderr
    # A tokenizer of bytes draws what no terminal of these shows.
    done = octavo("generate", model, *options, "-i", "-", "-o", "-", text='"é"\n'.encode(), **environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.decode("utf-8"))["line"] == 1
    done = octavo("plan", "naïve", **environment)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"is neither a known name" in done.stderr


def test_what_is_not_text_is_told(model: str):
    done = octavo("chat", model, "--device", "cpu", "--kv-cache-memory", "1MiB", text=b"\xff\xfe")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("octavo: error: ")
    assert b"Unicode" in done.stderr


@pytest.mark.parametrize("shell", [">&-", "2>&-", "<&-", ">&- 2>&- <&-", "| true", "2>&1 | head -c 1", "> /dev/full"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["doctor", "--json"], ["plan", "{model}"]])
def test_streams_that_are_closed(model: str, words: list[str], shell: str):
    done = octavo(*(word.format(model=model) for word in words), shell=shell)
    # Help is argparse's to write, which says nothing of a full disk.
    assert done.returncode in ((2,) if "full" in shell and "--" not in words[0] else (0, 1, 141)), done.stderr
    for said in (done.stdout, done.stderr):
        assert b"Traceback" not in said
        assert b"Exception ignored" not in said
