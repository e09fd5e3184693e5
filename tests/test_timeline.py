"""The age of a process, and the whole of a start as `octavo chat --verbose` tells it."""

import re
import subprocess
import sys
import time

from octavo.timeline import describe, process_age


def test_a_process_is_as_old_as_its_start_is_long_ago() -> None:
    program = "import time; time.sleep(0.3); from octavo.timeline import process_age; print(process_age())"
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert 0.25 < age <= time.monotonic() - began + 0.02


def test_it_grows() -> None:
    before = process_age()
    time.sleep(0.05)
    assert 0.02 < process_age() - before < 1


def test_phases_are_told_in_their_order() -> None:
    assert describe([("python", 0.1), ("first token", 0.251)]) == "python 0.10 s, first token 0.25 s"


def test_chat_tells_its_start_to_the_first_token(smollm2_path: object) -> None:
    command = [sys.executable, "-m", "octavo", "chat", str(smollm2_path), "--max-tokens", "2", "--verbose"]
    done = subprocess.run(command, input="Hello", capture_output=True, text=True, check=True)
    told = re.search(r"start: (python .* first token \S+ s): (\S+) s in all", done.stderr)
    assert told, done.stderr
    seconds = [float(found) for found in re.findall(r" (\d+\.\d+) s", told[1])]
    assert abs(sum(seconds) - float(told[2])) < 0.1
