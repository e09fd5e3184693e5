"""Families as GGUF files hold them, written by the `gguf` package, against `transformers` on the original weights."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from octavo.checkpoint import open_checkpoint
from octavo.models import read_config
from octavo.parity import load_reference
from tests.steps import Row, all_logits
from tests.tiny_models import runner_for, save_model
from tests.tolerances import assert_logits_equal

TOKENS = [5, 9, 100, 7, 30, 31, 32, 8, 150, 77, 3]


def convert(folder: Path, arch: str, config: transformers.PreTrainedConfig) -> Path:
    """As llama.cpp's converter writes it: Llama's rows of q and k reordered, everything else as it is."""
    writer = gguf.GGUFWriter(folder / "model.gguf", arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "qwen3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            tensor = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "arch"), [("Llama", "llama"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")])
def test_logits_equal(tmp_path: Path, family: str, arch: str, tied: bool) -> None:
    changes = {"head_dim": 24} if family == "Qwen3" else {}
    save_model(tmp_path, family, tie_word_embeddings=tied, rope_parameters={"rope_theta": 50000.0}, **changes)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    checkpoint = open_checkpoint(str(convert(tmp_path, arch, reference.config)))
    assert read_config(checkpoint.config).tie_word_embeddings is tied
    with torch.inference_mode():
        expected = reference(torch.tensor([TOKENS])).logits[0]
        rebuilt = load_reference(checkpoint, "cpu")(torch.tensor([TOKENS])).logits[0]
    runner = runner_for(checkpoint)
    assert_logits_equal(all_logits(runner, Row(TOKENS)), expected, runner.model.config)
    assert torch.equal(rebuilt, expected)
