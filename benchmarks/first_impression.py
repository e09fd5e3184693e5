"""Twenty simple questions to the default model at its defaults, ten times each, through `octavo chat` and over HTTP.

    python benchmarks/first_impression.py --runs 10 --way both --show

An answer is sane if it ends by itself within 1,024 tokens, says no eight words three times, and is in English. It is
right if it is sane and holds one of the words that were accepted before anything was tuned. Seeds are left alone.
"""

import argparse
import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MOST_TOKENS = 1024
# Questions, and what an answer must hold one of to be right, in lower case.
QUESTIONS: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("paris",),
    "What is the capital of Italy?": ("rome",),
    "What is the capital of Japan?": ("tokyo",),
    "What is 2 + 2?": ("4", "four"),
    "How many days are in a week?": ("7", "seven"),
    "How many legs does a spider have?": ("8", "eight"),
    "What color is the sky on a clear day?": ("blue",),
    "What color do you get when you mix red and white?": ("pink",),
    "Which planet is known as the Red Planet?": ("mars",),
    "Which planet do we live on?": ("earth",),
    "What is the largest ocean on Earth?": ("pacific",),
    "What is frozen water called?": ("ice",),
    "What gas do plants take in from the air?": ("carbon dioxide", "co2"),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "What is the opposite of hot?": ("cold",),
    "Name three fruits.": ("apple", "banana", "orange", "grape", "mango", "berry", "berries", "pear", "peach", "melon"),
    "What animal says meow?": ("cat",),
    "Write one sentence about the sea.": ("sea", "ocean", "wave", "water"),
    "Hello, how are you?": ("help", "assist", "i'm", "i am", "hello", "well", "fine", "good", "thank"),
    "What does a baker make?": ("bread", "cake", "pastr", "bake", "cookie", "pie"),
}
# Words of which an English text of some length has one in eight.
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by can for from has have he her his how i if in is it its me my name not of on one"
        " or our she so that the their there they this to was we what when which who will with you your",
    )
)


def faults(answer: str, finish_reason: str, tokens: int) -> list[str]:
    """Why an answer is not sane; empty if it is."""
    found = []
    if finish_reason != "stop":
        found.append(f"ended by {finish_reason}")
    if tokens > MOST_TOKENS:
        found.append("long")
    words = re.findall(r"\w+", answer.lower())
    if not answer.strip():
        found.append("empty")
    phrases = Counter(tuple(words[i : i + 8]) for i in range(len(words) - 7))
    if phrases and max(phrases.values()) >= 3:
        found.append("repeats")
    letters = [letter for letter in answer if letter.isalpha()]
    foreign = sum(not letter.isascii() for letter in letters) > len(letters) / 20
    if foreign or (len(words) >= 16 and sum(word in COMMON for word in words) < len(words) / 8):
        found.append("not English")
    return found


def is_right(question: str, answer: str) -> bool:
    return any(word in answer.lower() for word in QUESTIONS[question])


def ask_http(url: str, question: str) -> tuple[str, str, int]:
    """(answer, finish reason, tokens)"""
    body = {"messages": [{"role": "user", "content": question}]}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        got: dict[str, Any] = json.load(reply)
    choice = got["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], got["usage"]["completion_tokens"]


def ask_chat(question: str) -> tuple[str, str, int]:
    """As a user at a shell; `octavo chat` does not say how an answer ended, so its own tokens are counted."""
    command = [sys.executable, "-m", "octavo", "chat"]
    done = subprocess.run(command, input=question, capture_output=True, text=True, check=True)
    words = len(done.stdout.split())
    return done.stdout, "stop" if words < MOST_TOKENS * 3 // 4 else "length", words * 4 // 3


def measure(way: str, runs: int, ask: Any, workers: int, show: bool) -> bool:
    asked = [question for question in QUESTIONS for _ in range(runs)]
    with ThreadPoolExecutor(workers) as pool:
        answers = list(pool.map(ask, asked))
    sane = right = 0
    wrong: Counter[str] = Counter()
    for question, (answer, reason, tokens) in zip(asked, answers, strict=True):
        found = faults(answer, reason, tokens)
        sane += not found
        right += not found and is_right(question, answer)
        wrong.update(found)
        if show and (found or not is_right(question, answer)):
            print(f"  {question} -> {answer[:150]!r} {tokens} {', '.join(found) or 'wrong'}")
    longest = max(tokens for _, _, tokens in answers)
    different = len({answer for answer, _, _ in answers})
    print(
        f"{way}: {sane} of {len(asked)} sane, {right} right, {different} different, the longest of {longest} tokens;"
        f" {', '.join(f'{count} {what}' for what, count in wrong.most_common()) or 'no faults'}",
        flush=True,
    )
    return sane >= len(asked) * 9 // 10 and longest <= MOST_TOKENS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="times that each question is asked (default: 10)")
    parser.add_argument("--way", choices=["chat", "http", "both"], default="both")
    parser.add_argument("--show", action="store_true", help="print the answers that are not sane or not right")
    given = parser.parse_args()
    good = True
    if given.way != "chat":
        command = [sys.executable, "-m", "octavo", "serve", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            try:
                good &= measure("http", given.runs, lambda question: ask_http(url, question), 8, given.show)
            finally:
                server.terminate()
    if given.way != "http":
        good &= measure("chat", given.runs, ask_chat, 1, given.show)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
