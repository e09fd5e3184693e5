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
) -> torch.Tensor:
    """A slot below 0 is that of a padding token, whose key and value are not kept."""
    T, N, H = q_TNH.shape
    K = k_TKH.shape[1]
    out_TNH = torch.empty((T, N, H), dtype=q_TNH.dtype, device=q_TNH.device)
    heads = 8 if T >= 256 else 2
    block = triton.next_power_of_2(H)
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
        HALF=cos_Tr.shape[1],
        HEADS=heads,
        BLOCK_H=block,
        SCALED=q_scale_T is not None,
        NORMED=q_norm_H is not None,
        PDL=pdl,
        num_warps=max(1, heads * block // 256),
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
    BLOCK_H: tl.constexpr,
    SCALED: tl.constexpr,
    NORMED: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, BLOCK_H)[None, :]
    is_q, is_k, is_v = head < N, (head >= N) & (head < N + K), (head >= N + K) & (head < N + 2 * K)
    q_at = q + token * q_stride + head * q_head_stride
    k_at = k + token * k_stride + (head - N) * k_head_stride
    v_at = v + token * v_stride + (head - N - K) * v_head_stride

    # Element i turns with element i + HALF, so each program reads its heads twice, the second time from cache.
    partner = tl.where(at < HALF, at + HALF, at - HALF)
    turns = at < 2 * HALF
    x = tl.load(q_at + at, mask=is_q & (at < H), other=0.0) + tl.load(k_at + at, mask=is_k & (at < H), other=0.0)
    y = tl.load(q_at + partner, mask=is_q & turns, other=0.0) + tl.load(k_at + partner, mask=is_k & turns, other=0.0)
    kept = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        x_weight = tl.load(q_norm + at, mask=is_q & (at < H), other=0.0).to(tl.float32)
        x_weight += tl.load(k_norm + at, mask=is_k & (at < H), other=0.0).to(tl.float32)
        y_weight = tl.load(q_norm + partner, mask=is_q & turns, other=0.0).to(tl.float32)
        y_weight += tl.load(k_norm + partner, mask=is_k & turns, other=0.0).to(tl.float32)
        x = (x * scale * x_weight).to(kept).to(tl.float32)
        y = (y * scale * y_weight).to(kept).to(tl.float32)
    angle = tl.where(at < HALF, at, at - HALF)
    c = tl.load(cos + token * HALF + angle, mask=turns, other=1.0)
    s = tl.load(sin + token * HALF + angle, mask=turns, other=0.0)
    turned = (x * c + tl.where(at < HALF, -y, y) * s).to(kept)

    queries = turned
    if SCALED:
        queries = (turned.to(tl.float32) * tl.load(q_scale + token)).to(kept)
    tl.store(out + (token * N + head) * H + at, queries, mask=is_q & (at < H))
    slot = tl.load(slots + token).to(tl.int64)
    stored = (at < H) & (slot >= 0)
    tl.store(k_cache + (slot * K + head - N) * H + at, turned, mask=is_k & stored)
    values = tl.load(v_at + at, mask=is_v & (at < H), other=0.0)
    tl.store(v_cache + (slot * K + head - N - K) * H + at, values, mask=is_v & stored)
