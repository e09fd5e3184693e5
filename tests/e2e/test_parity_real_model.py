"""The default model against `transformers` on the same dequantized weights: 20 prompts, one of 2,000 tokens."""

from pathlib import Path

import pytest
import torch

from octavo.config import EngineOptions
from octavo.parity import compare
from octavo.text.tokenizer import Tokenizer
from tests.builds import CHOSEN, choose, each_build_apart

PROMPTS = {
    "one letter": "A",
    "greeting": "Hello! Who are you?",
    "history": "The printing press changed Europe because",
    "arithmetic": "What is 17 times 23? Let us think step by step.",
    "list": "Three rivers of Africa:\n1. The Nile\n2.",
    "poem": "Write four lines about the sea.\n\nThe sea",
    "letter": "Dear Ms. O'Neill,\n\nThank you for your letter of 3 May. I'm writing to",
    "shouting": "WHY DON'T YOU ANSWER?!! I SAID:",
    "Chinese question": "浙江的省会在哪里？",
    "Chinese prose": "人工智能正在改变世界，大语言模型需要高效的推理引擎。例如，",
    "traditional": "臺灣的夜市有許多好吃的東西，像是",
    "Japanese": "東京は日本の首都です。京都は",
    "Python": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "C": "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; i++)\n\t\t",
    "JSON": '{"name": "octavo", "pages": 16, "tags": ["book", "',
    "SQL": "SELECT city, COUNT(*) FROM people\nWHERE age > 30\nGROUP BY",
    "emoji": "Weather: ☀️🌤️⛅ then 🌧️. What to wear? 🤔",
    "family emoji": "👩‍👩‍👧‍👦 👍🏽 🇫🇷🇨🇳 means",
    "chat": "<|im_start|>user\nName a colour.<|im_end|>\n<|im_start|>assistant\n",
}

# Where it is not the build that users of this machine get.
FEW = ("history", "Chinese question", "Python", "family emoji", "chat")


@pytest.fixture
def two_threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@each_build_apart
@pytest.mark.usefixtures("two_threads")
def test_tokens_and_logits_are_those_of_transformers(
    smollm2_path: Path, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, build)
    tokenizer = Tokenizer.load(str(smollm2_path))
    story = "".join(f"Day {i}: we sailed {i * 3 % 17} miles north, saw {i % 5} whales. " for i in range(200))
    prompts = {**PROMPTS, "long": tokenizer.decode(tokenizer.encode(story)[:2000])}
    if build != CHOSEN:
        prompts = {name: prompts[name] for name in FEW}
    options = EngineOptions(model=str(smollm2_path), device="cpu", dtype="float32", max_model_len=2100)
    rows = list(compare(options, prompts, max_tokens=8))
    assert len(rows) == len(prompts)
    assert build != CHOSEN or (len(rows), rows[-1].num_prompt) == (20, 2000)
    assert [row.name for row in rows if row.first_difference is not None] == []
    # The rule is for any model; on this one an eighth of what it allows is enough.
    assert [row.name for row in rows if not row.max_difference < row.tolerance / 8] == []
