"""Every Triton kernel once on small shapes, for NVIDIA's compute-sanitizer; what it finds it prints.

Those in Gluon, which read by bulk copies that know the tensors' bounds, are not among them.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python -m tests.gpu.sanitize

Without torch's caching each tensor is an allocation of its own, so that a byte read behind its end is seen. `racecheck`
and `initcheck` take the same. Results are compared as in `test_kernels.py`.
"""

import torch

from octavo.ops.triton import TritonOps
from tests.ops import kernel_cases as cases
from tests.ops import sampling_cases

CUDA = torch.device("cuda")
ROWS = [(5, 1), (70, 1), (300, 1), (40, 40), (75, 12), (3, 1)]


def main() -> None:
    torch.manual_seed(0)
    ops, invariant = TritonOps(CUDA), TritonOps(CUDA, 64)
    heads, e4m3 = (6, 2, 16), torch.float8_e4m3fn
    for dtype in (torch.float16, torch.bfloat16):
        cases.check_norms(ops, CUDA, dtype, 3, 24)
        cases.check_rope(ops, CUDA, dtype, heads, 8, norm=True)
        cases.check_attention(ops, CUDA, dtype, heads, ROWS)
        cases.check_attention(invariant, CUDA, dtype, heads, ROWS)
        cases.check_turned(ops, CUDA, dtype, heads, [1, 16, 300], 16, norm=True)
        cases.check_shared(ops, CUDA, dtype, (4, 2, 16), [(5, 32), (2, 0), (70, 16)])
        for rows, width, outputs in ((1, 640, 40), (3, 1024, 40), (20, 72, 40)):
            for in_fp8 in (False, True):
                cases.check_fused(ops, CUDA, dtype, rows, width, outputs, in_fp8=in_fp8)
                cases.check_linear(invariant, CUDA, dtype, rows, width, outputs, in_fp8=in_fp8)
    cases.check_linear(ops, CUDA, torch.bfloat16, 70, 64, 48, in_fp8=True)
    cases.check_fp8_cache(CUDA, torch.bfloat16, heads, bound=0.0)
    cases.check_attention(ops, CUDA, torch.bfloat16, heads, ROWS, 9, 3.0, kv=e4m3)
    sampling_cases.check_mixed(torch.bfloat16, 9000, CUDA)
    sampling_cases.check_penalties(CUDA)
    cases.check_steps(CUDA)
    cases.check_clear(CUDA)
    torch.cuda.synchronize()
    print("every kernel ran")


if __name__ == "__main__":
    main()
