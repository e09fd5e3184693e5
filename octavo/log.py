"""One logger, one format, on standard error; standard output belongs to results."""

import logging
import sys

logger = logging.getLogger("octavo")


def setup(verbose: bool = False, process: str = "") -> None:
    """Sends Octavo's log lines to standard error; `process` tags the lines of a process that is not the main one."""
    handler = logging.StreamHandler(sys.stderr)
    tag = f" {process}" if process else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s octavo{tag}: %(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
