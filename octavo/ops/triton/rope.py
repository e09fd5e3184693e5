"""What happens to queries, keys and values between projection and attention, in one kernel: norms, rotation, cache.

A program takes a few heads of one token. The heads are numbered as the projection lays them out: N queries, K keys, K
values. The decode kernel does the same by `turned`. Shapes as in `octavo.ops`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(slots=True)
class Heads:
    """A step's queries, keys and values as the projection leaves them, and all that is done to them."""

    q_TNH: torch.Tensor
    k_TKH: torch.Tensor
    v_TKH: torch.Tensor
    cos_Tr: torch.Tensor
    sin_Tr: torch.Tensor
    slots_T: torch.Tensor
    q_scale_T: torch.Tensor | None
    q_norm_H: torch.Tensor | None
    k_norm_H: torch.Tensor | None
    eps: float


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
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    heads = Heads(q_TNH, k_TKH, v_TKH, cos_Tr, sin_Tr, slots_T, q_scale_T, q_norm_H, k_norm_H, eps)
    write_rope_and_cache(heads, k_cache_PBKH, v_cache_PBKH, out_TNH, pdl=pdl, invariant=invariant)
    return out_TNH


def write_rope_and_cache(
    given: Heads,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    out_TNH: torch.Tensor,
    *,
    pdl: bool,
    invariant: bool = False,
) -> None:
    """As `rope_and_cache`, into `out_TNH`."""
    q, k, v = given.q_TNH, given.k_TKH, given.v_TKH
    T, N, H = q.shape
    K = k.shape[1]
    heads = 8 if T >= 256 and not invariant else 2
    half = given.cos_Tr.shape[1]
    _rope_and_cache[(T, triton.cdiv(N + 2 * K, heads))](
        q,
        k,
        v,
        given.cos_Tr,
        given.sin_Tr,
        k_cache_PBKH,
        v_cache_PBKH,
        given.slots_T,
        given.slots_T if given.q_scale_T is None else given.q_scale_T,
        given.slots_T if given.q_norm_H is None else given.q_norm_H,
        given.slots_T if given.k_norm_H is None else given.k_norm_H,
        out_TNH,
        given.eps,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        N=N,
        K=K,
        H=H,
        HALF=half,
        HEADS=heads,
        BLOCK_HALF=triton.next_power_of_2(half),
        BLOCK_REST=triton.next_power_of_2(max(1, H - 2 * half)),
        SCALED=given.q_scale_T is not None,
        NORMED=given.q_norm_H is not None,
        PDL=pdl,
        num_warps=max(1, heads * triton.next_power_of_2(H) // 256),
        launch_pdl=pdl,
    )


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


@triton.jit
def turned(place, norm, cos, sin, at, mask, eps, H: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr):
    """Heads at `place`, [..., H], normed and rotated, in fp32 but rounded as the kernel above rounds them.

    `at` numbers the elements of a head; `cos` and `sin` point to the token's angles.
    """
    # Every element meets its partner by loading it a second time; what passes unchanged meets itself by a sine of 0.
    turning = at < 2 * HALF
    other = tl.where(turning, tl.where(at < HALF, at + HALF, at - HALF), at)
    x, y = tl.load(place + at, mask=mask, other=0.0), tl.load(place + other, mask=mask, other=0.0)
    kept = x.dtype
    x, y = x.to(tl.float32), y.to(tl.float32)
    if NORMED:
        scale = tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
        x = (x * scale * tl.load(norm + at, mask=mask, other=0.0).to(tl.float32)).to(kept).to(tl.float32)
        y = (y * scale * tl.load(norm + other, mask=mask, other=0.0).to(tl.float32)).to(kept).to(tl.float32)
    angle = tl.where(at < HALF, at, at - HALF)
    c = tl.load(cos + angle, mask=turning, other=1.0)
    s = tl.load(sin + angle, mask=turning, other=0.0)
    return (x * c + tl.where(at < HALF, -y, y) * s).to(kept)
