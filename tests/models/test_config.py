"""config.json: both spellings of everything, and errors that name the field, the value and the fix."""

from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.models import read_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


def read(**changes: Any) -> Any:
    return read_config({name: value for name, value in {**LLAMA, **changes}.items() if value != "gone"})


def test_what_may_be_left_out() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.rope.rotary_dim) == (4, 16, 16)
    assert (config.dtype, config.eos_token_ids, config.bos_token_id) == ("float32", (), None)
    assert (config.rope.theta, config.rope.scaling, config.max_position) == (10000.0, "none", 128)
    assert (config.qkv_bias, config.o_bias, config.mlp_bias, config.tie_word_embeddings) == (False,) * 4


def test_old_and_new_spellings() -> None:
    assert read(torch_dtype="bfloat16").dtype == read(dtype="bfloat16").dtype == "bfloat16"
    assert read(eos_token_id=[2, 3]).eos_token_ids == (2, 3)
    assert read(eos_token_id=0).eos_token_ids == (0,)
    old = read(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    new = read(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})
    assert old == new
    assert (old.rope.theta, old.rope.factor) == (5e5, 2.0)
    assert read(rope_scaling=None) == read(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def test_biases() -> None:
    config = read(attention_bias=True, mlp_bias=True)
    assert config.qkv_bias
    assert config.o_bias
    assert config.mlp_bias


def test_scaled_context() -> None:
    assert read(rope_scaling=YARN, max_position_embeddings=32).max_position == 128
    assert read(rope_scaling=YARN).max_position == 128
    assert read(rope_scaling={"type": "linear", "factor": 3.0}).max_position == 384
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}
    assert read(rope_scaling=llama3).max_position == 128


def test_freq_factors() -> None:
    rope = read(rope_scaling={"rope_type": "freq_factors", "factors": [1, 1, 1, 2, 2, 4, 8, 8]}).rope
    assert rope.freq_factors == (1, 1, 1, 2, 2, 4, 8, 8)
    with pytest.raises(ConfigError, match=r"rope_scaling\.factors is \[1\]; it must be a list of 8 numbers"):
        read(rope_scaling={"rope_type": "freq_factors", "factors": [1]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForCausalM"]},
            "'LlamaForCausalM' is not supported. Did you mean 'LlamaForCausalLM'",
        ),
        ({"architectures": "gone"}, "architectures is None; it must be a list"),
        ({"hidden_size": "gone"}, "hidden_size is missing"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'; it must be an integer"),
        ({"vocab_size": 0}, "vocab_size is 0; it must be an integer of at least 1"),
        ({"hidden_size": 65}, "hidden_size is 65; it must be a multiple of num_attention_heads, 4"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; it must be a divisor of num_attention_heads, 4",
        ),
        ({"head_dim": 15}, "head_dim is 15; it must be even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0; it must be a number above 0"),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be one of silu"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be a token id"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_scaling.rope_type is 'longrope'; it must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope_scaling.factor is 0.5; it must be at least 1",
        ),
        ({"rope_scaling": {"type": "llama3", "factor": 2.0}}, "original_max_position_embeddings is missing"),
        ({"rope_scaling": 3}, "rope_scaling is 3; it must be an object"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
            "rope_scaling.type is 'linear'",
        ),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling"),
    ],
)
def test_errors_name_field_value_and_fix(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(**changes)
    assert message in str(error.value)


def test_windows() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read(**mistral, sliding_window=None).windows == read(**mistral, sliding_window=128).windows == ()
    assert read(**mistral, sliding_window=64).windows == (64, 64)
    qwen2 = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64, "max_window_layers": 1}
    assert read(**qwen2).windows == ()
    assert read(**qwen2, use_sliding_window=True).windows == (0, 64)
    assert read(**{**qwen2, "max_window_layers": None}, use_sliding_window=True).windows == (0, 0)
    kinds = {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]}
    assert read(**qwen2, **kinds).windows == (64, 0)
    with pytest.raises(ConfigError, match=r"layer_types is \['chunked'\]; it must be a list of 2 times"):
        read(**qwen2, **{**kinds, "layer_types": ["chunked"]})
    with pytest.raises(ConfigError, match="max_window_layers is -1; it must be"):
        read(**{**qwen2, "max_window_layers": -1}, use_sliding_window=True)


def test_qwen3_heads_have_a_width_of_their_own() -> None:
    config = read(architectures=["Qwen3ForCausalLM"])
    assert (config.head_dim, config.qk_norm, config.qkv_bias, config.o_bias) == (128, True, False, False)
    assert read(architectures=["Qwen3ForCausalLM"], head_dim=16, attention_bias=True).o_bias


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures is [['LlamaForCausalLM']]"),
        ({"architectures": [3]}, "architectures is [3]"),
        ({"num_hidden_layers": 2**31}, "at most"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000; it must be at most 4096"),
        ({"vocab_size": 2**63}, "vocab_size is 9223372036854775808; it must be at most 2147483647"),
        ({"hidden_size": 2**30}, "hidden_size is 1073741824; it must be at most 65536 for each of 4 heads"),
        ({"head_dim": 2**30}, "head_dim is 1073741824; it must be at most 65536"),
        ({"rms_norm_eps": 1e308}, "rms_norm_eps is 1e+308"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope_scaling.type is ['yarn']"),
        ({"rope_scaling": {"type": {}, "rope_type": {"a": 1}}}, "rope_scaling.rope_type is {'a': 1}"),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, "rope_scaling.factor is 1e+308"),
        ({"eos_token_id": [[2]]}, "eos_token_id is [[2]]"),
        ({"rope_scaling": {"rope_type": "freq_factors", "factors": [1, "x"] * 4}}, "factors"),
        ({"rope_scaling": {"rope_type": "freq_factors", "factors": [-1.0] * 8}}, "factors"),
        ({"torch_dtype": ["float32"]}, "torch_dtype is ['float32']"),
    ],
)
def test_values_that_nothing_may_follow_from(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(**changes)
    assert words in str(raised.value)


@pytest.mark.parametrize("kinds", [3, "full_attention", [["full_attention"]] * 2, [None, None], ["full_attention"], {}])
def test_layer_types_that_are_none(kinds: Any) -> None:
    with pytest.raises(ConfigError, match="layer_types is"):
        read(architectures=["Qwen2ForCausalLM"], use_sliding_window=True, sliding_window=8, layer_types=kinds)


def test_ids_that_cannot_be_drawn_end_nothing() -> None:
    assert read(eos_token_id=[2, -1, 160, 2**40, 159]).eos_token_ids == (2, 159)
