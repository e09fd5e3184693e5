"""The builds of the CPU's kernels that tests run with, and the one way to choose among them."""

import pytest

from octavo.kernels import library
from octavo.kernels.library import Kernels

# All that this processor can run, not only the one that is chosen on it: a build for another maker's processors is
# compared here as it would be there.
BUILDS = list(library.builds())
CHOSEN = kernels.name if (kernels := library.load()) else None
needs_kernels = pytest.mark.skipif(not BUILDS, reason="the kernels were not built: no compiler")

# The same for what takes long: the chosen build always, the others with `scripts/test -m other_builds`.
BUILDS_APART = [name if name == CHOSEN else pytest.param(name, marks=pytest.mark.other_builds) for name in BUILDS] or [
    pytest.param(None, marks=needs_kernels)
]
each_build = pytest.mark.parametrize("build", BUILDS or [pytest.param(None, marks=needs_kernels)])
each_build_apart = pytest.mark.parametrize("build", BUILDS_APART)

_load = library.load


def kernels_of(name: str) -> Kernels:
    """The build called `name`; skips the test where the system refuses what it needs."""
    kernels = _load(name)
    if kernels is None:
        pytest.skip(f"the system does not let {name} run")
    return kernels


def choose(patch: pytest.MonkeyPatch, name: str | None) -> None:
    """Whoever asks for kernels gets the build called `name`; None: there are none, so plain torch computes."""
    kernels = None if name is None else kernels_of(name)
    patch.setattr(library, "load", lambda _name=None: kernels)
