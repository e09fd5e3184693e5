"""Reading a configuration loads no torch, so that processes without a model can do it."""

import subprocess
import sys


def test_read_config_loads_no_torch() -> None:
    code = """
import sys
from octavo.models import FAMILIES, family_of
for architecture in FAMILIES:
    family_of(architecture)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
