"""Products of few rows on Hopper (sm_90), whose weights arrive ahead of the rows: for decoding small batches.

A program takes 64 outputs, or 32 of a gate and the 32 of up that belong to them. One warp copies its weights, a second
the rows, once the kernel in front has written them; a warpgroup multiplies. Weights wait for nobody: a program that is
there before its rows fills its memory, so that between two products, and while attention reads its keys, the bytes of
the next weights keep coming. Two programs fit a multiprocessor, so this reaches over a kernel or two.

    weights of a stage   [ 32 outputs, 64 inputs | 32 others, 64 | 32, 64 next | 32 others, 64 next ]
    rows of a stage      [ all rows, 64 inputs | all rows, 64 next ]

Shapes: T tokens, I input width, O output width, F outputs of a gate, P parts.
"""

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from octavo.ops.triton.gluon import (
    TensorDescriptor,
    async_load,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from octavo.ops.triton.tiles import capability

# One row is faster by `matvec`, which takes in what stands in front.
LEAST_ROWS, MOST_ROWS = 2, 64
_LEAST_WEIGHTS = 2**20
_OUTPUTS = 64
_BOX = 64  # inputs
# Bytes of a program's stages: two programs share 227 KiB.
_STAGED = 108 * 1024
_MOST_PARTS = 4
# As many as one of two places on each multiprocessor holds: the other is for the kernel behind.
_PROGRAMS = 132


def suits(x_TI: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether this is the faster way, as measured in docs/decisions/0083."""
    return (
        LEAST_ROWS <= len(x_TI) <= MOST_ROWS
        and weight_OI.numel() >= _LEAST_WEIGHTS
        and weight_OI.dtype in (torch.bfloat16, torch.float16)
        and x_TI.dtype == weight_OI.dtype
        and weight_OI.shape[1] % (2 * _BOX) == 0
        and x_TI.is_contiguous()
        and weight_OI.is_contiguous()
        and (x_TI.data_ptr() | weight_OI.data_ptr()) % 16 == 0
        and capability(x_TI.device)[0] == 9
    )


def product(x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`x W^T + b`."""
    out_TO = torch.empty((len(x_TI), len(weight_OI)), dtype=x_TI.dtype, device=x_TI.device)
    write_product(x_TI, weight_OI, bias_O, out_TO, pdl=pdl)
    return out_TO


def write_product(
    x_TI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, out_TO: torch.Tensor, *, pdl: bool
) -> None:
    """As `product`, into `out_TO`."""
    _launch(x_TI, weight_OI, bias_O, out_TO, 1, gated=False, pdl=pdl)


def in_parts(x_TI: torch.Tensor, weight_OI: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """[P, T, O] in fp32, whose sum is `x W^T`: there is one program for each 64 outputs of a part."""
    outputs, inputs = weight_OI.shape
    parts = 1
    while (
        parts < _MOST_PARTS
        and 2 * parts * triton.cdiv(outputs, _OUTPUTS) <= _PROGRAMS
        and inputs % (4 * parts * _BOX) == 0
    ):
        parts *= 2
    parts_PTO = torch.empty((parts, len(x_TI), outputs), dtype=torch.float32, device=x_TI.device)
    _launch(x_TI, weight_OI, None, parts_PTO, parts, gated=False, pdl=pdl)
    return parts_PTO


def silu_product(x_TI: torch.Tensor, weight_2FI: torch.Tensor, bias: torch.Tensor | None, *, pdl: bool) -> torch.Tensor:
    """`silu(gate) * up`, [T, F], of gate and up = `x W^T + b`."""
    out_TF = torch.empty((len(x_TI), len(weight_2FI) // 2), dtype=x_TI.dtype, device=x_TI.device)
    _launch(x_TI, weight_2FI, bias, out_TF, 1, gated=True, pdl=pdl)
    return out_TF


def _launch(
    x_TI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    parts: int,
    *,
    gated: bool,
    pdl: bool,
) -> None:
    T, inputs = x_TI.shape
    outputs = out.shape[-1]
    rows = max(8, triton.next_power_of_2(T))
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _multiply_streamed[(triton.cdiv(outputs, _OUTPUTS // 2 if gated else _OUTPUTS), parts)](
        TensorDescriptor(weight_OI, list(weight_OI.shape), list(weight_OI.stride()), [_OUTPUTS // 2, _BOX], swizzled),
        TensorDescriptor(x_TI, [T, inputs], list(x_TI.stride()), [rows, _BOX], swizzled),
        weight_OI if bias is None else bias,
        out,
        T,
        outputs,
        inputs // parts,
        ROWS=rows,
        OUTPUTS=_OUTPUTS,
        BOX=_BOX,
        STAGES=_STAGED // (4 * _BOX * (_OUTPUTS + rows)),
        GATED=gated,
        BIASED=bias is not None,
        num_warps=4,
        launch_pdl=pdl,
    )


@gluon.jit(do_not_specialize=["tokens", "outputs", "inputs"])
def _multiply_streamed(
    weights_of_all,
    rows_of_all,
    bias,
    out,
    tokens,
    outputs,
    inputs,
    ROWS: gl.constexpr,
    OUTPUTS: gl.constexpr,
    BOX: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    BIASED: gl.constexpr,
):
    gdc_launch_dependents()
    dtype: gl.constexpr = weights_of_all.dtype
    weights = gl.allocate_shared_memory(dtype, [4 * STAGES, OUTPUTS // 2, BOX], weights_of_all.layout)
    rows = gl.allocate_shared_memory(dtype, [2 * STAGES, ROWS, BOX], rows_of_all.layout)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    weights_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    rows_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(weights_full.index(i), count=1)
        mbarrier.init(rows_full.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    sizes: gl.constexpr = (ROWS, OUTPUTS, BOX, STAGES, GATED, BIASED)
    buffers = (weights, rows, weights_full, rows_full, free)
    gl.warp_specialize(
        [
            (_multiply, (bias, out, tokens, outputs, inputs, buffers, sizes)),
            (_copy_weights, (weights_of_all, outputs, inputs, buffers, sizes)),
            (_copy_rows, (rows_of_all, inputs, buffers, sizes)),
        ],
        [1, 1],
        [32, 32],
    )


@gluon.jit
def _copy_weights(weights_of_all, outputs, inputs, buffers, sizes: gl.constexpr):
    weights, _rows, full, _rows_full, free = buffers
    OUTPUTS: gl.constexpr = sizes[1]
    BOX: gl.constexpr = sizes[2]
    STAGES: gl.constexpr = sizes[3]
    GATED: gl.constexpr = sizes[4]
    output = gl.program_id(0) * (OUTPUTS // 2 if GATED else OUTPUTS)
    other = output + (outputs if GATED else OUTPUTS // 2)
    start = gl.program_id(1) * inputs
    for done in range(inputs // (2 * BOX)):
        stage = done % STAGES
        mbarrier.wait(free.index(stage), (done // STAGES) & 1 ^ 1)
        mbarrier.expect(full.index(stage), 2 * OUTPUTS * BOX * 2)
        for box in gl.static_range(2):
            at = start + (2 * done + box) * BOX
            to = 4 * stage + 2 * box
            async_load(weights_of_all, [output, at], full.index(stage), weights.index(to))
            async_load(weights_of_all, [other, at], full.index(stage), weights.index(to + 1))


@gluon.jit
def _copy_rows(rows_of_all, inputs, buffers, sizes: gl.constexpr):
    _weights, rows, _weights_full, full, free = buffers
    ROWS: gl.constexpr = sizes[0]
    BOX: gl.constexpr = sizes[2]
    STAGES: gl.constexpr = sizes[3]
    start = gl.program_id(1) * inputs
    gdc_wait()
    for done in range(inputs // (2 * BOX)):
        stage = done % STAGES
        mbarrier.wait(free.index(stage), (done // STAGES) & 1 ^ 1)
        mbarrier.expect(full.index(stage), 2 * ROWS * BOX * 2)
        for box in gl.static_range(2):
            at = start + (2 * done + box) * BOX
            async_load(rows_of_all, [0, at], full.index(stage), rows.index(2 * stage + box))


@gluon.jit
def _multiply(bias, out, tokens, outputs, inputs, buffers, sizes: gl.constexpr):
    weights_of_boxes, rows, weights_full, rows_full, free = buffers
    ROWS: gl.constexpr = sizes[0]
    OUTPUTS: gl.constexpr = sizes[1]
    BOX: gl.constexpr = sizes[2]
    STAGES: gl.constexpr = sizes[3]
    GATED: gl.constexpr = sizes[4]
    BIASED: gl.constexpr = sizes[5]
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    of_memory: gl.constexpr = weights_of_boxes.layout
    weights = reinterpret(weights_of_boxes, [2 * STAGES, OUTPUTS, BOX], of_memory)
    # Of every other box of inputs, so that two products are under way.
    sums = gl.zeros([OUTPUTS, ROWS], gl.float32, of_sums)
    others = gl.zeros([OUTPUTS, ROWS], gl.float32, of_sums)
    for done in range(inputs // (2 * BOX)):
        stage = done % STAGES
        phase = (done // STAGES) & 1
        mbarrier.wait(weights_full.index(stage), phase)
        mbarrier.wait(rows_full.index(stage), phase)
        sums = warpgroup_mma(weights.index(2 * stage), rows.index(2 * stage).permute((1, 0)), sums, is_async=True)
        others = warpgroup_mma(
            weights.index(2 * stage + 1), rows.index(2 * stage + 1).permute((1, 0)), others, is_async=True
        )
        sums, others = warpgroup_mma_wait(0, deps=[sums, others])
        mbarrier.arrive(free.index(stage), count=1)
    sums += others
    if GATED:
        HALF: gl.constexpr = OUTPUTS // 2
        pairs: gl.constexpr = gl.BlockedLayout([1, 1, 2], [32, 1, 1], [1, 4, 1], [2, 0, 1])
        both = gl.convert_layout(sums.reshape([2, HALF, ROWS]).permute([1, 2, 0]), pairs)
        gate, up = gl.split(both)
        of_result: gl.constexpr = gl.SliceLayout(2, pairs)
        output = gl.program_id(0) * HALF + gl.arange(0, HALF, gl.SliceLayout(1, of_result))
        row = gl.arange(0, ROWS, gl.SliceLayout(0, of_result))
        if BIASED:
            gate += gl.expand_dims(gl.load(bias + output, mask=output < outputs, other=0.0).to(gl.float32), 1)
            up += gl.expand_dims(gl.load(bias + outputs + output, mask=output < outputs, other=0.0).to(gl.float32), 1)
        result = gate / (1.0 + gl.exp(-gate)) * up
    else:
        output = gl.program_id(0) * OUTPUTS + gl.arange(0, OUTPUTS, gl.SliceLayout(1, of_sums))
        row = gl.arange(0, ROWS, gl.SliceLayout(0, of_sums))
        if BIASED:
            sums += gl.expand_dims(gl.load(bias + output, mask=output < outputs, other=0.0).to(gl.float32), 1)
        result = sums
    to = out + (gl.program_id(1) * tokens + gl.expand_dims(row, 0)) * outputs + gl.expand_dims(output, 1)
    inside = (gl.expand_dims(row, 0) < tokens) & (gl.expand_dims(output, 1) < outputs)
    gl.store(to, result.to(out.dtype.element_ty), mask=inside)
