"""Tokenizers and a text that is hard on them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from octavo.checkpoint import TokenizerData
from octavo.text.tokenizer import Tokenizer

HARD_TEXT = """The quick brown fox can't, won't, shouldn't've; it's "WE'LL" & they'd 'RE I'm.
人工智能正在改变世界，大语言模型（LLM）需要高效的推理引擎。价格：￥1,234.50元
日本語のテキスト：カタカナ、ひらがな、漢字。ｱｲｳｴｵ 全角１２３
مرحبا بالعالم، كيف حالك؟ ١٢٣٤
नमस्ते दुनिया, आप कैसे हैं? १२३
Ελληνικά, Русский текст, עברית, 한국어 텍스트, Tiếng Việt, café vs cafe\u0301
👩‍👩‍👧‍👦 👍🏽 🇫🇷🇨🇳 🏳️‍🌈 ☃️ 🤷🏽‍♀️
def f(x):\n\tif x  >  10:\n\t\treturn x**2  # comment\n        return {"a": [1, 2, 3]}\r\n\r\n\n\n   \t  \n
0 12 345 6789 3.14159 1e-10 0xFF ½ Ⅷ ² 10,000,000
nbsp:\u00a0\u00a0here\u2003em\u200bzero\ufeffbom  double   triple    end   """


@pytest.fixture(scope="session")
def hard_text() -> str:
    return HARD_TEXT


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer.load(str(smollm2_path))


SentencePiece = Callable[..., Tokenizer]


@pytest.fixture(scope="session")
def sentencepiece() -> SentencePiece:
    """Makes a small SentencePiece-like tokenizer, as GGUF metadata describe it."""

    def make(**metadata: object) -> Tokenizer:
        words = [
            "▁",
            "▁hello",
            "▁world",
            "hello",
            "llo",
            "he",
            "▁he",
            "lo",
            "ll",
            "o",
            "h",
            "e",
            "l",
            "w",
            "r",
            "d",
        ]
        words += [
            "▁w",
            "or",
            "ld",
            "wor",
            "▁wor",
            "world",
            "é",
            "你",
            "▁▁",
            "orld",
            ",",
            "<",
            ">",
            "/",
            "s",
            "|",
        ]
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, "<mark>"]
        types = [2, 3, 3, *[6] * 256, *[1] * len(words), 4]
        scores = [0.0] * 259 + [-float(i) for i in range(len(words))] + [0.0]
        data = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        }
        return Tokenizer.from_data(TokenizerData(Path("m.gguf"), ggml=data | metadata))

    return make


@pytest.fixture(scope="session")
def as_json(smollm2: Tokenizer) -> Callable[..., TokenizerData]:
    """The default model's tokenizer as a Hugging Face folder would hold it."""

    def make(**settings: object) -> TokenizerData:
        return TokenizerData(
            Path("folder"),
            json=smollm2.library.to_str(),
            settings=settings,
            generation_config={"eos_token_id": [2, 0]},
        )

    return make
