"""Log lines reach whoever is standard error when they are written, and no test's logging reaches the next test."""

import io
import sys

import pytest

from octavo import log


def test_a_line_goes_to_the_standard_error_of_its_moment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replaced = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", replaced)
        log.setup()
        log.logger.info("the first")
        assert "octavo: the first" in replaced.getvalue()
    replaced.close()
    log.logger.warning("the second")
    said = capsys.readouterr().err
    assert said.endswith("octavo: the second\n")
    assert "Logging error" not in said


@pytest.mark.parametrize("turn", [1, 2])
def test_every_test_begins_with_a_logger_of_its_own(turn: int, caplog: pytest.LogCaptureFixture) -> None:
    assert (log.logger.handlers, log.logger.propagate) == ([], True)
    log.setup(verbose=True)
    log.logger.warning("not for the root's handlers")
    assert not caplog.messages
