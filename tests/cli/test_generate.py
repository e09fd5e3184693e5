"""`octavo generate` on lines as people write them: what is wrong with one is told by its number, the rest goes on."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from tests.served import save_tiny_model

GOOD = {"prompt": "a", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
# Lines as JSON values, or as they stand in the file.
BAD: list[Any] = [
    *(b"{", b"nonsense", b"[" * 10_000, b'{"prompt": "a"', b'{"prompt": "\xe9"}', b'"\\ud800"', b"NaN"),
    *(5, None, True, [], ["a"], {}, {"id": 1}, {**GOOD, **CHAT}),
    *({"prompt": value} for value in (None, 5, 1.5, True, "", [], ["a"], [None], [[5]], [-1], [10**9], [2**70], {})),
    *({"prompt": value} for value in ({"prompt": 5}, {"text": "a"}, {"prompt_token_ids": "a"}, "x" * 1000)),
    *({"messages": value} for value in (None, 5, "a", {}, [], [5], [None], [{}], [{"role": "user", "content": 5}])),
    *({"messages": [{"role": role, "content": "a"}]} for role in (None, 5)),
    *(
        {**GOOD, name: value}
        for name in ("stop", "bad_words", "stop_token_ids")
        for value in (5, 1.5, True, {"a": 1}, [None])
    ),
    *({**GOOD, "allowed_token_ids": value} for value in (5, "a", ["a"], [10**9], {})),
    *({**GOOD, "logit_bias": value} for value in (5, "a", [1], {"a": 1}, {"5": "x"}, {"5": None}, {"99999": 1})),
    *({**GOOD, "max_tokens": value} for value in (0, -1, "5", 1.5, True, 10**9, 2**70)),
    *({**GOOD, "n": value} for value in (0, None, "1", 129, 2**70)),
    *({**GOOD, "temperature": value} for value in (None, "hot", -1, 1e300, True)),
    *({**GOOD, "seed": value} for value in ("a", 1.5, 2**70)),
    *({**GOOD, "ignore_eos": value} for value in (None, 1, "yes")),
    *({**GOOD, "repetition_detection": value} for value in (5, {}, {"max_pattern_size": "a", "min_count": 2})),
    *({**GOOD, name: 1} for name in ("logprobs", "prompt_logprobs")),
    *({**GOOD, name: 1} for name in ("temprature", "best_of", "prompts", "__class__")),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def generate(model: str, source: Path, target: Path) -> int:
    options = ["--device", "cpu", "--kv-cache-memory", "1MiB", "--max-num-seqs", "8"]
    return main(["generate", model, "-i", str(source), "-o", str(target), *options])


def test_bad_lines_are_told_by_their_numbers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [GOOD, *BAD, CHAT]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    assert generate(model, source, target) == 1
    said = capsys.readouterr().err
    told = {int(line.split()[1].rstrip(":")) for line in said.splitlines() if line.startswith("line ")}
    assert [lines[number - 1] for number in sorted(set(range(2, len(lines))) - told)] == []
    assert told == set(range(2, len(lines)))
    assert "Traceback" not in said
    assert f"2 answered, 0 already there, {len(BAD)} bad lines" in said
    assert [json.loads(line)["line"] for line in target.read_text().splitlines()] == [1, len(lines)]


def test_a_byte_order_mark_is_no_part_of_a_line(model: str, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(GOOD) + "\r\n\r\n" + json.dumps(GOOD), encoding="utf-8-sig")
    assert generate(model, source, target) == 0
    assert [json.loads(line)["line"] for line in target.read_text().splitlines()] == [1, 3]


# ---- the two files ------------------------------------------------------------------------------------------------


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run_apart(model: str, *words: str, text: str = "") -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "octavo",
        "generate",
        model,
        "--device",
        "cpu",
        "--kv-cache-memory",
        "1MiB",
        *words,
    ]
    return subprocess.run(command, input=text, capture_output=True, text=True)


def test_a_pipe(model: str, tmp_path: Path):
    lines = json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, "id": "x"})
    done = run_apart(model, "-i", "-", "-o", "-", text=lines)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["line"] for line in done.stdout.splitlines()] == [1, 3]
    assert "2 answered, 0 already there, 0 bad lines" in done.stderr
    target = tmp_path / "out.jsonl"
    assert run_apart(model, "-i", "-", "-o", str(target), text=lines).returncode == 0
    again = run_apart(model, "-i", "-", "-o", str(target), text=lines)
    assert again.returncode == 2
    assert "standard input cannot be compared with them" in again.stderr


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is looked at is a mistake."""

    def opened(*args: object, **more: object) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("octavo.checkpoint.open_engine_checkpoint", opened)


