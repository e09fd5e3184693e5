"""What either kind of preemption costs on this machine: blocks between cache and host memory, and prefill.

`python benchmarks/swap.py [--device cuda]`. The constants of `octavo/engine/swap.py` come from here; decision 0071.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from octavo.config import EngineOptions
from octavo.engine.engine import Engine
from octavo.request import Request
from octavo.sampling_params import SamplingParams

# A small Llama for a CPU and a large one for a GPU: hidden, intermediate, layers, heads, kv heads, vocabulary.
SHAPES = {"cpu": (576, 1536, 30, 9, 3, 49152), "cuda": (4096, 14336, 32, 32, 8, 128256)}


def build(folder: Path, device: str) -> Engine:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = dict(zip((*names, "vocab_size"), SHAPES[device], strict=True))
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096}
    config |= {"rms_norm_eps": 1e-5, "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return Engine.build(
        EngineOptions(
            model=str(folder),
            load_format="dummy",
            device=device,  # type: ignore[arg-type]
            kv_cache_memory=2 * 1024**3,
            swap_space=1024**3,
            enable_prefix_caching=False,
        )
    )


def prefill(engine: Engine, length: int) -> float:
    """Floating-point operations a second, counted as two for each weight and token."""
    engine.add(Request("a", [5] * length, SamplingParams(max_tokens=1, temperature=0.0)))
    began = time.perf_counter()
    while engine.has_work():
        engine.step()
    return 2 * engine.config.model.num_parameters() * length / (time.perf_counter() - began)


def swap(engine: Engine, count: int) -> tuple[float, float]:
    """Bytes a second out and in."""
    cache = engine.executor.runner.kv_cache  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.permutation(engine.config.num_blocks)[:count], rng.permutation(count)], 1).astype(np.int32)
    size = engine.config.model.kv_bytes_per_token(engine.config.kv_dtype) * engine.config.block_size * count
    rates = []
    for move in (cache.swap_out, cache.swap_in):
        best = 0.0
        for _ in range(5):
            _wait()
            began = time.perf_counter()
            with torch.inference_mode():
                move(pairs)
            _wait()
            best = max(best, size / (time.perf_counter() - began))
        rates.append(best)
    return rates[0], rates[1]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(SHAPES), default="cpu")
    device = parser.parse_args().device
    with tempfile.TemporaryDirectory() as folder:
        engine = build(Path(folder), device)
    prefill(engine, 256)
    flops = max(prefill(engine, 1024) for _ in range(3))
    out, back = swap(engine, min(256, engine.config.num_host_blocks))
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    found = {"device": device, "name": name, "prefill_tflops": round(flops / 1e12, 4)}
    print(json.dumps(found | {"out_gb_s": round(out / 1e9, 2), "in_gb_s": round(back / 1e9, 2)}))


if __name__ == "__main__":
    main()
