"""Answers that go round in circles: the last tokens are one pattern again and again."""

from octavo.sampling_params import RepetitionDetectionParams


def repeats(token_ids: list[int], params: RepetitionDetectionParams) -> bool:
    """Whether `token_ids` end in a pattern as `params` say. Most sizes are ruled out by one comparison."""
    times, length = params.min_count, len(token_ids)
    last = token_ids[-1]
    for size in range(max(1, params.min_pattern_size), min(params.max_pattern_size, length // times) + 1):
        if token_ids[-1 - size] == last and token_ids[-size * (times - 1) :] == token_ids[-size * times : -size]:
            return True
    return False
