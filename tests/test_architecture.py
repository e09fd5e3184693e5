"""The rules of the house: imports go down and in no circle, and what must not load torch does not.

The floors stand in docs/architecture.md. A module may import from a lower floor or from its own package; the modules
of the lowest floor count as one package.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import octavo

ROOT = Path(octavo.__file__).parent
FLOORS = [
    {
        "config",
        "kernels",
        "memory",
        "sampling_params",
        "sampling_defaults",
        "vllm_arguments",
        "request",
        "batch",
        "metrics",
        "errors",
        "deferred_signals",
        "json_line",
        "log",
        "progress",
        "step_layout",
        "timeline",
        "version",
    },
    {"checkpoint", "ops"},
    {"text", "layers"},
    {"models"},
    {"runner"},
    {"engine"},
    {"llm", "parity", "server"},
    {"swift"},
    {"cli", "__main__", "__init__"},
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TORCH_FREE = [
    *("octavo", "octavo.cli", "octavo.checkpoint", "octavo.text", "octavo.server", "octavo.swift"),
    *(f"octavo.{name}" for name in sorted(FLOORS[0])),
    *("octavo.engine.scheduler", "octavo.engine.block_manager", "octavo.engine.process", "octavo.engine.engine"),
]


def part_of(path: Path) -> str:
    """The name on a floor that a file belongs to: its package, or the module itself."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, part) of every import of octavo's own modules, wherever in the file it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            module = node.module or ""
            names = [f"octavo.{alias.name}" for alias in node.names] if module == "octavo" else [module]
        for name in names:
            head, _, rest = name.partition(".")
            if head == "octavo" and rest and rest.partition(".")[0] in FLOOR_OF:
                found.append((node.lineno, rest.partition(".")[0]))
    return found


def test_imports_go_down():
    upward = []
    for path in ROOT.rglob("*.py"):
        part = part_of(path)
        if part in ("__init__", "__main__"):
            continue
        assert part in FLOOR_OF, f"{path} stands on no floor: name it in FLOORS and in docs/architecture.md"
        upward += [
            f"{path.relative_to(ROOT)}:{line} imports {other}"
            for line, other in imports_of(path)
            if other != part and FLOOR_OF[other] >= max(1, FLOOR_OF[part])
        ]
    assert not upward, "\n".join(upward)


def test_floors_name_what_is_there():
    there = {part_of(path) for path in ROOT.rglob("*.py")}
    assert FLOOR_OF.keys() == there


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(tree: ast.AST, modules: set[str]) -> set[str]:
    """Octavo's modules that are imported anywhere in `tree`, but for types alone."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or {node.module}
        found |= imported_by(node, modules)
    return found


def test_no_circle_of_imports():
    """Imports within functions are counted, too."""
    paths = {module_of(path): path for path in ROOT.rglob("*.py")}
    left = {name: imported_by(ast.parse(path.read_text()), set(paths)) - {name} for name, path in paths.items()}
    while free := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in free:
            del left[name]
    assert not left, "in a circle, or above one: " + ", ".join(sorted(left))


def modules_under(name: str) -> list[str]:
    path = ROOT.joinpath(*name.split(".")[1:])
    if name == "octavo" or not path.is_dir():
        return [name]
    return [name, *(f"{name}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__")]


@pytest.mark.parametrize("name", TORCH_FREE)
def test_free_of_torch(name):
    modules = modules_under(name)
    code = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules, 'torch was loaded'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    for name in octavo.__all__:
        assert getattr(octavo, name) is not None
