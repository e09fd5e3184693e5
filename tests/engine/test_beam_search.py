"""Beam search in the batch against transformers' own, on a tiny model: the same sequences and scores in any company."""

import itertools
import random
from pathlib import Path

import pytest
import torch
import transformers

from octavo.config import EngineOptions
from octavo.engine.beam_search import BeamSearch
from octavo.engine.engine import Engine
from octavo.errors import RequestError
from octavo.models import read_config
from octavo.request import Request
from octavo.sampling_params import SamplingParams
from tests.steps import Row, all_logits
from tests.tiny_models import FolderCheckpoint, runner_for, save_llama
from tests.tolerances import of_logits

EOS = list(range(2, 160, 9))
RANDOM = random.Random(3)
PROMPTS = [[RANDOM.randrange(3, 160) for _ in range(length)] for length in (1, 7, 16, 33)]
# Width, penalty, early stopping, and how many tokens at least and at most.
SEARCHES = [
    *((width, 1.0, False, 0, 14) for width in (2, 4, 8)),
    *((4, penalty, early, 0, 14) for penalty in (0.0, 2.0, -1.0) for early in (False, True, "never")),
    (8, 1.0, True, 0, 20),
    (8, 1.0, "never", 0, 20),
    (4, 1.0, False, 6, 14),
    (3, 1.0, False, 0, 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_llama(tmp_path_factory.mktemp("llama"), eos_token_id=EOS))


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' answers with their scores, by prompt and search."""
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def search(prompt, width, penalty, early, at_least, at_most, eos):
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            num_beams=width,
            num_return_sequences=width,
            do_sample=False,
            length_penalty=penalty,
            early_stopping=early,
            min_new_tokens=at_least or None,
            max_new_tokens=at_most,
            eos_token_id=eos,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
        lengths = (result.beam_indices >= 0).sum(dim=1).tolist()
        answers = [
            row[len(prompt) : len(prompt) + n].tolist() for row, n in zip(result.sequences, lengths, strict=True)
        ]
        return list(zip(answers, result.sequences_scores.tolist(), strict=True))

    return {
        (i, number): search(prompt, *asked, EOS)
        for i, prompt in enumerate(PROMPTS)
        for number, asked in enumerate(SEARCHES)
    } | {("ignored", i): search(prompt, 4, 1.0, False, 0, 14, None) for i, prompt in enumerate(PROMPTS)}


def params_of(width, penalty, early, at_least, at_most, **more):
    return SamplingParams(
        n=width,
        beam_width=width,
        temperature=0.0,
        length_penalty=penalty,
        early_stopping=early,
        min_tokens=at_least,
        max_tokens=at_most,
        **more,
    )


def build(folder, **options):
    return Engine.build(
        EngineOptions(
            model=folder, device="cpu", dtype="float32", **{"kv_cache_memory": "8MiB", "max_model_len": 128} | options
        )
    )


def answer(engine, requests):
    """The tokens of each answer and their scores, with the engine's invariants checked after every step."""
    tokens, scores, reasons = {}, {}, {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        output = engine.step()
        engine.scheduler.check()
        for name, index, token, reason, *_ in output.tokens:
            tokens.setdefault((name, index), []).append(token)
            reasons[name, index] = reason
        for name, index, cumulative, score in output.beam_scores:
            scores[name, index] = (cumulative, score)
    assert engine.stats().blocks_owned == 0
    return tokens, scores, reasons


def all_searches():
    return [
        Request(repr((i, number)), prompt, params_of(*asked))
        for i, prompt in enumerate(PROMPTS)
        for number, asked in enumerate(SEARCHES)
    ] + [
        Request(repr(("ignored", i)), prompt, params_of(4, 1.0, False, 0, 14, ignore_eos=True))
        for i, prompt in enumerate(PROMPTS)
    ]


def ordinary():
    return [
        Request(f"ordinary{i}", prompt * 2, SamplingParams(max_tokens=20, temperature=0.7, seed=i, n=1 + i % 3))
        for i, prompt in enumerate(PROMPTS)
    ]


@pytest.fixture(scope="module")
def tolerance(folder):
    """Of the sum of so many log probabilities, each of an answer's token."""
    checkpoint = FolderCheckpoint(Path(folder))
    config = read_config(checkpoint.config)
    largest = max(float(all_logits(runner_for(checkpoint), Row(prompt)).abs().max()) for prompt in PROMPTS)
    return lambda count: of_logits(config, max(map(len, PROMPTS)) + count, largest, count)


def assert_equal(tokens, scores, reference, tolerance):
    for key, answers in reference.items():
        for index, (wanted, score) in enumerate(answers):
            assert tokens[repr(key), index] == wanted, key
            cumulative, found = scores[repr(key), index]
            penalty = 1.0 if key[0] == "ignored" else SEARCHES[key[1]][1]
            divisor = len(wanted) ** penalty
            assert cumulative == pytest.approx(score * divisor, abs=tolerance(len(wanted)), rel=0)
            assert found == pytest.approx(cumulative / divisor)


def test_equal_to_transformers_all_at_once_beside_ordinary_requests(folder, reference, tolerance):
    engine = build(folder)
    mixed = [x for pair in itertools.zip_longest(all_searches(), ordinary()) for x in pair if x]
    tokens, scores, reasons = answer(engine, mixed)
    assert_equal(tokens, scores, reference, tolerance)
    ends = [reason for (name, _), reason in reasons.items() if not name.startswith("ordinary")]
    assert min(ends.count("stop"), ends.count("length")) > 50
    alone = answer(build(folder), ordinary())[0]
    assert {key: x for key, x in tokens.items() if key[0].startswith("ordinary")} == alone


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 9, "max_num_seqs": 9},
        {"enable_prefix_caching": False, "block_size": 4},
        {"kv_cache_memory": 64 * 4 * 512, "block_size": 4, "max_model_len": 60, "preemption_mode": "recompute"},
        {"kv_cache_memory": 64 * 4 * 512, "block_size": 4, "max_model_len": 60, "swap_space": "1MiB"}
        | {"preemption_mode": "swap"},
    ],
    ids=["tight budget", "no cache", "recompute", "swap"],
)
def test_equal_whatever_the_budget_the_cache_and_the_memory(folder, reference, tolerance, options):
    engine = build(folder, **options)
    engine.scheduler._fits_ahead = lambda state, owned_hits: True
    tokens, scores, _ = answer(engine, all_searches())
    assert_equal(tokens, scores, reference, tolerance)
    stats = engine.stats()
    assert (stats.preemptions > 0) == ("preemption_mode" in options)
    assert (stats.swaps > 0) == ("swap_space" in options)


