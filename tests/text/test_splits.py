"""Ways to cut text, each by a text that tells it from the others; and which one a file without a name for it gets."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from octavo.checkpoint import TokenizerData
from octavo.checkpoint.gguf import GgufFile
from octavo.text.splits import SPLITS, guess
from octavo.text.tokenizer import Tokenizer

TEXT = "I'M a HelloYou  x1234 e\u0301 中文カナ \n\n;ok+=12, \U0001d400 don't"
# Where TEXT is cut, by the kinds of tokenizers that there are.
CUTS = {
    "gpt-2": "I_'_M_ a_ HelloYou_ _ x_1234_ e_\u0301_ 中文カナ_ \n_\n_;_ok_+=_12_,_ \U0001d400_ don_'t",
    "smollm": "I_'_M_ a_ HelloYou_ _ x_1_2_3_4_ e_\u0301_ 中文カナ_ \n_\n_;_ok_+=_1_2_,_ \U0001d400_ don_'t",
    "llama-bpe": "I_'M_ a_ HelloYou_ _ x_123_4_ e_\u0301_ 中文カナ_ \n\n_;ok_+=_12_,_ \U0001d400_ don_'t",
    "qwen2": "I_'M_ a_ HelloYou_ _ x_1_2_3_4_ e_\u0301_ 中文カナ_ \n\n_;ok_+=_1_2_,_ \U0001d400_ don_'t",
    "qwen35": "I_'M_ a_ HelloYou_ _ x_1_2_3_4_ e\u0301_ 中文カナ_ \n\n_;ok_+=_1_2_,_ \U0001d400_ don_'t",
    "tekken": "I_'M_ a_ Hello_You_ _ x_1_2_3_4_ e\u0301_ 中文カナ_ \n\n_;ok_+=_1_2_,_ \U0001d400_ don_'t",
    "gpt-4o": "I'M_ a_ Hello_You_ _ x_123_4_ e\u0301_ 中文カナ_ \n\n_;ok_+=_12_,_ \U0001d400_ don't",
    # A mark goes with the blank behind it where letters, marks and blanks are cut one after the other.
    "deepseek-llm": "I_'_M_ a_ HelloYou_ _ x_1234_ e_\u0301 _中文カナ_ _\n_\n_;_ok_+=_12_,_ \U0001d400_ don_'_t",
    "deepseek-coder": "I_'_M_ a_ HelloYou_ _ x_1_2_3_4_ e_\u0301_ _中文カナ_ _\n_\n_;_ok_+=_1_2_,_ \U0001d400_ don_'_t",
    "deepseek-v3": "I_'M_ a_ HelloYou_ _ x_123_4_ e\u0301_ _中文カナ_ \n\n_;ok_+=_12_,_ \U0001d400_ don_'t",
    "falcon": "I_'_M_ a_ HelloYou_ _ x_123_4_ e_\u0301_ 中文カナ_ \n\n_;_ok_+=_12_,_ \U0001d400_ don_'_t",
}
# What only some of them tell apart: the end of a line behind signs, a tail of blanks, letters of one case or none.
MORE = [
    ("seed-coder", "a!\n b", "a_!_\n_ b"),
    ("llama-bpe", "a!\n b", "a_!\n_ b"),
    ("tekken", "a!/\n b", "a_!/\n_ b"),
    ("deepseek-llm", "a  ", "a_  "),
    ("deepseek-llm", "\u01bb\u01c4\u1c8a", "\u01bb_\u01c4_\u1c8a"),
    ("deepseek-llm", "x\uff01\u3002\u201c", "x_\uff01_\u3002\u201c"),
    ("deepseek-coder", "a\uac00b $", "a_\uac00_b_ $"),
    ("deepseek-v3", "(abc) $x \u3042\u4e2da", "(abc_)_ $_x_ _\u3042\u4e2d_a"),
    ("falcon", "12345<=>`$ x", "123_45_<=>`$_ x"),
    ("falcon", "a 1234", "a_ _123_4"),
]


@pytest.mark.parametrize(("name", "text", "cut"), [*((name, TEXT, cut) for name, cut in CUTS.items()), *MORE])
def test_where_text_is_cut(name: str, text: str, cut: str) -> None:
    steps = pre_tokenizers.Sequence(SPLITS[name].steps(add_prefix_space=False))
    assert "_".join(text[begin:end] for _, (begin, end) in steps.pre_tokenize_str(text)) == cut


def test_names_for_the_same() -> None:
    assert SPLITS["deepseek-r1-qwen"] == SPLITS["qwen2"]
    assert SPLITS["default"] == SPLITS["mpt"] == SPLITS["gpt-2"]
    assert SPLITS["llama4"] == SPLITS["gpt-4o"]
    assert {name for name, split in SPLITS.items() if split.bos} >= {"llama-bpe", "tekken", "pixtral"}


@pytest.mark.parametrize(
    ("size", "token", "name"),
    [
        (128_256, "<|start_header_id|>", "llama-bpe"),
        (202_048, "<|begin_of_text|>", "llama4"),
        (201_088, "<|channel|>", "gpt-4o"),
        (151_936, "<|im_start|>", "qwen2"),
        (248_320, "<|im_start|>", "qwen35"),
        (129_280, "<｜begin▁of▁sentence｜>", "deepseek-v3"),
        (102_400, "<｜begin▁of▁sentence｜>", "deepseek-llm"),
        (32_256, "<｜begin▁of▁sentence｜>", "deepseek-coder"),
        (152_064, "<｜begin▁of▁sentence｜>", "deepseek-r1-qwen"),
        (131_072, "[TOOL_CALLS]", "tekken"),
        (256_000, "<|START_OF_TURN_TOKEN|>", "command-r"),
        (65_024, ">>ABSTRACT<<", "falcon"),
        (49_152, "<fim_prefix>", "starcoder"),
        (50_257, "<|endoftext|>", "gpt-2"),
        (128_256, "<|im_start|>", None),
        (32_000, "<|endoftext|>", None),
    ],
)
def test_vocabularies_that_are_known(size: int, token: str, name: str | None) -> None:
    assert guess({*map(str, range(size - 1)), token}) == name
    assert name is None or name in SPLITS


def test_a_file_that_names_no_way_to_cut(
    smollm2: Tokenizer, smollm2_path: Path, hard_text: str, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = dict(GgufFile(smollm2_path).metadata)
    del metadata["tokenizer.ggml.pre"]
    tokenizer = Tokenizer.from_data(TokenizerData(Path("old.gguf"), ggml=metadata))
    assert tokenizer.encode(hard_text) == smollm2.encode(hard_text)
    words = "its tokens are those of smollm, and text is cut as there"
    assert [record.message for record in caplog.records] == [
        f"old.gguf does not say how to cut text (tokenizer.ggml.pre): {words}"
    ]
    caplog.clear()
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *map(str, range(100, 1100))]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], *[1] * 1000]
    Tokenizer.from_data(TokenizerData(Path("old.gguf"), ggml=metadata))
    (record,) = caplog.records
    assert "text is cut as for gpt-2, and answers may be worse for it: convert the model again" in record.message


def test_sentencepiece_with_merges(sentencepiece: Any) -> None:
    """As Gemma 4: no scores, blanks as marks, bytes for what is unknown."""
    merges = ["h e", "l l", "ll o", "he llo", "▁ hello", "o r", "w or"]
    tokenizer = sentencepiece(
        **{"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.merges": merges, "tokenizer.ggml.scores": None}
    )
    ids = tokenizer.encode("hello hello worß\n")
    pieces = [tokenizer.library.id_to_token(index) for index in ids]
    assert pieces == ["<s>", "hello", "▁hello", "▁", "wor", "<0xC3>", "<0x9F>", "<0x0A>"]
    assert tokenizer.decode(ids) == "hello hello worß\n"
