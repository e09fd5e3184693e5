"""`octavo bench memory`: the baselines reserve what they say, and blocks beat them by what is claimed."""

import json

import pytest

from octavo.cli import main
from octavo.cli.bench.contiguous import RESERVES, Contiguous
from octavo.cli.bench.simulator import StepTime

SECOND = StepTime(weights=1.0, per_token=0.0, per_context_token=0.0)


def test_what_is_reserved() -> None:
    assert {name: reserve(10, 25) for name, reserve in RESERVES.items()} == {
        "contiguous_max": 2048,
        "contiguous_pow2": 42,
        "oracle": 35,
    }
    assert RESERVES["contiguous_pow2"](10, 32) == 42


def test_a_hole_must_be_large_enough() -> None:
    seen = []
    memory = Contiguous(100, RESERVES["oracle"], SECOND, 1000)
    # 40 + 40 leave a hole of 20; the third needs 30 and waits for the first's end, after two steps.
    memory.run([(38, 2), (36, 4), (28, 2)], lambda *state: seen.append(state))
    assert seen == [
        (2, 38 + 36, 80, True),
        (2, 39 + 37, 80, True),
        (2, 38 + 28, 70, False),
        (2, 39 + 29, 70, False),
    ]
    assert memory.now == 4.0


def test_a_prompt_longer_than_the_budget_takes_several_steps() -> None:
    seen = []
    Contiguous(100, RESERVES["oracle"], SECOND, 16).run([(40, 1)], lambda *state: seen.append(state[1]))
    assert seen == [16, 32, 40]


@pytest.mark.timeout(60)
def test_the_last_line_and_the_claims(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "memory", "--num-prompts", "150"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found) == ["octavo", "contiguous_max", "contiguous_pow2", "oracle"]
    assert all(list(row) == ["waste_percent", "max_batch", "requests_per_s"] for row in found.values())
    assert found["octavo"]["waste_percent"] < 4
    assert found["octavo"]["max_batch"] >= 2 * found["contiguous_pow2"]["max_batch"]
    assert found["octavo"]["requests_per_s"] > found["oracle"]["requests_per_s"]
    assert found["contiguous_max"]["waste_percent"] > found["contiguous_pow2"]["waste_percent"]