@pytest.mark.usefixtures("no_model")
def test_files_are_looked_at_before_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path / "in.jsonl", GOOD)
    foreign = written(tmp_path / "foreign.jsonl", {"a": 1})
    for wrong, target, words in (
        (tmp_path / "none.jsonl", tmp_path / "out", "none.jsonl cannot be read: No such file or directory"),
        (tmp_path, tmp_path / "out", "is a folder; name a file of JSON lines"),
        (source, tmp_path / "nowhere" / "out", "there is no folder"),
        (source, tmp_path, "is a folder; name a file in it"),
        (source, foreign, "holds lines that octavo generate did not write"),
    ):
        assert generate("no-model", wrong, target) == 2
        assert words in capsys.readouterr().err
    with (tmp_path / "out").open("a+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert generate("no-model", source, tmp_path / "out") == 2
        assert "is being written by another octavo generate; wait for it" in capsys.readouterr().err


def test_a_run_goes_on_where_another_stopped(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = written(tmp_path / "in.jsonl", GOOD, CHAT, {"prompt": "b", "max_tokens": 3})
    target = tmp_path / "out.jsonl"
    assert generate(model, source, target) == 0
    whole = sorted(target.read_bytes().splitlines(keepends=True))
    # Of a line that was cut in the middle nothing stays; one that lacks its end alone is an answer.
    for rest, there in ((whole[0] + whole[1][:-10], 1), (whole[0] + whole[1][:-1], 2), (b"", 0), (whole[0][:1], 0)):
        target.write_bytes(rest)
        assert generate(model, source, target) == 0
        assert f"{3 - there} answered, {there} already there" in capsys.readouterr().err
        assert sorted(answer["line"] for answer in answers(target)) == [1, 2, 3]
        assert target.read_bytes().endswith(b"\n")


def test_answers_belong_to_their_input(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = written(tmp_path / "in.jsonl", GOOD, CHAT), tmp_path / "out.jsonl"
    assert generate(model, source, target) == 0
    written(source, GOOD, {**CHAT, "max_tokens": 3})
    assert generate(model, source, target) == 2
    assert f"line 2 of {source} is another one than {target} has the answer of" in capsys.readouterr().err
    written(source, GOOD)
    assert generate(model, source, target) == 2
    assert f"{target} answers line 2, which {source} does not have" in capsys.readouterr().err
    older = [{name: value for name, value in answer.items() if name != "digest"} for answer in answers(target)]
    written(target, *older)
    written(source, GOOD, CHAT, GOOD)
    assert generate(model, source, target) == 0
    assert "1 answered, 2 already there" in capsys.readouterr().err


# ---- OpenAI's batch files -----------------------------------------------------------------------------------------


def batch_line(custom_id: Any, body: Any, url: Any = "/v1/chat/completions", **more: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more}


def test_openais_batch_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    chat = {"model": Path(model).name, "temperature": 0, "logprobs": True, **CHAT}
    text = {"prompt": ["a", "b"], "n": 2, "max_tokens": 2, "temperature": 0}
    lines = [batch_line("one", chat), GOOD, batch_line("two", text, "/v1/completions")]
    source, target = written(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    assert generate(model, source, target) == 0
    found = {answer.get("custom_id"): answer for answer in answers(target)}
    assert list(found["one"]) == ["id", "custom_id", "response", "error"]
    assert found["one"]["error"] is None
    response = found["one"]["response"]
    assert (response["status_code"], response["body"]["object"]) == (200, "chat.completion")
    assert response["body"]["usage"]["completion_tokens"] == 2
    assert len(response["body"]["choices"][0]["logprobs"]["content"]) == 2
    assert [choice["index"] for choice in found["two"]["response"]["body"]["choices"]] == [0, 1, 2, 3]
    assert found[None]["line"] == 2
    written(source, *lines, batch_line("three", chat), batch_line("one", chat))
    capsys.readouterr()
    assert generate(model, source, target) == 1
    said = capsys.readouterr().err
    assert "1 answered, 3 already there, 1 bad lines" in said
    assert "line 5: custom_id 'one' is that of line 1; give each line its own" in said


BAD_BATCH_LINES = [
    (batch_line(5, CHAT), "custom_id is 5; it must be a text"),
    ({"body": CHAT}, "custom_id is None"),
    (batch_line("a", CHAT, "/v1/embeddings"), "url is '/v1/embeddings'; it must be /v1/chat/completions or"),
    (batch_line("b", CHAT, None), "url is None"),
    (batch_line("bb", CHAT, ["x"]), "url is ['x']"),
    (batch_line("c", CHAT, method="GET"), "method is 'GET'; it must be POST"),
    (batch_line("d", [CHAT]), "body is [{"),
    (batch_line("e", {**CHAT, "stream": True}), "answers come whole into a file"),
    (batch_line("f", CHAT, extra=1), "unknown field 'extra'"),
    (batch_line("g", {**CHAT, "temprature": 1}), "unknown field 'temprature'. Did you mean 'temperature'?"),
    (batch_line("h", {**CHAT, "temperature": 3}), "it must be from 0 to 2"),
    (batch_line("i", {**CHAT, "model": "gpt-4o"}), "the model 'gpt-4o' is not served here"),
    (batch_line("j", {"prompt": "x" * 1000}, "/v1/completions"), "1000 tokens"),
    (batch_line("k", {"messages": []}), "messages is empty"),
]


def test_bad_lines_of_batch_files(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [batch_line("good", CHAT), *(line for line, _ in BAD_BATCH_LINES)]
    source, target = written(tmp_path / "in.jsonl", *lines), tmp_path / "out.jsonl"
    assert generate(model, source, target) == 1
    said = capsys.readouterr().err
    found = {int(answer["id"].split("_")[2]): answer for answer in answers(target)}
    assert found.keys() == set(range(1, len(lines) + 1))
    for number, (line, words) in enumerate(BAD_BATCH_LINES, 2):
        response = found[number]["response"]
        assert words in response["body"]["error"]["message"]
        assert response["status_code"] == (404 if "gpt-4o" in words else 400)
        assert found[number]["custom_id"] == (line["custom_id"] if isinstance(line.get("custom_id"), str) else None)
        assert f"line {number}: " in said
    assert found[1]["response"]["status_code"] == 200
    assert generate(model, source, target) == 1, "they are as wrong the second time"
    assert f"0 answered, 1 already there, {len(BAD_BATCH_LINES)} bad lines" in capsys.readouterr().err


def test_a_batch_for_another_model(model: str, tmp_path: Path):
    source = written(tmp_path / "in.jsonl", batch_line("a", {**CHAT, "model": "gpt-4o"}))
    target = tmp_path / "out.jsonl"
    done = run_apart(model, "-i", str(source), "-o", str(target), "--served-model-name", "gpt-4o")
    assert done.returncode == 0, done.stderr
    assert answers(target)[0]["response"]["body"]["model"] == "gpt-4o"


def test_more_lines_than_run_at_once_and_an_interrupt(model: str, tmp_path: Path):
    source = written(
        tmp_path / "in.jsonl", *({"prompt": "a", "max_tokens": 40, "ignore_eos": True} for _ in range(400))
    )
    target = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "octavo", "generate", model, "-i", str(source), "-o", str(target)]
    command += ["--device", "cpu", "--kv-cache-memory", "1MiB", "--max-num-seqs", "4"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not target.exists() or target.read_bytes().count(b"\n") < 20:
        assert time.monotonic() < end
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    assert running.stderr is not None
    assert "Traceback" not in running.stderr.read()
    running.stderr.close()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(answer["line"] for answer in answers(target)) == list(range(1, 401))


def test_a_pipe_whose_writer_waits_for_answers(model: str):
    command = [sys.executable, "-m", "octavo", "generate", model, "-i", "-", "-o", "-"]
    command += ["--device", "cpu", "--kv-cache-memory", "1MiB"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdin is not None
    assert running.stdout is not None
    assert running.stderr is not None
    try:
        for number in (1, 2, 3):
            running.stdin.write(json.dumps(GOOD).encode() + b"\n")
            running.stdin.flush()
            assert json.loads(running.stdout.readline())["line"] == number
        running.send_signal(signal.SIGINT)  # while it waits for a line
        assert running.wait(30) == 130
        said = running.stderr.read()
        assert b"Traceback" not in said
        assert b"Fatal" not in said
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("fault", ["engine", "output"])
def test_what_ends_a_run_ends_it_while_its_writer_waits(model: str, fault: str):
    target = "/dev/full" if fault == "output" else "/dev/null"
    command = [sys.executable, "-m", "octavo", "generate", model, "-i", "-", "-o", target]
    command += ["--device", "cpu", "--kv-cache-memory", "1MiB"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert running.stdin is not None
        assert running.stderr is not None
        running.stdin.write(json.dumps(GOOD).encode() + b"\n")
        running.stdin.flush()
        if fault == "engine":
            said = b""
            while b"engine ready" not in said:
                said = running.stderr.readline()
            children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGKILL)
        assert running.wait(30) == 2
        said = running.stderr.read()
        assert (b"the engine stopped: killed by SIGKILL\n" if fault == "engine" else b"No space left") in said
        assert b"Traceback" not in said
    finally:
        running.kill()
        running.communicate()


def test_an_engine_that_dies(model: str, tmp_path: Path):
    endless = {"prompt": "a", "max_tokens": 100, "ignore_eos": True}
    source, target = written(tmp_path / "in.jsonl", *[endless] * 2000), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "octavo", "generate", model, "-i", str(source), "-o", str(target)]
    command += ["--device", "cpu", "--kv-cache-memory", "1MiB"]
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 60
        while not target.exists() or not target.read_bytes():
            assert time.monotonic() < end
            time.sleep(0.02)
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        (engine,) = [int(child) for child in children]
        os.kill(engine, signal.SIGKILL)
        said = running.communicate(timeout=30)[1]
        assert running.returncode == 2
        assert "killed by SIGKILL; the same command goes on where it stopped" in said
        assert "Traceback" not in said
    finally:
        running.kill()
        running.communicate()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    "content",
    [
        '{"id": "batch_req_67f1abcd", "custom_id": "q1", "response": {}}',
        '{"line": "A7", "station": "x"}',
        '{"line": 1e999}',
        '{"line": 1, "digest": "a"}\n{"id": "batch_req_x"}',
    ],
)
def test_lines_of_other_programs_stay(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, target = written(tmp_path / "in.jsonl", GOOD), tmp_path / "out.jsonl"
    target.write_text(content)
    assert generate("no-model", source, target) == 2
    assert "holds lines that octavo generate did not write" in capsys.readouterr().err
    assert target.read_text() == content


def test_a_file_of_which_a_part_was_read(model: str, tmp_path: Path):
    source = written(tmp_path / "in.jsonl", GOOD, {**GOOD, "id": "second"})
    first = len(json.dumps(GOOD)) + 1
    command = f"(dd bs=1 count={first} of=/dev/null status=none; {sys.executable} -m octavo generate {model} -i - -o -"
    command += f" --device cpu --kv-cache-memory 1MiB) < {source}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert [json.loads(line).get("id") for line in done.stdout.splitlines()] == ["second"]


def test_no_file_of_something_else_is_cut(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, notes = tmp_path / "in.jsonl", tmp_path / "notes"
    source.write_text(json.dumps(GOOD))
    notes.write_text("without an end")
    assert generate("no model is looked for", source, notes) == 2
    assert "lines that octavo generate did not write" in capsys.readouterr().err
    assert notes.read_text() == "without an end"
    assert generate("no model is looked for", source, source) == 2
    assert "is the input as well as the output" in capsys.readouterr().err
    assert json.loads(source.read_text()) == GOOD
    assert generate(model, source, Path("/dev/null")) == 0
    assert generate(model, source, tmp_path / "out") == 0
    assert generate("no model is looked for", source, tmp_path / "out") == 0  # all is answered
