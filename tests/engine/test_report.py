"""The line in the log: when it comes and what it says."""

import pytest

from octavo.engine import report as module
from octavo.engine.report import INTERVAL, Report
from octavo.metrics import EngineStats


def test_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(module.logger, "info", lines.append)
    now = 100.0
    report = Report(lambda: now)
    stats = EngineStats(running=2, blocks_owned=4, blocks_cached=3, blocks_free=5, block_size=16, empty_slots=16)
    report.step(stats)
    assert not lines
    now += INTERVAL
    stats.output_tokens, stats.step_seconds = 50, 2.0
    report.step(stats)
    now += 1
    report.step(stats)
    now += INTERVAL
    stats.output_tokens, stats.step_seconds = 90, 3.0
    report.step(stats)
    first, second = lines
    assert first == (
        "2 running, 0 waiting, 25.0 tokens/s; KV cache: 48 tokens stored, 16 slots empty (25.0% waste), 48 cached,"
        " 80 free"
    )
    assert "40.0 tokens/s" in second
