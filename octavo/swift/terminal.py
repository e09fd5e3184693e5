"""A chat in the terminal as `swift infer` has it, and answers to the lines of a data set; both kept as JSON lines.

Reads with `input` and prints to standard output. How an engine is made of flags, `commands` knows.
"""

import datetime
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.config import expanded
from octavo.errors import ConfigError, OctavoError
from octavo.json_line import json_line
from octavo.swift.arguments import InferArguments
from octavo.swift.engine import SwiftEngine
from octavo.swift.request_list import inference_stream_vllm, inference_vllm
from octavo.swift.template import Template

LINE = "-" * 50
# Lines of a data set that run together.
BATCH = 256


class Results:
    """The file of answers; made when the first is written. `folder` None keeps nothing."""

    def __init__(self, folder: Path | None):
        self.path: Path | None = None
        if folder is not None:
            now = datetime.datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
            self.path = folder / f"{now}.jsonl"

    def write(self, entry: dict[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_line(entry, spaced=True) + "\n")
        except OSError as error:
            raise ConfigError(
                f"cannot write to {self.path.parent} ({error.strerror}); name another folder with --result_dir, or"
                " give --save_result false"
            ) from None


class Terminal:
    """The conversation: reads a line, answers it, and knows a few commands."""

    def __init__(self, engine: SwiftEngine, template: Template, *, stream: bool, results: Results):
        self._engine = engine
        self._template = template
        self._stream = stream
        self._results = results
        self._several_lines = False
        self._asks_system = False
        self._system = template.default_system
        self._history: list[Any] = []

    def loop(self) -> None:
        """Until exit, quit or the end of input."""
        print("Input `exit` or `quit` to leave, `clear` to forget the conversation, `reset-system` for another system")
        print("prompt, `multi-line` for input of several lines.")
        while True:
            try:
                text = self._read()
            except EOFError:
                print()
                return
            if text.strip().lower() in ("exit", "quit"):
                return
            if not self._command(text):
                self._answer(text)

    def _read(self) -> str:
        kinds = ("M" if self._several_lines else "") + ("S" if self._asks_system else "")
        prompt = f"<<<[{kinds}] " if kinds else "<<< "
        if not self._several_lines:
            return input(prompt)
        lines = [input(prompt)]
        while not lines[-1].endswith("#"):
            lines.append(input())
        return "\n".join(lines)[:-1]

    def _command(self, text: str) -> bool:
        """Does what a command says; whether it was one."""
        word = text.strip().lower()
        if word == "clear":
            self._history = []
        elif self._asks_system and word != "reset-system":
            system = text if text else self._template.default_system
            self._system, self._history, self._asks_system = system, [], False
        elif word == "reset-system":
            self._asks_system = True
        elif word == "multi-line" and not self._several_lines:
            self._several_lines = True
            print("End input with `#`; `single-line#` goes back.")
        elif word == "single-line" and self._several_lines:
            self._several_lines = False
        elif word:
            return False
        return True

    def _answer(self, query: str) -> None:
        if not self._template.support_multi_round:
            self._history = []
        request = {"query": query, "history": self._history, "system": self._system}
        if not self._template.facts.has_system:
            del request["system"]
        response: dict[str, Any] = {"response": "", "history": self._history}
        try:
            for response in self._responses(request):  # noqa: B007  (the last one counts)
                pass
        except KeyboardInterrupt:
            # What was written so far is the answer.
            print()
        except OctavoError as error:
            print(f"error: {error}")
            return
        print(LINE)
        entry = {"system": self._system, "query": query, "response": response["response"], "history": self._history}
        self._results.write(entry)
        self._history = response["history"]

    def _responses(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The response as it grows, printed on the way."""
        if not self._stream:
            (whole,) = inference_vllm(self._engine, self._template, [request])
            print(whole["response"])
            yield whole
            return
        shown = 0
        for responses in inference_stream_vllm(self._engine, self._template, [request]):
            response = responses[0]
            assert response is not None, "one request reports at every step"
            print(response["response"][shown:], end="", flush=True)
            shown = len(response["response"])
            yield response
        print()


def answer_files(engine: SwiftEngine, template: Template, arguments: InferArguments, results: Results) -> None:
    """Answers the lines of the data set's files; prints each and keeps it with the expected answer as `label`."""
    lines = list(_lines(arguments.val_dataset))
    if arguments.show_dataset_sample >= 0:
        lines = lines[: arguments.show_dataset_sample]
    began, info = time.perf_counter(), {"num_generated_tokens": 0}
    for start in range(0, len(lines), BATCH):
        part = lines[start : start + BATCH]
        names = ("query", "history", "system", "tools")
        requests = [{name: line[name] for name in names if line.get(name) is not None} for line in part]
        found: dict[str, Any] = {}
        for line, response in zip(part, inference_vllm(engine, template, requests, generation_info=found), strict=True):
            entry = {
                "system": line.get("system", template.default_system),
                "query": line["query"],
                "response": response["response"],
                "history": line.get("history") or [],
            }
            if line.get("response") is not None:
                entry["label"] = line["response"]
            results.write(entry)
            print(f"query: {entry['query']}\nresponse: {entry['response']}\n{LINE}")
        info["num_generated_tokens"] += found["num_generated_tokens"]
    seconds = time.perf_counter() - began
    tokens = info["num_generated_tokens"]
    print(f"{len(lines)} answers, {tokens} tokens, {seconds:.1f} s, {tokens / seconds:.1f} tokens/s")


def _lines(names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        path = expanded(name)
        if not path.is_file():
            raise ConfigError(f"--val_dataset {name} is no file; name a file of JSON lines")
        for number, text in enumerate(path.read_text("utf-8-sig").split("\n"), 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise ConfigError(f"{name}, line {number} is not JSON: {error}") from None
            if not isinstance(line, dict) or not isinstance(line.get("query"), str):
                raise ConfigError(f"{name}, line {number} has no query; give an object with a text of that name")
            yield line
