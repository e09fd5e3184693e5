"""Dequantization against the `gguf` package on random blocks."""

import gguf
import numpy as np
import pytest
import torch

from octavo.errors import CheckpointError
from octavo.layers.quant.gguf import dequantize

# Byte offsets of the fp16 scales in a block: random bits there would often be infinite.
SCALES = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def random_blocks(kind: str, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = rng.integers(0, 256, (count, size), np.uint8)
    for offset in SCALES[kind]:
        scales = rng.normal(size=count).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks


@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("count", [1, 6, 9000])
def test_equals_gguf(kind: str, count: int) -> None:
    blocks = random_blocks(kind, count)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(blocks.reshape(-1)), kind, (count, expected.shape[1]))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_what_was_quantized_comes_back(kind: str) -> None:
    weights = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    data = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind])
    found = dequantize(torch.from_numpy(data.reshape(-1)), kind, (8, 64)).numpy()
    assert np.abs(found - weights).max() < {"Q8_0": 0.02, "Q5_0": 0.2, "Q5_1": 0.15}.get(kind, 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_plain_numbers(dtype: torch.dtype) -> None:
    kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    weights = torch.randn(3, 5).to(dtype)
    assert torch.equal(dequantize(weights.view(-1).view(torch.uint8), kind, (3, 5)), weights.float())


def test_wrong_sizes_and_types_are_errors() -> None:
    data = torch.zeros(18, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="IQ4_XS cannot be read; known: F32"):
        dequantize(data, "IQ4_XS", (32,))
    with pytest.raises(CheckpointError, match=r"shape \[64\] cannot have 18 bytes"):
        dequantize(data, "Q4_0", (64,))
    with pytest.raises(CheckpointError, match=r"shape \[31\] cannot have 18 bytes"):
        dequantize(data, "Q4_0", (31,))
