"""Every Triton kernel is compiled for GPUs that are not here; `scripts/compile-kernels` does more of it."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import octavo.ops

FOLDER = Path(octavo.ops.__file__).parent / "triton"


def launched() -> set[str]:
    """module.function of each kernel that is launched: `function[grid](...)`."""
    found = set()
    for path in FOLDER.glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                called = node.func.value
                if isinstance(called, ast.Name) and called.id in own:
                    found.add(f"{path.stem}.{called.id}")
    return found


@pytest.mark.other_builds
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_kernels_compile(architecture: int) -> None:
    command = [sys.executable, "-m", "tests.gpu.compiled", str(architecture), "--bf16", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["faults"] == {}
    others = {"hopper._attention", "streamed._multiply_streamed"} if architecture != 90 else set()
    others |= {"fp8._quantize_rows"} if architecture < 89 else set()
    assert launched() - said["kernels"].keys() == others
