"""What was written for vLLM carries over where that changes nothing, and is refused with the fix where it would."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.cli.options import Parser
from octavo.cli.serve import FOREIGN, add_arguments
from octavo.config import EngineOptions, ServerOptions
from octavo.errors import ConfigError
from octavo.llm import LLM, _engine_options
from octavo.vllm_arguments import ENGINE, SERVER, translated

DOCUMENT = Path(__file__).parents[1] / "docs/vllm_arguments.md"


def test_a_program_for_vllm_runs(tmp_path: Path):
    options = _engine_options(
        str(tmp_path),
        {
            "tensor_parallel_size": 1,
            "trust_remote_code": True,
            "enforce_eager": True,
            "dtype": "half",
            "gpu_memory_utilization": 0.8,
            "max_model_len": np.int64(512),
            "enable_chunked_prefill": True,
            "enable_prefix_caching": None,
            "disable_log_stats": True,
            "max_seq_len_to_capture": 8192,
            "generation_config": "vllm",
            "load_format": "safetensors",
            "quantization": None,
            "served_model_name": "mine",
            "limit_mm_per_prompt": {},
        },
    )
    assert options == EngineOptions(
        str(tmp_path), dtype="float16", gpu_memory_utilization=0.8, max_model_len=512, generation_config="none"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tensor_parallel_size", 2, "tensor_parallel_size is 2, which Octavo does not support: a model runs on one"),
        ("tensor_parallel_size", True, "tensor_parallel_size is True"),
        ("quantization", "awq", "quantization is 'awq'.*quantized files are read as they are"),
        ("enable_lora", True, "enable_lora is True.*merge the adapter"),
        ("enable_chunked_prefill", False, "set max_num_batched_tokens"),
        ("cpu_offload_gb", 4, "cpu_offload_gb is 4"),
        ("swap_space", 4, "swap_space is 4, which are bytes; write a unit, as in 4GiB"),
        ("tensor_paralel_size", 1, "is not an option of LLM. Did you mean 'tensor_parallel_size'"),
        ("speculative_config", {"model": "x"}, "not here yet"),
    ],
)
def test_what_could_matter_is_refused(name, value, message):
    with pytest.raises(ConfigError, match=message):
        LLM("smollm2:135m", **{name: value})


def test_every_value_that_is_harmless_is_taken():
    for name, argument in (ENGINE | SERVER).items():
        if name == "enable_log_requests":
            continue
        for value in argument.harmless or (None, True, 7, "x"):
            assert translated({name: value}, {name: argument}) == {}
        if argument.harmless is not None:
            assert argument.fix
            said = "given" if name == "hf_token" else "'something'"  # a secret is not printed
            with pytest.raises(ConfigError, match=f"{name} is {said}"):
                translated({name: "something"}, {name: argument})
    known = {*EngineOptions.__dataclass_fields__, *ServerOptions.__dataclass_fields__}
    assert not known & (ENGINE | SERVER).keys(), "Octavo has these itself"


def parsed(*words: str) -> dict:
    parser = Parser(prog="octavo serve")
    add_arguments(parser)
    return translated(vars(parser.parse_args(words)), FOREIGN)


def test_a_command_for_vllm_runs():
    words = (
        "org/model --trust-remote-code --tensor-parallel-size 1 --disable-log-requests --dtype half --no-enable-lora"
    )
    words += " --uvicorn-log-level warning --limit-mm-per-prompt {} --enable_auto_tool_choice --enable-log-requests"
    with pytest.raises(ConfigError, match=r"enable_auto_tool_choice is True.*tools are not here yet"):
        parsed(*words.split())
    left = parsed(*words.replace("--enable_auto_tool_choice ", "").split())
    assert left == {"model": "org/model", "dtype": "float16", "log_requests": True}
    assert parsed("--max-loras", "1", "model") == {"model": "model"}


def test_help_speaks_of_octavos_own_alone(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parsed("--help")
    told = capsys.readouterr().out
    assert not [name for name in ENGINE | SERVER if f"--{name.replace('_', '-')}" in re.findall(r"--[\w-]+", told)]
    assert "(default: )" not in told
    assert "--max-body-bytes SIZE" in told
    assert "default: 4.00 MiB" in told


def test_the_document_has_every_argument():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    told = {name: (taken, fix.strip()) for name, taken, fix in rows}
    known = {name: argument for name, argument in (ENGINE | SERVER).items() if name != "enable_log_requests"}
    assert told == {
        name: ("any value" if it.harmless is None else ", ".join(f"`{value}`" for value in it.harmless), it.fix)
        for name, it in known.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "flaot16"}, "dtype is 'flaot16'; it must be auto, float32, .*Did you mean 'float16'"),
        ({"hub": "huggingface"}, "it must be auto, hf or modelscope"),
        ({"device": "gpu"}, "it must be auto, cpu or cuda"),
        ({"quantize": "awq"}, "it must be int8, int4, fp8 or None"),
        ({"max_model_len": "8k"}, "max_model_len is '8k'; it must be a whole number or None"),
        ({"max_model_len": True}, "max_model_len is True"),
        ({"gpu_memory_utilization": "0.9"}, "it must be a number"),
        ({"enable_prefix_caching": "no"}, "it must be True or False"),
        ({"model": 3}, "model is 3; it must be a text"),
        ({"kv_cache_memory": 2.5}, "size 2.5 is not understood"),
        ({"kv_cache_memory": 100}, "kv_cache_memory is 100, which are bytes"),
        ({"seed": -1}, "from 0"),
        ({"preemption_mode": "swapp"}, "Did you mean 'swap'"),
    ],
)
def test_options_are_checked_in_python(options, message):
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


def test_paths_are_texts():
    assert EngineOptions(Path("/x")).model == "/x"
    assert sys.intern(EngineOptions(prefix_cache_dir=Path("/y")).prefix_cache_dir) == "/y"
