"""How fast the prefill kernels are alone, in CUDA graphs: TFLOP/s of what a causal mask leaves.

Blocks lie in a shuffled order. Each line also has the largest difference from a computation in float32.

    python benchmarks/prefill_attention.py
"""

import argparse
import itertools
import json

import torch
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo.ops.triton import hopper, prefill

# (rows, queries of each, keys of each, query heads, kv heads, head width)
SHAPES = [
    (2, 4096, 4096, 16, 8, 128),
    (2, 4096, 4096, 32, 8, 128),
    (8, 1024, 1024, 16, 8, 128),
    (8, 1024, 1024, 32, 8, 128),
    (1, 16384, 16384, 32, 8, 128),
    (4, 2048, 8192, 32, 8, 128),
    (32, 256, 256, 16, 8, 128),
    (1, 512, 512, 16, 8, 128),
    (8, 1024, 1024, 32, 32, 128),
    (2, 4096, 4096, 9, 3, 64),
    (2, 4096, 4096, 32, 8, 64),
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
    R, queries, keys, N, K, H = shape
    blocks = -(-keys // 16)
    q = torch.randn(R * queries, N, H, device="cuda", dtype=dtype)
    caches = torch.randn(2, R * blocks, 16, K, H, device="cuda", dtype=dtype)
    tables = torch.randperm(R * blocks, device="cuda").int().view(R, blocks)
    starts = torch.arange(R + 1, device="cuda", dtype=torch.int32) * queries
    lens = torch.full((R,), keys, device="cuda", dtype=torch.int32)
    return q, caches[0], caches[1], starts, lens, tables


def expected(args: tuple, row: int, head: int, last: int) -> torch.Tensor:
    """The results of the last queries of one head of a row."""
    q, keys, values, starts, lens, tables = args
    group = q.shape[1] // keys.shape[2]
    k, v = (cache[tables[row].long(), :, head // group].flatten(0, 1).float() for cache in (keys, values))
    own = q[starts[row + 1] - last : starts[row + 1], head].float()
    n = int(lens[row])
    seen = torch.arange(n, device="cuda") <= torch.arange(n - last, n, device="cuda")[:, None]
    scores = (own @ k.T * q.shape[2] ** -0.5).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ v


def kernels(args: tuple, out: torch.Tensor) -> dict:
    scale = args[0].shape[2] ** -0.5
    turn = torch.zeros(1, device="cuda", dtype=torch.int32)
    found = {
        "triton": lambda: prefill.triton_attention(*args, out, len(out), scale, 0, 0.0),
        "hopper": lambda: hopper.attention(*args, out, len(out), scale, turn),
    }
    R = len(args[4])
    if len(out) == args[1].shape[0] * 16:  # whole prompts: what cuDNN does with contiguous keys
        flat = (args[0], args[1].flatten(0, 1), args[2].flatten(0, 1))
        q, k, v = (x.view(R, -1, *x.shape[-2:]).transpose(1, 2).contiguous() for x in flat)

        def cudnn() -> None:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        found["cudnn"] = cudnn
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shapes", type=int, default=len(SHAPES))
    chosen = parser.parse_args()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__, chosen.dtype)
    results = []
    for shape in SHAPES[: chosen.shapes]:
        R, queries, keys, N, _, H = shape
        args = inputs(shape, getattr(torch, chosen.dtype))
        out = torch.empty_like(args[0])
        flop = 4 * R * N * H * (queries * (keys - queries) + queries * (queries + 1) / 2)
        line = {}
        for name, run in kernels(args, out).items():
            try:
                out.fill_(float("nan"))
                run()
                if name != "cudnn":
                    errors = []
                    for row, head in itertools.product({0, R - 1}, {0, N - 1}):
                        last = out[args[3][row + 1] - 200 : args[3][row + 1], head].float()
                        errors.append((last - expected(args, row, head, 200)).abs().max().item())
                    line[f"{name} error"] = round(max(errors), 5)
                us = triton.testing.do_bench_cudagraph(run, rep=30, return_mode="median") * 1000
                line[name] = {"us": round(us, 1), "tflops": round(flop / us / 1e6)}
            except Exception as error:  # a kernel that this device lacks
                line[name] = repr(error)[:200]
        print(f"{R}x{queries} over {keys}, {N}/{shape[4]} heads of {H}:", json.dumps(line), flush=True)
        results.append({"shape": shape, **line})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