def test_only_n_answers_and_logprobs_of_their_tokens(folder, reference):
    engine = build(folder)
    params = params_of(*SEARCHES[1], logprobs=2)
    params.n = 2
    engine.add(Request("a", PROMPTS[1], params))
    found = []
    while engine.has_work():
        found.append(engine.step())
    assert not any(output.tokens for output in found[:-1]), "answers come at the end"
    last = found[-1]
    for index, (wanted, _) in enumerate(reference[1, 1][:2]):
        rows = [row for row in last.tokens if row[1] == index]
        assert [row[2] for row in rows] == wanted
        assert all(row[5][0][0] == row[2] and len(row[5][0]) == 3 for row in rows)
        total = sum(row[5][1][0] for row in rows)
        assert total == pytest.approx(last.beam_scores[index][2])
    assert {row[1] for row in last.tokens} == {0, 1}


def test_a_stop_token_ends_a_beam_and_is_named():
    params = params_of(2, 1.0, True, 0, 8, stop_token_ids=[5])
    search = BeamSearch(params, frozenset((2,)), 8)
    search.put(0, ([0, 5, 9, 2, 7], [0, -0.1, -0.2, -0.3, -0.4], 1))
    assert search.advance() == [(0, 9), (0, 7)]
    search.put(0, ([0, 2, 9, 7, 8], [0, -0.1, -0.2, -0.3, -0.4], 1))
    search.put(1, ([0, 6, 9, 7, 8], [0, -0.1, -0.2, -0.3, -0.4], 1))
    assert search.advance() == []
    assert search.done
    assert [(a.finish_reason, a.stop_token_id, a.length) for a in search.answers()] == [
        ("stop", 5, 1),
        ("stop", None, 2),
    ]
    assert search.answers()[1].score == pytest.approx(-0.3 / 2)


def test_a_search_goes_on_when_all_its_beams_are_computed_again_after_it_forgot():
    search = BeamSearch(params_of(2, 1.0, False, 0, 8), frozenset((2,)), 8)
    search.put(0, ([0, 5, 9, 7], [0, -0.1, -0.2, -0.3], 1))
    assert search.advance() == [(0, 5), (0, 9)]
    search.put(0, ([0, 6, 7, 8], [0, -0.1, -0.2, -0.3], 1))
    assert not search.ready
    search.forget()
    search.put(1, ([0, 6, 7, 8], [0, -0.1, -0.2, -0.3], 1))
    assert not search.ready
    search.put(0, ([0, 6, 7, 8], [0, -0.1, -0.2, -0.3], 1))
    assert search.ready


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"beam_width": 33}, "beam_width is 33; it must be from 0 to 32"),
        ({"n": 5}, "n is 5, but a search with 4 beams"),
        ({"temperature": 1.0}, r"temperature is 1\.0, which beam search does not use; set it to 0\.0"),
        ({"stop": ["a"]}, "stop is"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"bad_words": ["a"]}, "bad_words"),
        ({"top_p": 0.5}, "top_p"),
        ({"early_stopping": "soon"}, "early_stopping is 'soon'"),
        ({"early_stopping": 1}, "early_stopping is 1"),
        ({"length_penalty": "long"}, "length_penalty is 'long'"),
        ({"beam_width": 0, "length_penalty": 2.0}, "length_penalty is for beam search"),
        ({"beam_width": 1, "early_stopping": True}, "early_stopping is for beam search"),
    ],
)
def test_what_a_search_cannot_do_is_refused(given, words):
    with pytest.raises(RequestError, match=words):
        SamplingParams(**{"beam_width": 4, "temperature": 0.0} | given)
