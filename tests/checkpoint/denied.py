"""Folders that this user may not read, also where the tests run as root."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest


def deny_reading(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Whatever lies under `folder` cannot be looked at."""
    stat = os.stat

    def denied(path: Any, *args: Any, **more: Any) -> os.stat_result:
        if isinstance(path, str | Path) and Path(path).is_relative_to(folder) and Path(path) != folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *args, **more)

    monkeypatch.setattr(os, "stat", denied)
