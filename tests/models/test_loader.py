"""Loading: dtypes, sharing, random weights, and what is said about checkpoints that do not fit."""

from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from octavo.checkpoint import TensorInfo
from octavo.errors import CheckpointError
from octavo.layers.linear import DenseLinear
from octavo.models import read_config
from octavo.models.loader import load_model
from octavo.models.sizes import weight_bytes
from octavo.ops.weight import Fp8Weight
from tests.tiny_models import CPU, FolderCheckpoint, save_llama, save_model

Q = "model.layers.1.self_attn.q_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def checkpoint(folder: Path) -> FolderCheckpoint:
    return FolderCheckpoint(folder)


def weight(layer: object) -> torch.Tensor:
    assert isinstance(layer, DenseLinear)
    return layer.weight_OI


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_from_every_dtype(checkpoint: FolderCheckpoint, stored: torch.dtype, dtype: torch.dtype) -> None:
    original = torch.from_numpy(checkpoint.read(DOWN).copy()).view(torch.float32).to(stored)
    checkpoint.put(DOWN, original.view(64, 112))
    model = load_model(checkpoint, read_config(checkpoint.config), dtype, CPU)
    assert weight(model.layers[0].mlp.down).dtype == dtype
    assert torch.equal(weight(model.layers[0].mlp.down).flatten(), original.to(dtype))


def test_a_fitting_tensor_stays_in_the_file(checkpoint: FolderCheckpoint) -> None:
    model = load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)
    assert weight(model.layers[0].mlp.down).data_ptr() == checkpoint.read(DOWN).ctypes.data


def test_a_misaligned_tensor_is_copied(checkpoint: FolderCheckpoint) -> None:
    data = checkpoint.read(DOWN)
    shifted = torch.empty(len(data) + 1, dtype=torch.uint8).numpy()[1:]
    shifted[:] = data
    checkpoint.data[DOWN] = shifted
    model = load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)
    assert weight(model.layers[0].mlp.down).data_ptr() % 4 == 0
    assert weight(model.layers[0].mlp.down).view(-1).view(torch.uint8).tolist() == data.tolist()


def test_quantized_tensors_are_dequantized(checkpoint: FolderCheckpoint) -> None:
    original = torch.from_numpy(checkpoint.read(Q).copy()).view(torch.float32).view(64, 64)
    data = gguf.quants.quantize(original.numpy(), gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    checkpoint.data[Q] = data
    checkpoint.tensors[Q] = TensorInfo(Q, "Q8_0", (64, 64), len(data))
    model = load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)
    loaded = weight(model.layers[1].attention.qkv)[:64]
    assert 0 < (loaded - original).abs().max() < 0.01


def test_tied_embeddings_share_one_tensor(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(save_llama(tmp_path, tie_word_embeddings=True))
    checkpoint.put("lm_head.weight", torch.zeros(160, 64))  # some exports store the tied copy as well
    model = load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)
    assert weight(model.lm_head) is model.embedding.weight_VD


def test_missing_tensor(checkpoint: FolderCheckpoint) -> None:
    checkpoint.drop(Q)
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\.self_attn\.q_proj\.weight is missing"):
        load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)


def test_wrong_shape(checkpoint: FolderCheckpoint) -> None:
    config = replace(read_config(checkpoint.config), intermediate_size=120)
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \[112, 64\].* makes it \[120, 64\]"):
        load_model(checkpoint, config, torch.float32, CPU)


def test_left_over_tensors(checkpoint: FolderCheckpoint) -> None:
    checkpoint.put("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(8))
    load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)
    with pytest.raises(CheckpointError, match=r"no place for 9 tensors: model\.layers\.1\.input_layernorm.* 6 more"):
        load_model(checkpoint, replace(read_config(checkpoint.config), num_layers=1), torch.float32, CPU)


def test_unknown_format(checkpoint: FolderCheckpoint) -> None:
    checkpoint.tensors[Q] = replace(checkpoint.tensors[Q], dtype="IQ2_XXS")
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.*IQ2_XXS cannot be read"):
        load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)


def test_truncated_tensor(checkpoint: FolderCheckpoint) -> None:
    checkpoint.data[Q] = checkpoint.data[Q][:-4]
    with pytest.raises(CheckpointError, match=r"q_proj\.weight.* cannot have 16380 bytes"):
        load_model(checkpoint, read_config(checkpoint.config), torch.float32, CPU)


def test_random_weights_follow_from_the_seed(checkpoint: FolderCheckpoint) -> None:
    config = read_config(checkpoint.config)
    checkpoint.tensors.clear()
    made = [load_model(checkpoint, config, torch.bfloat16, CPU, "dummy", seed) for seed in (1, 1, 2)]
    first, same, other = (weight(model.layers[1].mlp.down) for model in made)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert 0 < float(first.abs().max()) < 0.05
    assert float(made[0].norm.weight.float().mean()) > 0.9


def test_matrices_in_fp8_and_all_else_as_it_was(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(save_model(tmp_path, "Qwen2", tie_word_embeddings=False))
    config = read_config(checkpoint.config)
    plain, rounded = (load_model(checkpoint, config, torch.float32, CPU, fp8=fp8) for fp8 in (False, True))
    qkv, exact = rounded.layers[0].attention.qkv, plain.layers[0].attention.qkv
    assert isinstance(qkv.weight_OI, Fp8Weight)
    found = qkv.weight_OI.values_OI.float() * qkv.weight_OI.scale_O[:, None]
    torch.testing.assert_close(found, exact.weight_OI, rtol=1 / 16, atol=2**-9 * float(qkv.weight_OI.scale_O.max()))
    assert torch.equal(qkv.bias_O, exact.bias_O)
    assert torch.equal(rounded.lm_head.weight_OI, plain.lm_head.weight_OI)
    parts = [weight for layer in rounded.layers for weight in (layer.attention.qkv, layer.attention.o)]
    parts += [weight for layer in rounded.layers for weight in (layer.mlp.gate_up, layer.mlp.down)]
    taken = sum(part.weight_OI.values_OI.nbytes + part.weight_OI.scale_O.nbytes for part in parts)
    matrices = sum(part.weight_OI.values_OI.numel() for part in parts)
    others = weight_bytes(checkpoint.tensors, config, "float32") - 4 * matrices
    assert weight_bytes(checkpoint.tensors, config, "float32", "fp8") == taken + others
    assert weight_bytes({}, config, "float32", "fp8") == taken + others
