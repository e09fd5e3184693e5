"""Holds the kernels in Gluon against the reference on a GPU; run as a process of its own, which may crash or hang.

    python -m octavo.ops.triton.hopper_check cuda:0

prints one JSON object: for each kernel "" if it is right, or else what is wrong.
"""

import json
import sys
from collections.abc import Callable

import numpy as np
import torch

from octavo.ops import reference
from octavo.ops.triton import hopper, streamed

_BLOCK = 16
# Lengths and queries of rows: ends within a copy of 16 tokens, within a tile of 128 keys, and at its end.
_ROWS = ((17, 17), (300, 300), (128, 64), (1025, 500), (640, 128))
_HEADS = ((16, 4, 128), (6, 2, 64))
# (rows, outputs, inputs), with outputs that fill no program.
_PRODUCTS = ((2, 1040, 1024), (8, 4096, 1024), (33, 1024, 2048), (64, 1040, 1024))
_BOUND = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def check(device: torch.device) -> dict[str, str]:
    """What is wrong with each kernel on `device`, "" for nothing. Raises what is no kernel's fault."""
    torch.zeros(1, device=device)
    return {"attention": _said(_check_attention, device), "streamed": _said(_check_streamed, device)}


def _said(check_one: Callable[[torch.device], None], device: torch.device) -> str:
    try:
        check_one(device)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        innermost: BaseException = error
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        lines = [line.strip() for line in str(innermost).splitlines() if line.strip()]
        return f"{type(innermost).__name__}: {lines[-1] if lines else ''}"[:300]
    return ""


def _compare(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = _BOUND[found.dtype]
    if not torch.allclose(found.double(), expected.double(), atol=bound, rtol=bound):
        worst = (found.double() - expected.double()).abs().max().item()
        raise ValueError(f"results differ by {worst:.1e} from those of the reference")


def _check_attention(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    lens, queries = (np.array(column, np.int32) for column in zip(*_ROWS, strict=True))
    starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
    positions = np.concatenate([np.arange(n - m, n) for n, m in _ROWS]).astype(np.int32)
    counts = -(-lens // _BLOCK)
    tables = torch.zeros(len(lens), int(counts.max()), dtype=torch.int32)
    order = torch.randperm(int(counts.sum()), generator=torch.Generator().manual_seed(0)).int()
    for row, count in enumerate(counts):
        tables[row, :count], order = order[:count], order[count:]
    starts_R1, lens_R = torch.from_numpy(starts).to(device), torch.from_numpy(lens).to(device)
    positions_T, tables_RM = torch.from_numpy(positions).to(device), tables.to(device)
    turn = torch.zeros(1, dtype=torch.int32, device=device)
    for N, K, H in _HEADS:
        for dtype in _BOUND:
            shape = (2, int(counts.sum()), _BLOCK, K, H)
            caches = torch.randn(shape, generator=generator, device=device).to(dtype)
            q = torch.randn((int(starts[-1]), N, H), generator=generator, device=device).to(dtype)
            exact_q, exact_k, exact_v = q.double(), caches[0].double(), caches[1].double()
            expected = reference.paged_attention(
                *(exact_q, exact_k, exact_v, starts_R1, lens_R, tables_RM, positions_T, starts, lens, H**-0.5)
            )
            for _ in range(2):  # the second finds its counter as the first has left it
                out = torch.full_like(q, float("nan"))
                hopper.attention(*(q, caches[0], caches[1], starts_R1, lens_R, tables_RM, out, len(q), H**-0.5, turn))
                _compare(out, expected)


def _check_streamed(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    for rows, outputs, inputs in _PRODUCTS:
        for dtype in _BOUND:
            x = torch.randn((rows, inputs), generator=generator, device=device).to(dtype)
            weight = (torch.randn((outputs, inputs), generator=generator, device=device) * inputs**-0.5).to(dtype)
            bias = torch.randn(outputs, generator=generator, device=device).to(dtype)
            product = x.double() @ weight.double().T
            for pdl in (False, True):
                _compare(streamed.product(x, weight, bias, pdl=pdl), product + bias)
                _compare(streamed.in_parts(x, weight, pdl=pdl).sum(0).to(dtype), product)
                gated = streamed.silu_product(x, weight, bias, pdl=pdl)
                _compare(gated, reference.silu_mul(product + bias))


if __name__ == "__main__":
    print(json.dumps(check(torch.device(sys.argv[1]))))
