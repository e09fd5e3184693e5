"""One logger, one format, on standard error; standard output belongs to results."""

import logging
import sys
from typing import TextIO

logger = logging.getLogger("octavo")


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` for each line: who replaces it (a test, a notebook) may close the one before."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup(verbose: bool = False, process: str = "") -> None:
    """Sends Octavo's log lines to standard error; `process` tags the lines of a process that is not the main one."""
    handler = _StandardError()
    tag = f" {process}" if process else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s octavo{tag}: %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
