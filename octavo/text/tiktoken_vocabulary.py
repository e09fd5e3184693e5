"""A tokenizer of the `tokenizers` library out of the ranks of a `.tiktoken` file (Qwen v1).

tiktoken merges whichever neighbours together are a token, lowest rank first; the library wants the pairs by
name. So each token gives a merge for every way to cut it into two other tokens, in the order of ranks.
"""

from collections.abc import Mapping, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from octavo.checkpoint.tiktoken import SPECIAL_TOKENS
from octavo.text.byte_level import written
from octavo.text.splits import QWEN2

# Qwen's chat models read ChatML, and were trained with this system prompt wherever there is no other.
CHATML = """\
{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def build(ranks: Sequence[bytes]) -> Tokenizer:
    """The tokenizer of `ranks`, whose special tokens follow them."""
    texts = [written(token) for token in ranks]
    # A word that is a token is never cut: tiktoken looks it up before it merges.
    ids = {text: rank for rank, text in enumerate(texts)}
    model = models.BPE(vocab=ids, merges=_merges(ids), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(QWEN2.steps(add_prefix_space=False))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS])
    return tokenizer


def _merges(ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Of the cuts of one token, that of the lowest ranks goes first. This takes most of the time of `build`."""
    merges: list[tuple[str, str]] = []
    for text in ids:
        cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
        if len(cuts) > 1:
            cuts.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges += cuts
    return merges
