"""How long a start takes, by phases, from the beginning of the process: the imports that came before count too."""

import os
import time
from pathlib import Path

Timeline = list[tuple[str, float]]  # (phase, seconds)

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Seconds since this process began, or since this module was imported where the system does not say."""
    try:
        # The 22nd field, in clock ticks since the machine started; the name in the second may hold blanks itself.
        began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError, IndexError):
        return time.monotonic() - _IMPORTED


def describe(timeline: Timeline) -> str:
    """The phases for a person."""
    return ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in timeline)
