"""Text token by token equals text at once, and never has a broken character in it."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from octavo.text.detokenizer import Detokenizer
from octavo.text.tokenizer import Tokenizer


def deltas(tokenizer: Tokenizer, ids: list[int], skip: bool = True, continued: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, continued=continued)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49160)), skip=st.booleans())
def test_random_tokens(smollm2: Tokenizer, ids: list[int], skip: bool) -> None:
    text = "".join(deltas(smollm2, ids, skip))
    assert text == smollm2.decode(ids, skip_special_tokens=skip)
    assert text == smollm2.library.decode(ids, skip_special_tokens=skip)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("👩‍👧🏽你好é नa \n漢￥🇫🇷"), max_size=20))
def test_no_character_leaves_broken(smollm2: Tokenizer, text: str) -> None:
    found = deltas(smollm2, smollm2.encode(text))
    assert "".join(found) == text
    assert not any("\ufffd" in delta for delta in found)


def test_text_leaves_as_soon_as_it_is_whole(smollm2: Tokenizer, hard_text: str) -> None:
    detokenizer, so_far = Detokenizer(smollm2), b""
    text = ""
    for token_id in smollm2.encode(hard_text):
        so_far += smollm2.token_bytes(token_id)
        text += detokenizer.push(token_id)
        assert text == so_far.decode("utf-8", "ignore")


def test_a_cut_character_is_replaced_at_the_end(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("👩‍👧")
    found = deltas(smollm2, ids[:1])
    assert found == ["", "\ufffd"]


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 400), max_size=12), skip=st.booleans(), space=st.booleans())
def test_random_sentencepiece_tokens(sentencepiece: Any, ids: list[int], skip: bool, space: bool) -> None:
    tokenizer = sentencepiece(**{"tokenizer.ggml.add_space_prefix": space})
    text = "".join(deltas(tokenizer, ids, skip))
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    reference = tokenizer.library.decode(ids, skip_special_tokens=skip)
    # Among bytes that are not UTF-8 the library gives up whole runs, Octavo the broken characters alone.
    if "\ufffd" not in reference:
        assert text == reference


def test_the_leading_space(sentencepiece: Any) -> None:
    tokenizer = sentencepiece()
    ids = tokenizer.encode("hello world", add_bos=False)
    assert deltas(tokenizer, ids) == ["hello", " world", ""]
    assert deltas(tokenizer, ids, continued=True) == [" hello", " world", ""]
    space = tokenizer.token_id("▁")
    assert deltas(tokenizer, [1, space, space, *ids]) == ["", "", " ", " hello", " world", ""]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 5)))
def test_a_decoder_without_bytes(ids: list[int]) -> None:
    vocabulary = {"un": 0, "##believ": 1, "##able": 2, "story": 3, "的": 4, "[UNK]": 5}
    library = Library(models.WordLevel(vocabulary, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece(cleanup=False)
    tokenizer = Tokenizer(library)
    assert "".join(deltas(tokenizer, ids)) == tokenizer.decode(ids)
