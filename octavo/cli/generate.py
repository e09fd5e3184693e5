"""`octavo generate`: answers a file of prompts, one JSON value a line, into a file of answers.

A run that was interrupted goes on where it stopped: lines whose answers stand in the output file are not asked again.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from octavo.cli.options import add_options, from_args
from octavo.cli.sampling import SamplingOptions
from octavo.config import EngineOptions
from octavo.errors import ConfigError, OctavoError, RequestError
from octavo.sampling_defaults import sampling_params
from octavo.sampling_params import SamplingParams


def add_arguments(parser: argparse.ArgumentParser) -> None:
    wanted = 'lines of {"prompt": ...} or {"messages": [...]}, each with sampling parameters of its own if wanted'
    parser.add_argument("-i", "--input", required=True, metavar="FILE", help=wanted)
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="answers, one JSON object a line")
    add_options(parser, SamplingOptions, "answers")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    source, target = Path(arguments.input), Path(arguments.output)
    if not source.is_file():
        raise ConfigError(f"input file {source} does not exist")
    done = _finished_lines(target)
    from octavo.llm import LLM

    llm = LLM.from_options(from_args(EngineOptions, arguments))
    given = from_args(SamplingOptions, arguments).given()
    sampling_params(llm.sampling_defaults, given)  # a mistake among them is no line's
    # What is no UTF-8 is an error of its own line.
    with (
        source.open(encoding="utf-8-sig", errors="surrogateescape") as lines,
        target.open("a", encoding="utf-8") as answers,
    ):
        total = sum(1 for line in lines if line.strip())
        lines.seek(0)
        return _Job(llm, given, answers, total, done).run(lines)


@dataclass(slots=True)
class _Task:
    number: int  # of the line in the input file, from 1
    name: Any  # the line's own "id", if it has one


class _Job:
    """One run over one file."""

    def __init__(self, llm: Any, given: dict[str, Any], answers: IO[str], total: int, done: set[int]):
        self.llm, self.given, self.answers, self.total, self.done = llm, given, answers, total, done
        self.tasks: list[_Task] = []
        self.answered = self.bad = 0

    def run(self, lines: IO[str]) -> int:
        """Answers every line; 0, or 1 if some were bad."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[tokens]} tokens"))
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("", total=self.total, completed=len(self.done), tokens=0)
            tokens = 0
            for index, output in self.llm.generate_iter(self._work(lines)):
                task = self.tasks[index]
                if isinstance(output, OctavoError):
                    self._report(task.number, output)
                else:
                    tokens += sum(len(sample.token_ids) for sample in output.outputs)
                    self._write(task, output)
                progress.update(bar, advance=1, tokens=tokens)
        print(f"{self.answered} answered, {len(self.done)} already there, {self.bad} bad lines", file=sys.stderr)
        return 1 if self.bad else 0

    def _work(self, lines: IO[str]) -> Iterator[tuple[Any, SamplingParams]]:
        for number, line in enumerate(lines, 1):
            if not line.strip() or number in self.done:
                continue
            task = _Task(number, None)
            try:
                prompt, params = self._read(line, task)
            except (OctavoError, ValueError, RecursionError) as error:
                self._report(number, error)
                continue
            self.tasks.append(task)
            yield prompt, params

    def _read(self, line: str, task: _Task) -> tuple[Any, SamplingParams]:
        value = json.loads(line)
        if isinstance(value, str):
            value = {"prompt": value}
        if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
            raise RequestError('a line is {"prompt": ...} or {"messages": [...]}, or a text')
        task.name = value.pop("id", None)
        if "messages" in value:
            prompt = self.llm.encode_chat(value.pop("messages"))
        else:
            prompt = value.pop("prompt")
        SamplingParams.check_names(value)
        return prompt, sampling_params(self.llm.sampling_defaults, self.given | value)

    def _report(self, number: int, error: Exception) -> None:
        self.bad += 1
        print(f"line {number}: {error}", file=sys.stderr)

    def _write(self, task: _Task, output: Any) -> None:
        answer: dict[str, Any] = {"line": task.number}
        if task.name is not None:
            answer["id"] = task.name
        answer["text"] = output.outputs[0].text
        answer["finish_reason"] = output.outputs[0].finish_reason
        if len(output.outputs) > 1:
            answer["texts"] = [sample.text for sample in output.outputs]
        answer["prompt_tokens"] = len(output.prompt_token_ids)
        answer["completion_tokens"] = sum(len(sample.token_ids) for sample in output.outputs)
        self.answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self.answers.flush()
        self.answered += 1


def _finished_lines(target: Path) -> set[int]:
    """Numbers of the input lines that `target` answers already; a line that a crash cut off is removed from it."""
    if not target.exists():
        return set()
    done, whole = set(), 0
    with target.open("rb") as lines:
        for line in lines:
            try:
                done.add(int(json.loads(line)["line"]))
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise ConfigError(
                        f"{target} holds lines that octavo generate did not write; name another file"
                    ) from None
                break
            whole += len(line)
    with target.open("rb+") as file:
        file.truncate(whole)
    return done
