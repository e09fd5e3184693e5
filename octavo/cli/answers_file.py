"""The output of `octavo generate`: answers as JSON lines, of one run at a time, that a later run goes on from.

Each answer knows its input line by number and digest: in `line` and `digest`, or for OpenAI's batch lines in the `id`.
"""

import fcntl
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from octavo.errors import ConfigError
from octavo.json_line import json_line

_BATCH_ID = re.compile(r"batch_req_(\d+)_([0-9a-f]{16})")
# What an answer begins with: so one that was cut is told from the end of a file of something else.
_BEGINNINGS = (b'{"line": ', b'{"id": "batch_req_')


def digest_of(line: bytes) -> str:
    """16 hex digits of an input line, whatever ends it."""
    return hashlib.sha256(line.strip()).hexdigest()[:16]


def batch_id(number: int, digest: str) -> str:
    """The `id` of an answer to a line of OpenAI's batch files."""
    return f"batch_req_{number}_{digest}"


class AnswersFile:
    """The file `name`, or standard output for `-`; no run goes on from that or a device or pipe. Raises `ConfigError`.

    `done` has the digests of the input lines that it answers, by their numbers; None for an answer of an older version.
    Of a batch file's lines it may have said that they are wrong.
    """

    def __init__(self, name: str):
        self.name = name
        self.done: dict[int, str | None] = {}
        self.num_refused = 0  # of these
        self._file: IO[bytes] | None = None
        if name != "-":
            self._file = self._open(Path(name))
            try:
                if Path(name).is_file():
                    self.done = self._finished(self._file)
            except BaseException:
                self.close()
                raise

    def _open(self, path: Path) -> IO[bytes]:
        if path.is_dir():
            raise ConfigError(f"output {path} is a folder; name a file in it")
        if not path.parent.is_dir():
            raise ConfigError(f"output {path} cannot be made, since there is no folder {path.parent}; make it")
        try:
            if path.exists() and not path.is_file():
                return path.open("wb")
            file = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"output {path} cannot be written: {error.strerror}; name another file") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"output {path} is being written by another octavo generate; wait for it, or name another file"
            ) from None
        return file

    def _finished(self, file: IO[bytes]) -> dict[int, str | None]:
        """What is answered; a line that a crash cut off is removed, and one that lacks only its end gets it."""
        done: dict[int, str | None] = {}
        whole = 0
        file.seek(0)
        for line in file:
            found = _answered(line)
            ended = line.endswith(b"\n")
            cut = (
                not ended and not _is_json(line) and any(line.startswith(x) or x.startswith(line) for x in _BEGINNINGS)
            )
            if found is None and not cut:
                raise ConfigError(f"{self.name} holds lines that octavo generate did not write; name another file")
            if found is None:
                break
            done[found[0]] = found[1]
            self.num_refused += _is_refused(line)
            whole += len(line)
            if not ended:
                file.write(b"\n")
                file.flush()
                return done
        file.truncate(whole)
        return done

    def check(self, source: str, lines: Iterable[bytes]) -> None:
        """Raises `ConfigError` unless each answer belongs to its line of `lines`."""
        left = dict(self.done)
        for number, line in enumerate(lines, 1):
            digest = left.pop(number, None)
            if digest is not None and digest != digest_of(line):
                raise ConfigError(
                    f"line {number} of {source} is another one than {self.name} has the answer of; name another output,"
                    f" or remove {self.name} to begin anew"
                )
        if left:
            raise ConfigError(
                f"{self.name} answers line {min(left)}, which {source} does not have; name another output, or remove"
                f" {self.name} to begin anew"
            )

    def write(self, answer: dict[str, Any]) -> None:
        line = json_line(answer, spaced=True) + "\n"
        if self._file is None:
            sys.stdout.buffer.write(line.encode("utf-8", "replace"))
            sys.stdout.buffer.flush()
            return
        self._file.write(line.encode("utf-8", "replace"))
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _answered(line: bytes) -> tuple[int, str | None] | None:
    """The number and the digest of the input line that `line` answers; None for what is no answer."""
    try:
        answer = json.loads(line)
        if "line" in answer:
            return int(answer["line"]), answer.get("digest")
        found = _BATCH_ID.fullmatch(answer["id"])
        return (int(found[1]), found[2]) if found else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _is_refused(line: bytes) -> bool:
    """Whether an answer to a line of a batch file says that it is wrong."""
    response = json.loads(line).get("response")
    return isinstance(response, dict) and response.get("status_code") != 200


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
