"""How byte-level tokenizers cut text before they merge, by the names that GGUF files have for it.

Sources: llama.cpp's table of pre-tokenizers and the models' own tokenizer.json files, which win where the two differ.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Words of any case, where a capital begins a new one.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _O200K.replace(_CONTRACTIONS + "?", "").replace("{1,3}", "")
# Letters with two cases, as JavaScript knew them; not quite a class of today's Unicode.
_CASED = (
    r"A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}\x{370}-\x{373}"
    r"\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}\x{3A3}-\x{3F5}\x{3F7}-\x{481}"
    r"\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}"
    r"\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}"
    r"\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}"
    r"\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}"
    r"\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}"
    r"\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}"
    r"\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}"
    r"\x{A722}-\x{A76F}\x{A771}-\x{A787}\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}"
    r"\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}"
    r"\x{10CC0}-\x{10CF2}\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}"
)
_MARKS = r"!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}"
_EAST_ASIAN = r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK_LLM = (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_MARKS}]+", r"\s+$", _EAST_ASIAN, r"\p{N}+")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, _DIGIT)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_FALCON = (r"[\p{P}$+<=>^~|`]+", GPT2, r"[0-9]{3}")


@dataclass(frozen=True, slots=True)
class Split:
    """Each pattern cuts what those before it left, into what it matches and what lies between.

    `bos`: tokenizers of this kind put BOS first unless the file says otherwise. `ignore_merges`: a word that is a token
    is taken whole. `nfc` is the models' own; llama.cpp leaves it out.
    """

    patterns: tuple[str, ...] = (GPT2,)
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False

    def steps(self, add_prefix_space: bool) -> list[Any]:
        """As parts of a pre-tokenizer, the last of which writes bytes as letters."""
        built_in = self.patterns[-1:] == (GPT2,)
        cuts: list[Any] = [
            pre_tokenizers.Digits(individual_digits=True)
            if pattern == _DIGIT
            else pre_tokenizers.Split(Regex(pattern), behavior="isolated")
            for pattern in (self.patterns[:-1] if built_in else self.patterns)
        ]
        return [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=built_in)]


_SINGLE_DIGITS = Split((_DIGIT, GPT2))
_LLAMA3_WHOLE = Split((_LLAMA3,), ignore_merges=True, bos=True)
QWEN2 = Split((_LLAMA3.replace("{1,3}", ""),), nfc=True)

# tokenizer.ggml.pre -> how to cut.
SPLITS: dict[str, Split] = {
    **dict.fromkeys(("default", "gpt-2", "olmo", "mpt", "phi-2", "jais", "trillion", "exaone4", "gigachat"), Split()),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _SINGLE_DIGITS
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0", "lfm2"), _LLAMA3_WHOLE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), Split((_LLAMA3,))),
    "glm4": Split((_LLAMA3,), ignore_merges=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), QWEN2),
    "qwen35": Split((_QWEN35,), nfc=True),
    "tekken": Split((_TEKKEN,), ignore_merges=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), Split((_O200K,))),
    "deepseek-llm": Split(_DEEPSEEK_LLM),
    "deepseek-coder": Split(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), Split(_DEEPSEEK_V3)),
    "falcon": Split(_FALCON),
    "seed-coder": Split((_SEED,)),
}

# A token that nobody else has in a vocabulary of so many -> whose it is.
_KNOWN = (
    ("<|start_header_id|>", 128_000, 128_300, "llama-bpe"),
    ("<|begin_of_text|>", 200_000, 203_000, "llama4"),
    ("<|channel|>", 200_000, 201_100, "gpt-4o"),
    ("<|im_start|>", 248_000, 248_400, "qwen35"),
    ("<|im_start|>", 151_600, 152_100, "qwen2"),
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", 151_600, 152_100, "deepseek-r1-qwen"),
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", 128_800, 129_300, "deepseek-v3"),
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", 102_000, 102_500, "deepseek-llm"),
    ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", 32_000, 32_300, "deepseek-coder"),
    ("[TOOL_CALLS]", 131_000, 131_100, "tekken"),
    ("<|START_OF_TURN_TOKEN|>", 255_000, 256_100, "command-r"),
    (">>ABSTRACT<<", 65_000, 65_100, "falcon"),
    ("<repo_name>", 49_100, 49_300, "smollm"),
    ("<fim_prefix>", 49_100, 49_300, "starcoder"),
    ("<|endoftext|>", 50_200, 50_700, "gpt-2"),
)


def guess(tokens: Collection[str]) -> str | None:
    """The name of the way to cut that goes with a vocabulary; None for one that nobody here knows."""
    for token, fewest, most, name in _KNOWN:
        if fewest <= len(tokens) <= most and token in tokens:
            return name
    return None
