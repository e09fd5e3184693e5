"""`octavo chat`: a conversation in the terminal, streamed; or one answer to a prompt that is piped in."""

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from octavo.cli.options import add_options, from_args
from octavo.cli.sampling import SamplingOptions
from octavo.config import EngineOptions
from octavo.errors import RequestError
from octavo.log import logger
from octavo.sampling_defaults import sampling_params
from octavo.timeline import Timeline, describe, process_age

HELP = """\
/help           this list
/clear          forget the conversation
/system TEXT    set the system prompt and forget the conversation; without TEXT, take the model's own
/exit           leave (or Ctrl-D)
Ctrl-C stops an answer. A line that ends in \\ goes on in the next."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    add_options(parser, SamplingOptions, "answers")
    add_options(parser, EngineOptions, "model and engine")


def run(arguments: argparse.Namespace) -> int:
    timeline = [("python", process_age())]
    piped = None if sys.stdin.isatty() else sys.stdin.read().strip()
    if piped == "":
        print("octavo: error: the piped prompt is empty", file=sys.stderr)
        return 2
    conversation = Conversation(arguments, timeline)
    if piped is not None:
        conversation.ask(piped)
        return 0
    conversation.loop()
    return 0


class Conversation:
    """The messages so far, and the model that answers them."""

    def __init__(self, arguments: argparse.Namespace, timeline: Timeline):
        began = time.monotonic()
        from octavo.llm import LLM

        timeline.append(("imports", time.monotonic() - began))
        if not arguments.verbose:
            logger.setLevel("WARNING")
        options = from_args(EngineOptions, arguments)
        # One conversation needs one row; the memory goes to its context.
        options.max_num_seqs = options.max_num_seqs or 1
        self.llm = LLM.from_options(options)
        self.seconds = time.monotonic() - began
        phases, (_, engine) = self.llm.engine.timeline[:-1], self.llm.engine.timeline[-1]
        # What is left once the engine is ready: the tokenizer, which is read beside it.
        tokenizer = self.seconds - timeline[-1][1] - engine
        self.timeline: Timeline | None = [*timeline, *phases, ("tokenizer, beyond that", tokenizer)]
        self.params = sampling_params(self.llm.sampling_defaults, from_args(SamplingOptions, arguments).given())
        self.system: str | None = arguments.system
        self.messages: list[dict[str, Any]] = []
        self.clear()

    def clear(self) -> None:
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def loop(self) -> None:
        """Reads and answers until the user leaves."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its history and editing)
        config = self.llm.engine.config
        note(
            f"{self.llm.options.model} on {config.device} in {config.dtype}, context {config.max_model_len:,} tokens,"
            f" ready in {self.seconds:.1f} s. /help lists the commands."
        )
        while True:
            try:
                line = read_lines()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line.startswith("/"):
                if not self.command(line):
                    return
            elif line:
                try:
                    self.ask(line)
                except RequestError as error:
                    print(f"octavo: error: {error}", file=sys.stderr)

    def command(self, line: str) -> bool:
        """Does what a line with a slash says; False to leave."""
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name == "/clear":
            self.clear()
            note("the conversation is forgotten")
        elif name == "/system":
            self.system = rest.strip() or None
            self.clear()
            note("the system prompt is set" if self.system else "the system prompt is the model's own")
        else:
            print(HELP)
        return True

    def ask(self, text: str) -> None:
        """Answers `text`, printing as the answer grows; a stopped answer stays in the conversation as it is.

        Raises `RequestError` for a text that cannot be answered, which is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            prompt = self.fitting_prompt()
        except RequestError:
            self.messages.pop()
            raise
        answer, tokens, first, began = "", 0, 0.0, time.monotonic()
        with interruptible() as interrupted:
            for _, output, deltas in self.llm.stream(prompt, self.params):
                first = first or time.monotonic() - began
                self.tell_start(first)
                for delta in deltas:
                    print(delta.text, end="", flush=True)
                answer, tokens = output.outputs[0].text, len(output.outputs[0].token_ids)
                if interrupted():
                    break
        print()
        self.messages.append({"role": "assistant", "content": answer})
        seconds = time.monotonic() - began
        rate = (tokens - 1) / (seconds - first) if tokens > 1 and seconds > first else 0.0
        note(f"{tokens} tokens, {rate:.1f} tokens/s, first after {first:.2f} s{' (stopped)' if interrupted() else ''}")

    def tell_start(self, first: float) -> None:
        """With the first token of all, logs where the time until then went; what a person typed meanwhile is not in."""
        if self.timeline is not None:
            timeline, self.timeline = [*self.timeline, ("first token", first)], None
            logger.info("start: %s: %.2f s in all", describe(timeline), sum(seconds for _, seconds in timeline))

    def fitting_prompt(self) -> list[int]:
        """The conversation in tokens; its oldest turns are left out when the context is full, and that is said."""
        room = self.llm.engine.config.max_model_len - min(256, self.llm.engine.config.max_model_len // 4)
        dropped = 0
        while True:
            prompt = self.llm.encode_chat(self.messages)
            start = 1 if self.messages[0]["role"] == "system" else 0
            if len(prompt) <= room or len(self.messages) - start <= 1:
                break
            del self.messages[start : start + 2]
            dropped += 1
        if dropped:
            note(f"the context is full: the oldest {dropped} of the turns are left out")
        return prompt


def read_lines() -> str:
    """A line from the terminal, with those that follow a backslash."""
    line = input("> ")
    while line.endswith("\\"):
        line = line[:-1] + "\n" + input(". ")
    return line.strip()


def note(text: str) -> None:
    """A line about the answer rather than of it: on standard error, dim on a terminal."""
    print(f"\x1b[2m{text}\x1b[0m" if sys.stderr.isatty() else text, file=sys.stderr)


@contextlib.contextmanager
def interruptible() -> Iterator[Any]:
    """Within, Ctrl-C only sets a flag, which the yielded function tells: a step is never torn in the middle."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
