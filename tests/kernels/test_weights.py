"""Packed weights: GGUF's types keep their numbers, parts of different types make one matrix, and sizes are foretold."""

import gguf
import numpy as np
import pytest
import torch

from octavo.kernels import library
from octavo.kernels.weights import Packer, StoredRows, packed_bytes
from octavo.ops.cpu.eager import KernelOps
from tests.builds import BUILDS_APART, kernels_of, needs_kernels

pytestmark = needs_kernels

# Where a block of 256 holds its fp16 numbers, for types that the gguf package cannot quantize to.
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", *HALVES]


@pytest.fixture(scope="module", params=BUILDS_APART)
def ops(request):
    return KernelOps(library.KernelThreads(kernels_of(request.param), 2))


def stored(word, rows, width):
    """(random rows of a GGUF type, the same in fp32 as the gguf package reads them)."""
    rng = np.random.default_rng(3)
    kind = gguf.GGMLQuantizationType[word]
    if word in HALVES:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        data = rng.integers(0, 256, (rows, width // weights, size), dtype=np.uint8)
        for at in HALVES[word]:
            data[..., at : at + 2] = rng.uniform(0.005, 0.02, (rows, width // weights, 1)).astype("<f2").view(np.uint8)
        data = data.reshape(rows, -1)
    else:
        data = gguf.quants.quantize(rng.standard_normal((rows, width), np.float32), kind)
    return StoredRows(word, (rows, width), np.ascontiguousarray(data).reshape(-1)), gguf.quants.dequantize(data, kind)


@pytest.mark.parametrize("word", TYPES)
def test_rows_are_read_exactly(ops, word):
    rows, wanted = stored(word, 20, 512)
    found = np.empty((20, 512), np.float32)
    ops.threads.kernels.read_rows(library.STORED[word], rows.data.ctypes.data, 20, 512, found.ctypes.data)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("word", TYPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_quantized_weights_keep_their_precision(ops, word, tokens):
    """Activations are rounded to 16 bits: beside the weights' own error, which is in both, that is nothing."""
    rows, weights = stored(word, 50, 512)
    packed = Packer(ops.threads, "stored", 2**20).pack([rows])
    x_TI = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(1))
    x_TI[0, :32] = 0.0
    wanted = x_TI.double() @ torch.from_numpy(weights).double().T
    assert float((ops.linear(x_TI, packed) - wanted).norm() / wanted.norm()) < 1e-4


def test_parts_of_different_types_make_one_matrix(ops):
    parts = [stored("Q4_K", 24, 512), stored("Q6_K", 40, 512), stored("Q6_K", 8, 512)]
    packed = Packer(ops.threads, "stored", 2**20).pack([rows for rows, _ in parts])
    assert packed.shape == (72, 512)
    assert [(piece.first, piece.rows) for piece in packed.pieces] == [(0, 24), (24, 48)]
    x_TI, bias_O = torch.randn(5, 512), torch.randn(72)
    wanted = torch.cat([x_TI @ torch.from_numpy(weights).T for _, weights in parts], dim=1) + bias_O
    found = ops.linear(x_TI, packed, bias_O)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4", "stored"])
@pytest.mark.parametrize("word", ["Q4_1", "Q8_0"])
def test_the_bytes_are_those_foretold(ops, precision, word):
    rows, _ = stored(word, 576, 1536)
    packer = Packer(ops.threads, precision, 2**23)
    packer.pack([rows])
    assert packer.num_bytes == packed_bytes(word, 576, 1536, precision)


def test_an_arena_too_small_is_noticed(ops):
    rows, _ = stored("Q8_0", 64, 512)
    with pytest.raises(AssertionError, match="too small"):
        Packer(ops.threads, "float32", 1000).pack([rows])
