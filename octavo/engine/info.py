"""What an engine says of itself when it is ready."""

from dataclasses import dataclass

from octavo.engine.limits import Limits
from octavo.timeline import Timeline


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """`timeline` holds (phase, seconds) of the start; `plan` how the memory is divided, in lines for a person."""

    limits: Limits
    device: str
    dtype: str
    plan: list[str]
    timeline: Timeline
