"""Runs cases in a process that may crash, hang or take too much memory, and says which did.

A case is a number; what it does is a function in the process, which answers with a text: empty if all is well.
"""

import faulthandler
import os
import resource
import select
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BROKEN = "the case itself fails:"


@dataclass(frozen=True, slots=True)
class Outcome:
    """`fault` is what is wrong with the case `number`, if anything; `seconds` is how long it took."""

    number: int
    fault: str
    seconds: float


def run(
    case: Callable[[int], str], numbers: Iterable[int], *, seconds: float, more_bytes: int, quiet: bool = True
) -> Iterator[Outcome]:
    """Each case's outcome; one may take `seconds`, and all together `more_bytes` of memory beyond what is in use."""
    worker = None
    try:
        for number in numbers:
            worker = worker or _Worker(case, more_bytes, quiet)
            began = time.monotonic()
            fault, alive = worker.ask(number, seconds)
            if not alive:
                worker = None
            yield Outcome(number, fault, time.monotonic() - began)
    finally:
        if worker is not None:
            worker.end()


class _Worker:
    """A child that answers numbers with texts, over two pipes."""

    def __init__(self, case: Callable[[int], str], more_bytes: int, quiet: bool):
        self._report = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed in `end`
        questions, self._ask = os.pipe()
        self._hear, answers = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads
            self._process = os.fork()
        if self._process == 0:
            os.close(self._ask)
            os.close(self._hear)
            faulthandler.register(signal.SIGUSR1, self._report)
            _serve(case, questions, answers, more_bytes, quiet)
        os.close(questions)
        os.close(answers)

    def ask(self, number: int, seconds: float) -> tuple[str, bool]:
        """(what is wrong, whether the child lives on)."""
        os.write(self._ask, b"%d\n" % number)
        answer, until = b"", time.monotonic() + seconds
        while not answer.endswith(b"\0"):
            ready, _, _ = select.select([self._hear], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                where = self._stacks()
                os.kill(self._process, signal.SIGKILL)
                self.end()
                return f"hangs: nothing after {seconds} s, in {where}", False
            piece = os.read(self._hear, 65536)
            if not piece:
                code = os.waitstatus_to_exitcode(self.end())
                return f"crashes: {signal.Signals(-code).name if code < 0 else f'exit code {code}'}", False
            answer += piece
        text = answer[:-1].decode()
        if not text.startswith(_BROKEN):
            return text, True
        self.end()
        return text, False

    def _stacks(self) -> str:
        """What each thread of the child does."""
        os.kill(self._process, signal.SIGUSR1)
        time.sleep(0.5)
        self._report.seek(0)
        calls = [line.strip() for line in self._report.read().splitlines() if line.startswith(("  ", "Thread"))]
        return " | ".join(calls[:60])

    def end(self) -> int:
        self._report.close()
        os.close(self._ask)
        os.close(self._hear)
        return os.waitpid(self._process, 0)[1]


def _serve(case: Callable[[int], str], questions: int, answers: int, more_bytes: int, quiet: bool) -> None:
    try:
        if quiet:
            # Panics of a library's Rust are printed as well as raised.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes, mapped + more_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(questions) as lines:
            for line in lines:
                os.write(answers, case(int(line)).replace("\0", " ").encode("utf-8", "replace") + b"\0")
    except BaseException:
        os.write(answers, f"{_BROKEN} {traceback.format_exc()[-2000:]}".encode("utf-8", "replace") + b"\0")
    os._exit(0)


def fault_of(step: Callable[[], Any], allowed: type[Exception]) -> str:
    """Runs `step`: empty if it works or raises an `allowed` error of one line, else what happened."""
    try:
        step()
    except allowed as error:
        text = str(error)
        return "" if text and len(text.splitlines()) == 1 else f"{type(error).__name__} of several lines: {text!r:.500}"
    except BaseException as error:  # panics of a library's Rust are no Exception
        frames = traceback.extract_tb(error.__traceback__)
        where = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-4:]))
        return f"{type(error).__name__}: {str(error)!r:.200} at {where}"
    return ""
