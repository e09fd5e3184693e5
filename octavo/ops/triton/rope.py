"""What happens to queries, keys and values between projection and attention, in one kernel: norms, rotation, cache.

A program takes a few heads of one token. The heads are numbered as the projection lays them out: N queries, K keys, K
values. Shapes as in `octavo.ops`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def rope_and_cache(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    cos_Tr: torch.Tensor,
    sin_Tr: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    slots_T: torch.Tensor,
    q_scale_T: torch.Tensor | None = None,
    q_norm_H: torch.Tensor | None = None,
    k_norm_H: torch.Tensor | None = None,
    eps: float = 0.0,
    *,
    pdl: bool = False,
    invariant: bool = False,
) -> torch.Tensor:
    """A slot below 0 is that of a padding token, whose key and value are not kept.

    `invariant`: programs are of one shape for any number of tokens, so that a norm's sum has one order.
    """
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    out_TNH = torch.empty((T, N, H), dtype=q_TNH.dtype, device=q_TNH.device)
    heads = 8 if T >= 256 and not invariant else 2
    half = cos_Tr.shape[1]
    _rope_and_cache[(T, triton.cdiv(N + 2 * K, heads))](
        q_TNH,
        k_TKH,
        v_TKH,
        cos_Tr,
        sin_Tr,
        k_cache_PBKH,
        v_cache_PBKH,
        slots_T,
        slots_T if q_scale_T is None else q_scale_T,
        slots_T if q_norm_H is None else q_norm_H,
        slots_T if k_norm_H is None else k_norm_H,
        out_TNH,
        eps,
        q_TNH.stride(0),
        q_TNH.stride(1),
        k_TKH.stride(0),
        k_TKH.stride(1),
        v_TKH.stride(0),
        v_TKH.stride(1),
        N=N,
        K=K,
        H=H,
        HALF=half,
        HEADS=heads,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, H - 2 * half)),
        SCALED=q_scale_T is not None,
        NORMED=q_norm_H is not None,
        PDL=pdl,
        num_warps=max(1, heads * triton.next_power_of_2(H) // 256),
        launch_pdl=pdl,
    )
    return out_TNH


@triton.jit
def _rope_and_cache(
    q,
    k,
    v,
    cos,
    sin,
    k_cache,
    v_cache,
    slots,
    q_scale,
    q_norm,
    k_norm,
    out,
    eps,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    SCALED: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    is_q, is_k, is_v = head < N, (head >= N) & (head < N + K), (head >= N + K) & (head < N + 2 * K)
    q_at = q + token * q_stride + head * q_head_stride
    k_at = k + token * k_stride + (head - N) * k_head_stride
    v_at = v + token * v_stride + (head - N - K) * v_head_stride

    # Element i turns with element i + HALF; what lies behind both halves only passes.
    at = tl.arange(0, BLOCK_HALF)[None, :]
    near = at < HALF
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    passing = rest < H
    first = tl.load(q_at + at, mask=is_q & near, other=0.0) + tl.load(k_at + at, mask=is_k & near, other=0.0)
    second = tl.load(q_at + HALF + at, mask=is_q & near, other=0.0)
    second += tl.load(k_at + HALF + at, mask=is_k & near, other=0.0)
    kept = first.dtype
    x, y = first.to(tl.float32), second.to(tl.float32)
    if H > 2 * HALF:
        third = tl.load(q_at + rest, mask=is_q & passing, other=0.0)
        third += tl.load(k_at + rest, mask=is_k & passing, other=0.0)
    if NORMED:
        squares = tl.sum(x * x, 1) + tl.sum(y * y, 1)
        if H > 2 * HALF:
            z = third.to(tl.float32)
            squares += tl.sum(z * z, 1)
        scale = tl.rsqrt(squares / H + eps)[:, None]
        x = (x * scale * _weights(q_norm, k_norm, is_q, is_k, at, near)).to(kept).to(tl.float32)
        y = (y * scale * _weights(q_norm, k_norm, is_q, is_k, HALF + at, near)).to(kept).to(tl.float32)
        if H > 2 * HALF:
            third = (z * scale * _weights(q_norm, k_norm, is_q, is_k, rest, passing)).to(kept)
    c = tl.load(cos + token * HALF + at, mask=near, other=1.0)
    s = tl.load(sin + token * HALF + at, mask=near, other=0.0)
    first, second = (x * c - y * s).to(kept), (y * c + x * s).to(kept)

    slot = tl.load(slots + token).to(tl.int64)
    is_k, is_v = is_k & (slot >= 0), is_v & (slot >= 0)
    out_at = out + (token * N + head) * H
    k_place = k_cache + (slot * K + head - N) * H
    v_place = v_cache + (slot * K + head - N - K) * H
    keep(k_place + at, first, is_k & near)
    keep(k_place + HALF + at, second, is_k & near)
    keep(v_place + at, tl.load(v_at + at, mask=is_v & near, other=0.0), is_v & near)
    keep(v_place + HALF + at, tl.load(v_at + HALF + at, mask=is_v & near, other=0.0), is_v & near)
    if H > 2 * HALF:
        keep(k_place + rest, third, is_k & passing)
        keep(v_place + rest, tl.load(v_at + rest, mask=is_v & passing, other=0.0), is_v & passing)
    if SCALED:
        factor = tl.load(q_scale + token)
        first, second = (first.to(tl.float32) * factor).to(kept), (second.to(tl.float32) * factor).to(kept)
        if H > 2 * HALF:
            third = (third.to(tl.float32) * factor).to(kept)
    tl.store(out_at + at, first, mask=is_q & near)
    tl.store(out_at + HALF + at, second, mask=is_q & near)
    if H > 2 * HALF:
        tl.store(out_at + rest, third, mask=is_q & passing)


@triton.jit
def keep(place, values, mask):
    """Stores `values` in the cache's type; for 8 bits they are cut to its largest number, which 448 is."""
    kind: tl.constexpr = place.dtype.element_ty
    if kind.primitive_bitwidth == 8:
        values = tl.minimum(tl.maximum(values.to(tl.float32), -448.0), 448.0)
    tl.store(place, values.to(kind), mask=mask)


@triton.jit
def _weights(q_norm, k_norm, is_q, is_k, at, mask):
    """Each head's norm at elements `at`, in fp32."""
    weights = tl.load(q_norm + at, mask=is_q & mask, other=0.0).to(tl.float32)
    return weights + tl.load(k_norm + at, mask=is_k & mask, other=0.0).to(tl.float32)
