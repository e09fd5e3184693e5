"""The kernels' own test, in C++: for other processors under an emulator, and for builds that cannot run here as they
were compiled."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.kernels import library
from octavo.kernels.builds import builds_of

SCRIPT = Path(__file__).parents[2] / "scripts" / "test-kernels"
# What runs here is tested beside this file, with the optimizer's full work.
NOT_RUN = [name for name in builds_of(platform.machine()) if name not in library.builds()]


def self_test(*names):
    return subprocess.run([sys.executable, SCRIPT, *names], capture_output=True, text=True, check=False)


@pytest.mark.other_builds
@pytest.mark.parametrize("name", sorted({"generic", "neon_dotprod", *NOT_RUN}))
def test_kernels_are_right(name):
    done = self_test(name)
    assert done.returncode == 0, done.stdout + done.stderr
    if "testing" not in done.stdout:
        pytest.skip(done.stdout.strip())
    assert done.stdout.count("testing") == done.stdout.count("all kernels are right")


def test_a_wrong_kernel_is_seen(tmp_path):
    """A compiler that gives a failing program is believed."""
    compiler = tmp_path / "compiler"
    program = 'printf "#!/bin/sh\\nexit 1\\n" > "$out"; /bin/chmod +x "$out"'
    compiler.write_text(f"#!/bin/sh\nfor out; do :; done\n{program}\n")
    compiler.chmod(0o755)
    # No other compiler is found, so only this machine's build is tried.
    done = subprocess.run(
        [sys.executable, SCRIPT, "generic"], env={"CXX": str(compiler), "PATH": str(tmp_path)}, check=False
    )
    assert done.returncode == 1


def test_an_unknown_name_is_refused():
    done = self_test("avx1024")
    assert done.returncode == 2
    assert "avx1024" in done.stderr
