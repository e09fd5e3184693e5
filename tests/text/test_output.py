"""Results: stop strings however the text is cut, stop tokens, logprobs, and deltas that join to the text."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.request import Logprob, Request, TokenOutput
from octavo.sampling_params import SamplingParams
from octavo.text.output import RequestText, TextDelta, bad_words_to_ids
from octavo.text.stop_strings import Match, StopStrings
from octavo.text.tokenizer import Tokenizer


def run(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    finish: str | None = "length",
    stop_id: int | None = None,
    **params: Any,
) -> tuple[RequestText, list[TextDelta]]:
    """Push `ids`, the last one with `finish`; checks on the way that deltas join to the text."""
    text = RequestText(Request("r", [1], SamplingParams(**params)), tokenizer, "prompt")
    deltas, joined = [], ""
    for place, token_id in enumerate(ids):
        last = place == len(ids) - 1
        row: TokenOutput = ("r", 0, token_id, finish if last else None, stop_id if last else None, None)
        deltas.append(text.push(row))
        joined += deltas[-1].text
        assert text.result().outputs[0].text == joined
    return text, deltas


def test_plain(smollm2: Tokenizer, hard_text: str) -> None:
    ids = smollm2.encode(hard_text)
    text, _ = run(smollm2, ids)
    result = text.result()
    assert result.finished
    assert result.prompt == "prompt"
    assert result.prompt_token_ids == [1]
    (output,) = result.outputs
    assert (output.text, output.token_ids, output.finish_reason, output.stop_reason) == (
        hard_text,
        ids,
        "length",
        None,
    )
    assert output.logprobs is None


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_across_tokens(smollm2: Tokenizer, include: bool) -> None:
    ids = smollm2.encode("The answer is forty-two, END OF TEXT and more")
    text, deltas = run(smollm2, ids, stop=["END OF", "zebra"], include_stop_str_in_output=include)
    output = text.result().outputs[0]
    assert output.text == "The answer is forty-two, " + ("END OF" if include else "")
    assert (output.finish_reason, output.stop_reason) == ("stop", "END OF")
    (end,) = [place for place, delta in enumerate(deltas) if delta.abort]
    assert deltas[end].finish_reason == "stop"
    assert output.token_ids == ids[: end + 1]
    assert all(delta.token_ids == [] and delta.text == "" for delta in deltas[end + 1 :])
    assert text.finished


def test_no_more_is_held_back_than_a_beginning(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a b Stopwatch c")
    text, deltas = run(smollm2, ids, stop=["Stopping"], finish=None)
    shown = ""
    for token_id, delta in zip(ids, deltas, strict=True):
        shown += delta.text
        full = smollm2.decode(ids[: ids.index(token_id) + 1])
        held = full.removeprefix(shown)
        assert "Stopping".startswith(held)
    assert text.result().outputs[0].text == "a b Stopwatch c"


def test_what_is_held_back_leaves_at_the_end(smollm2: Tokenizer) -> None:
    text, deltas = run(smollm2, smollm2.encode("a Stop"), stop=["Stopping"])
    assert text.result().outputs[0].text == "a Stop"
    assert deltas[-1].text.endswith("Stop")
    text, _ = run(smollm2, smollm2.encode("a Stop"), stop=["Stopping"], finish=None)
    assert text.result().outputs[0].text == "a "
    assert text.finish(0, "abort").text == "Stop"
    assert text.finish(0, "error").finish_reason is None
    assert text.result().outputs[0].text == "a Stop"
    assert text.result().outputs[0].finish_reason == "abort"


def test_a_stop_string_in_the_last_token_needs_no_abort(smollm2: Tokenizer) -> None:
    text, deltas = run(smollm2, smollm2.encode("one two"), stop=["two"], finish="length")
    assert not deltas[-1].abort
    assert text.result().outputs[0].stop_reason == "two"
    assert text.result().outputs[0].finish_reason == "stop"


def test_min_tokens_lets_early_stop_strings_pass(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("END one two END three")
    text, _ = run(smollm2, ids, stop=["END"], min_tokens=2, max_tokens=50)
    assert text.result().outputs[0].text == "END one two "
    # Like EOS, a stop string may come with token min_tokens + 1 at the earliest.
    place = len(smollm2.encode("END one two END"))
    for min_tokens, expected in ((place - 1, "END one two "), (place, "END one two END three")):
        text, _ = run(smollm2, ids, stop=["END"], min_tokens=min_tokens, max_tokens=50)
        assert text.result().outputs[0].text == expected
    text, _ = run(smollm2, ids, stop=["END"], min_tokens=len(ids), max_tokens=50)
    assert text.result().outputs[0].text == "END one two END three"


def test_stop_tokens_are_not_text(smollm2: Tokenizer) -> None:
    ids = [*smollm2.encode("one"), *smollm2.encode(" two")]
    text, deltas = run(smollm2, ids, finish="stop", stop_id=ids[-1])
    output = text.result().outputs[0]
    assert (output.text, output.token_ids, output.stop_reason) == ("one", ids, ids[-1])
    assert not deltas[-1].abort
    text, _ = run(smollm2, ids, finish="stop", stop_id=ids[-1], include_stop_str_in_output=True)
    assert text.result().outputs[0].text == "one two"
    text, _ = run(smollm2, [*ids, 2], finish="stop", skip_special_tokens=False)
    output = text.result().outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("one two", "stop", None)
    text, _ = run(smollm2, [*ids, 2, *ids], skip_special_tokens=False)
    assert text.result().outputs[0].text == "one two<|im_end|>one two"


def test_a_cut_character_leaves_with_the_last_token(smollm2: Tokenizer) -> None:
    ids = smollm2.encode("a👩‍👧")
    text, deltas = run(smollm2, ids[:2])
    assert deltas[-1].text == "\ufffd"
    assert text.result().outputs[0].text == "a\ufffd"


def test_samples_are_apart(smollm2: Tokenizer) -> None:
    text = RequestText(Request("r", [1], SamplingParams(n=2, stop=["b"])), smollm2)
    a, b = smollm2.encode("a")[0], smollm2.encode("b")[0]
    assert text.push(("r", 1, a, None, None, None)).index == 1
    assert text.push(("r", 1, b, None, None, None)).abort
    assert not text.finished
    text.push(("r", 0, a, "length", None, None))
    assert text.finished
    assert [(o.index, o.text, o.finish_reason) for o in text.result().outputs] == [
        (0, "a", "length"),
        (1, "a", "stop"),
    ]


def test_logprobs_have_words(smollm2: Tokenizer) -> None:
    a, b, c = (smollm2.encode(x)[0] for x in "abc")
    text = RequestText(Request("r", [1, a], SamplingParams(logprobs=2)), smollm2)
    delta = text.push(("r", 0, a, None, None, ([a, b, c], [-3.0, -0.5, -1.0], 7)))
    expected = {a: Logprob(-3.0, 7, "a"), b: Logprob(-0.5, 1, "b"), c: Logprob(-1.0, 2, "c")}
    assert delta.logprobs == [expected]
    text.push(("r", 0, b, "length", None, ([b, b, a], [-0.25, -0.25, -2.0], 1)))
    output = text.result().outputs[0]
    assert output.logprobs == [expected, {b: Logprob(-0.25, 1, "b"), a: Logprob(-2.0, 2, "a")}]
    assert list(output.logprobs[0]) == [a, b, c]
    assert output.cumulative_logprob == -3.25
    text.put_prompt_logprobs(0, [([a], [-1.0], 3)])
    assert text.result().prompt_logprobs == [None, {a: Logprob(-1.0, 3, "a")}]


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Character by character: the first string completed wins, the longest of those completed together."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            stop = max(ended, key=len)
            return text[: end - len(stop)], stop
    return text, None


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4)),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_pieces(pieces: list[str], stops: list[str]) -> None:
    expected = reference_stop("".join(pieces), stops)
    watch, shown = StopStrings(stops), ""
    for piece in pieces:
        found = watch.push(piece)
        if isinstance(found, Match):
            assert (shown + found.text, found.stop) == expected
            return
        shown += found
    assert expected == (shown + watch.flush(), None)


def test_bad_words(smollm2: Tokenizer) -> None:
    ids = bad_words_to_ids(smollm2, ["Paris", " Rome"])
    assert [smollm2.decode(word) for word in ids] == ["Paris", " Paris", "Rome", " Rome"]
    assert bad_words_to_ids(smollm2, ["Paris", "Paris"]) == ids[:2]


def test_the_scores_of_a_search_come_with_the_end(smollm2: Tokenizer) -> None:
    params = SamplingParams(beam_width=2, temperature=0.0, logprobs=0)
    text = RequestText(Request("r", [1], params), smollm2)
    text.put_beam_score(("r", 0, -3.0, -1.5))
    first = text.push(("r", 0, 100, None, None, ([100], [-1.0], 1)))
    assert (first.cumulative_logprob, first.beam_score) == (None, None)
    last = text.push(("r", 0, 101, "length", None, ([101], [-2.0], 1)))
    output = text.result().outputs[0]
    assert (output.cumulative_logprob, output.beam_score) == (last.cumulative_logprob, last.beam_score) == (-3.0, -1.5)
