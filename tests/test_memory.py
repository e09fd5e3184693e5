"""The memory plan: what fits is used, what does not is refused with numbers that work."""

import re
from dataclasses import replace

import pytest

from octavo.config import EngineOptions, format_size, parse_size
from octavo.errors import CapacityError, ConfigError
from octavo.memory import DeviceMemory, KeptAs, free_ram, resolve, working_bytes
from tests.tiny_config import model_config

MODEL = model_config(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, max_position=1024
)
PER_TOKEN = 2 * 2 * 2 * 16 * 4
WEIGHTS = 10_000_000
WORKING = working_bytes(MODEL, "float32", 64, 512)


def settle(free, **options):
    return resolve(EngineOptions(**options), MODEL, WEIGHTS, DeviceMemory("cpu", free), KeptAs("float32"))


def test_the_cache_takes_what_is_left_of_the_share():
    free = 40_000_000
    config, plan = settle(free)
    assert plan.kv_per_token == PER_TOKEN
    left = free // 2 - WEIGHTS - WORKING
    assert config.num_blocks == left // (PER_TOKEN * 16)
    assert plan.weights + plan.working + plan.kv_cache <= plan.budget
    assert f"{config.num_blocks:,} blocks" in plan.lines()[1]


def test_no_more_than_can_ever_be_used():
    config, _ = settle(10**12)
    assert config.num_blocks == 64 * 1024 // 16


def test_a_given_cache_size_is_kept():
    config, _ = settle(10**9, kv_cache_memory="1MiB")
    assert config.num_blocks == 1024**2 // (PER_TOKEN * 16)


def test_a_short_memory_shortens_the_context_and_says_so():
    config, plan = settle(2 * (WEIGHTS + WORKING + 300 * PER_TOKEN))
    assert config.max_model_len == config.num_blocks * 16 == 288
    assert "288 tokens fit of the model's 1,024" in plan.lines()[-1]


def test_a_wanted_context_that_does_not_fit_is_refused_with_the_one_that_does():
    free = 2 * (WEIGHTS + WORKING + 300 * PER_TOKEN)
    with pytest.raises(CapacityError) as refused:
        settle(free, max_model_len=1000)
    fits = int(re.search(r"--max-model-len (\d+)", str(refused.value))[1])
    assert settle(free, max_model_len=fits)[0].max_model_len == fits
    with pytest.raises(CapacityError):
        settle(free, max_model_len=fits + 16)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_model_len": 2000}, ConfigError, "1024"),
        ({"max_num_seqs": 100, "max_num_batched_tokens": 50}, ConfigError, "below max_num_seqs"),
        ({"kv_cache_memory": "1TiB"}, CapacityError, "--kv-cache-memory"),
        ({"cpu_memory_utilization": 0.01}, CapacityError, "--cpu-memory-utilization 0.01"),
    ],
)
def test_contradictions(options, error, words):
    with pytest.raises(error, match=re.escape(words)):
        settle(10**9, **options)


def on_gpu(free, total, **options):
    return resolve(EngineOptions(**options), MODEL, WEIGHTS, DeviceMemory("cuda", free, total), KeptAs("float32"))


def test_a_gpu_s_share_is_of_its_whole_memory():
    total, others = 10**9, 3 * 10**8
    _, plan = on_gpu(total - others, total, gpu_memory_utilization=0.9)
    assert plan.budget == int(0.9 * total) - others
    assert plan.weights + plan.working + plan.kv_cache <= plan.budget
    assert plan.lines()[0].startswith("memory: 667.57 MiB free of 953.67 MiB, 572.20 MiB to use")
    _, alone = on_gpu(total, total, gpu_memory_utilization=0.9)
    assert alone.budget - plan.budget == others


def test_a_gpu_that_others_fill_is_refused_with_both_numbers():
    for free in (10**8, 16 * 10**7):
        with pytest.raises(
            CapacityError, match=r"of 953\.67 MiB memory, \S+ MiB of it taken by others, only"
        ) as refused:
            on_gpu(free, 10**9, gpu_memory_utilization=0.85)
        assert "--gpu-memory-utilization 0.85" in str(refused.value)
    with pytest.raises(CapacityError, match="only 0 B may be used"):
        on_gpu(10**8, 10**9)


def test_every_sequence_has_room_for_a_token():
    config, _ = settle(10**12, max_num_seqs=1000)
    assert config.max_num_batched_tokens == 1000


def test_sizes():
    assert [parse_size(text) for text in ("1024", "2GiB", "1.5k", "3 MB", "1g")] == [
        1024,
        2 * 1024**3,
        1500,
        3_000_000,
        10**9,
    ]
    assert [format_size(size) for size in (5, 2048, 3 * 1024**3)] == ["5 B", "2.00 KiB", "3.00 GiB"]
    for wrong in ("", "x", "2 apples", "-1"):
        with pytest.raises(ConfigError):
            parse_size(wrong)


def test_free_ram_is_what_a_machine_could_have():
    assert 10**8 < free_ram() < 10**15


def test_dtype_halves_the_cache():
    assert MODEL.kv_bytes_per_token("bfloat16") * 2 == replace(MODEL).kv_bytes_per_token("float32")


def test_swap_space_is_host_memory():
    assert settle(10**9)[0].num_host_blocks == 0
    config, plan = settle(10**9, kv_cache_memory="1MiB", swap_space="4MiB")
    assert config.num_host_blocks == 4 * 1024**2 // (PER_TOKEN * 16)
    assert plan.swap_space == config.num_host_blocks * PER_TOKEN * 16
    assert any("4.00 MiB of host memory" in line for line in plan.lines())
    assert settle(10**9, swap_space="4MiB", preemption_mode="recompute")[0].num_host_blocks == 0


def test_swap_space_on_a_gpu_is_a_part_of_the_ram():
    def blocks(host_free, **options):
        given = EngineOptions(kv_cache_memory=2**20, **options)
        memory = DeviceMemory("cuda", 10**9, host_free=host_free)
        config, _ = resolve(given, MODEL, WEIGHTS, memory, KeptAs("bfloat16"))
        return config.num_host_blocks * PER_TOKEN // 2 * 16

    assert blocks(100 * 2**30) == 4 * 2**30
    assert blocks(8 * 2**30) == 2 * 2**30
    assert blocks(8 * 2**30, swap_space="6GiB") == 6 * 2**30


def test_a_swap_space_larger_than_memory_is_refused_with_what_is_left():
    with pytest.raises(CapacityError, match=r"swap_space is 1\.00 TiB.*set --swap-space lower"):
        settle(10**9, kv_cache_memory="1MiB", swap_space="1TiB")
    with pytest.raises(ConfigError, match="preemption_mode is swap, but swap_space is 0 B"):
        settle(10**9, preemption_mode="swap")
    with pytest.raises(ConfigError, match="preemption_mode is 'sometimes'"):
        EngineOptions(preemption_mode="sometimes")
