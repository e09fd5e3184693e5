"""One logger, one format, on standard error; standard output belongs to results."""

import logging
import sys
from datetime import datetime
from typing import Literal, TextIO

from octavo.json_line import json_line

logger = logging.getLogger("octavo")

Format = Literal["text", "json"]


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks up `sys.stderr` for each line: who replaces it (a test, a notebook) may close the one before."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Json(logging.Formatter):
    """A line as an object: time, level, process, message, and what the caller gave as `extra={"fields": {...}}`."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        line = {"time": time, "level": record.levelname.lower(), "process": self._process}
        line |= {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json_line(line, spaced=True)


def setup(verbose: bool = False, process: str = "", lines: Format = "text") -> None:
    """Sends Octavo's log lines to standard error; `process` tags the lines of a process that is not the main one."""
    handler = _StandardError()
    tag = f" {process}" if process else ""
    text = logging.Formatter(f"%(asctime)s octavo{tag}: %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(text if lines == "text" else _Json(process or "main"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
