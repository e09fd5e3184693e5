"""What Triton reads of the environment, settled before it compiles anything."""

import os
import tempfile
from pathlib import Path

from octavo.config import cache_home
from octavo.errors import ConfigError
from octavo.log import logger


def settle() -> None:
    """Sets what the user has not set: how products and sums are rounded, and a folder for compiled kernels.

    Triton keeps them in `~/.triton`, or fails to compile where that cannot be written.
    """
    # Products and sums become one instruction in every version; from Triton 3.10 the default is another.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if os.environ.get("TRITON_CACHE_DIR"):
        return
    named = os.environ.get("TRITON_HOME")
    home = named or os.path.expanduser("~")  # noqa: PTH111 -- as Triton does, which takes ~ for a folder's name
    if home != "~" and _writable(Path(home, ".triton", "cache")):
        return
    os.environ["TRITON_CACHE_DIR"] = str(_other_folder())


def _other_folder() -> Path:
    try:
        if _writable(folder := cache_home() / "triton"):
            return folder
    except ConfigError:
        pass
    folder = Path(tempfile.mkdtemp(prefix="octavo-triton-"))
    logger.warning(
        "compiled kernels are kept in %s for this run alone, since no folder of this user can be written; set"
        " TRITON_CACHE_DIR to a folder, or each start compiles them anew",
        folder,
    )
    return folder


def _writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, which need not exist yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
