"""Which type the KV cache has, and what a user is told who asks for one that the device has not."""

import pytest

from octavo.config import EngineOptions
from octavo.errors import ConfigError
from octavo.kernels import library
from octavo.kernels.builds import BUILDS
from octavo.kernels.support import kv_dtype, settle
from tests.builds import choose, needs_kernels
from tests.tiny_config import model_config

MODEL = model_config(hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16)


def of(device: str, **options: object) -> str:
    given = EngineOptions(**options)  # type: ignore[arg-type]
    dtype, *_ = settle(given, MODEL, {"BF16"}, device)
    return kv_dtype(given, dtype, device)


@needs_kernels
def test_a_cache_has_the_type_of_the_model_or_int8() -> None:
    assert of("cpu") == "bfloat16"
    assert of("cpu", dtype="float32") == "float32"
    for weights in ({}, {"dtype": "float32"}, {"quantize": "int8"}, {"quantize": "int4"}):
        assert of("cpu", kv_cache_dtype="int8", **weights) == "int8"


@pytest.mark.parametrize(
    ("device", "options", "said"),
    [
        ("cpu", {"kv_cache_dtype": "float32", "dtype": "bfloat16"}, "kv_cache_dtype is float32.* bfloat16, or int8"),
        ("cpu", {"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8.*, or int8"),
        (
            "cpu",
            {"kv_cache_dtype": "int8", "block_size": 8},
            r"int8 \(leave it out\).* block_size is 8",
        ),
        ("cpu", {"kv_cache_dtype": "int8", "dtype": "float16"}, "kv_cache_dtype is int8.* dtype is float16"),
        ("cuda", {"kv_cache_dtype": "int8"}, "kv_cache_dtype is int8, which works on a CPU alone; on a GPU use fp8"),
    ],
)
@needs_kernels
def test_a_type_that_cannot_be_had(device: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        of(device, **options)


def test_without_kernels_there_is_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"kv_cache_dtype is int8.* they were not built"):
        of("cpu", kv_cache_dtype="int8")


def test_a_build_for_another_makers_processors_is_opened_by_its_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    has, _ = library.processor()
    load = library.load.__wrapped__
    for name in library.builds():
        for maker in ("GenuineIntel", "AuthenticAMD"):
            monkeypatch.setattr(library, "processor", lambda maker=maker: (has, maker))
            opened, best = load(name), load()
            assert opened is None or opened.name == name
            assert best is not None
            assert BUILDS[best.name].maker in (None, maker)
