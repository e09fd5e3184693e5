"""CI's parts: CONTRIBUTING.md tells of all of them, and a part that fails or takes too long is one that is seen."""

import re
import subprocess
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ci() -> Any:
    spec = spec_from_file_location("ci", ROOT / ".ci" / "parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contributing_has_the_table(ci: Any) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([a-z ]+) \| (\d+) \| `(.+)` \|$", text, re.MULTILINE)
    assert rows == [(part.name, f"{part.minutes:g}", part.command) for part in ci.PARTS]
    most, of = re.search(r"within (\d+) of (\d+)", text).groups()  # type: ignore[union-attr]
    assert sum(part.minutes for part in ci.PARTS) <= int(most) < int(of)


def run(ci: Any, monkeypatch: pytest.MonkeyPatch, *parts: tuple[str, float, str]) -> int:
    monkeypatch.setattr(ci, "PARTS", tuple(ci.Part(*part) for part in parts))
    code: int = ci.main([])
    return code


@pytest.mark.parametrize(("on_ci", "code"), [("", 0), ("true", 1)])
def test_a_part_that_takes_too_long_fails_on_ci(
    ci: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], on_ci: str, code: int
) -> None:
    monkeypatch.setenv("CI", on_ci)
    assert run(ci, monkeypatch, ("first", 1, "true"), ("second", 0.0001, "sleep 0.1")) == code
    said = capfd.readouterr().out
    assert re.search(r"^first +0\.0 +1 +1\.5  ok$", said, re.MULTILINE)
    assert re.search(r"^second +0\.0 .*  too slow$", said, re.MULTILINE)


def test_parts_after_a_failed_one_run_if_there_is_an_installation(
    ci: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(ci, monkeypatch, ("first", 1, "true"), ("second", 1, "exit 3"), ("third", 1, "echo here")) == 1
    said = capfd.readouterr().out
    assert "failed, exit code 3" in said
    assert "here" in said.splitlines()
    assert run(ci, monkeypatch, ("first", 1, "exit 3"), ("second", 1, "echo here")) == 1
    assert "here" not in capfd.readouterr().out.splitlines()


def test_bash_runs_it() -> None:
    done = subprocess.run(["bash", ROOT / ".ci" / "run", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.startswith("no such part: nothing")) == (2, True)


def test_an_unknown_part_is_refused(ci: Any) -> None:
    assert ci.main(["test"]) == 2
