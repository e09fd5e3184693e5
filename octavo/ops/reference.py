"""The ops in plain torch, on any device: the oracle for the fast kernels, and what runs where there are none.

Written to be read and to be right: attention gathers keys out of their blocks and computes in fp32. Shapes
and meanings stand in `octavo.ops.Ops`.
"""

import torch
import torch.nn.functional as F

from octavo.batch import Ints
from octavo.config import SCALE_BYTES
from octavo.ops.weight import Fp8Weight, Table, Weight

# Most fp32 elements of one intermediate alive at once: 64 MiB. Longer work is cut into tiles.
_TILE = 2**24


def embedding(token_ids_T: torch.Tensor, weight_VD: Table) -> torch.Tensor:
    assert isinstance(weight_VD, torch.Tensor), "stored rows belong to the CPU's kernels"
    return F.embedding(token_ids_T, weight_VD)


def linear(x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    if isinstance(weight_OI, Fp8Weight):
        weight_OI = (weight_OI.values_OI.to(x_TI.dtype) * weight_OI.scale_O[:, None]).to(x_TI.dtype)
    assert isinstance(weight_OI, torch.Tensor), "packed weights belong to the CPU's kernels"
    return F.linear(x_TI, weight_OI, bias_O)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def silu_mul(gate_up_T2F: torch.Tensor) -> torch.Tensor:
    gate_TF, up_TF = gate_up_T2F.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


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
) -> torch.Tensor:
    if q_norm_H is not None and k_norm_H is not None:
        q_TNH, k_TKH = rms_norm(q_TNH, q_norm_H, eps), rms_norm(k_TKH, k_norm_H, eps)
    index_T = slots_T.long()
    k_TKH = _rotate(k_TKH, cos_Tr, sin_Tr)
    for cache, new_TKH in ((k_cache_PBKH, k_TKH), (v_cache_PBKH, v_TKH)):
        if cache.dtype == torch.float8_e4m3fn:  # what is too large for it would become NaN; bytes are what torch moves
            new_TKH = new_TKH.clamp(-448, 448).to(cache.dtype).view(torch.uint8)
            cache = cache.view(torch.uint8)
        elif cache.dtype == torch.int8:
            new_TKH = _in_int8(new_TKH)
        cache.flatten(0, 1).index_copy_(0, index_T, new_TKH.to(cache.dtype))
    q_TNH = _rotate(q_TNH, cos_Tr, sin_Tr)
    return q_TNH if q_scale_T is None else (q_TNH.float() * q_scale_T[:, None, None]).to(q_TNH.dtype)


def _in_int8(x_TKH: torch.Tensor) -> torch.Tensor:
    """As an int8 cache has it: 127 for the largest of a head, and behind the head the four bytes of its fp32 scale."""
    most_TK1 = x_TKH.float().abs().amax(-1, keepdim=True)
    inverse_TK1 = torch.where(most_TK1 > 0, 127 / most_TK1, 0)
    return torch.cat(((x_TKH.float() * inverse_TK1).round().to(torch.int8), (most_TK1 / 127).view(torch.int8)), dim=-1)


def _in_fp32(cached: torch.Tensor) -> torch.Tensor:
    """Keys or values out of a cache of any type, [..., H]."""
    if cached.dtype != torch.int8:
        return cached.float()
    return cached[..., :-SCALE_BYTES].float() * cached[..., -SCALE_BYTES:].contiguous().view(torch.float32)


def _rotate(x_TNH: torch.Tensor, cos_Tr: torch.Tensor, sin_Tr: torch.Tensor) -> torch.Tensor:
    half = cos_Tr.shape[-1]
    cos, sin = cos_Tr[:, None], sin_Tr[:, None]
    first, second = x_TNH[..., :half].float(), x_TNH[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_TNH.dtype)
    return turned if 2 * half == x_TNH.shape[-1] else torch.cat((turned, x_TNH[..., 2 * half :]), dim=-1)


def paged_attention(
    q_TNH: torch.Tensor,
    k_cache_PBKH: torch.Tensor,
    v_cache_PBKH: torch.Tensor,
    query_start_R1: torch.Tensor,
    seq_lens_R: torch.Tensor,
    block_tables_RM: torch.Tensor,
    positions_T: torch.Tensor,
    query_start_host: Ints,
    seq_lens_host: Ints,
    scale: float,
    sliding_window: int = 0,
    soft_cap: float = 0.0,
) -> torch.Tensor:
    block_size = k_cache_PBKH.shape[1]
    keys_and_values = 2 * k_cache_PBKH.shape[2] * k_cache_PBKH.shape[3]
    out_TNH = torch.empty_like(q_TNH)
    for rows, start, stop in _tiles(query_start_host, seq_lens_host, q_TNH.shape[1], keys_and_values):
        blocks = -(-int(seq_lens_host[rows].max()) // block_size)
        if len(rows) == 1:
            tables = block_tables_RM[rows[0] : rows[0] + 1, :blocks]
            tokens = torch.arange(start, stop, device=q_TNH.device)[None]
        else:
            rows_on_device = torch.as_tensor(rows, device=q_TNH.device)
            tables = block_tables_RM[rows_on_device, :blocks]
            tokens = query_start_R1[rows_on_device].long()[:, None]
        out_TNH[tokens] = _attend(
            q_TNH[tokens],
            k_cache_PBKH[tables].flatten(1, 2),
            v_cache_PBKH[tables].flatten(1, 2),
            positions_T[tokens],
            scale,
            sliding_window,
            soft_cap,
        )
    return out_TNH


def _tiles(
    query_start: Ints, seq_lens: Ints, scores_per_key: int, elements_per_key: int
) -> list[tuple[list[int], int, int]]:
    """Work in pieces of bounded size: (rows, first token, end), the tokens being meant for a single row only.

    Rows with one token go together, those of similar length side by side, so that little is padded; a row
    with more tokens goes alone, in as many pieces as its scores need.
    """
    tiles: list[tuple[list[int], int, int]] = []
    lens, starts = seq_lens.tolist(), query_start.tolist()
    singles = [row for row in range(len(lens)) if starts[row + 1] - starts[row] == 1]
    group: list[int] = []
    for row in sorted(singles, key=lens.__getitem__):
        # The longest comes last, and all are padded to it.
        too_much = (len(group) + 1) * lens[row] * max(scores_per_key, elements_per_key) > _TILE
        if group and (too_much or lens[row] > 2 * lens[group[0]] + 64):
            tiles.append((group, starts[group[0]], starts[group[0]] + 1))
            group = []
        group.append(row)
    if group:
        tiles.append((group, starts[group[0]], starts[group[0]] + 1))
    for row, length in enumerate(lens):
        if starts[row + 1] - starts[row] == 1:
            continue
        step = max(1, _TILE // (scores_per_key * length))
        for start in range(starts[row], starts[row + 1], step):
            tiles.append(([row], start, min(start + step, starts[row + 1])))
    return tiles


def _attend(
    q_RTNH: torch.Tensor,
    k_RLKH: torch.Tensor,
    v_RLKH: torch.Tensor,
    positions_RT: torch.Tensor,
    scale: float,
    sliding_window: int,
    soft_cap: float,
) -> torch.Tensor:
    """Attention of T queries a row over L gathered keys a row, some of which lie beyond the row's end."""
    R, T, N, H = q_RTNH.shape
    L, K = k_RLKH.shape[1:3]
    # The N/K query heads of one kv head are stacked over its keys: [R, K, N/K * T, H] x [R, K, H, L].
    q_RKGH = q_RTNH.float().view(R, T, K, N // K, H).permute(0, 2, 3, 1, 4).reshape(R, K, -1, H)
    scores = (q_RKGH * scale) @ _in_fp32(k_RLKH).permute(0, 2, 3, 1)
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    keys_L = torch.arange(L, device=q_RTNH.device)
    hidden_RTL = keys_L > positions_RT[..., None]
    if sliding_window > 0:
        hidden_RTL |= keys_L <= positions_RT[..., None] - sliding_window
    scores.view(R, K, N // K, T, L).masked_fill_(hidden_RTL[:, None, None], float("-inf"))
    # A row's values end where its last query does: what lies behind is somebody else's, and 0 * NaN is NaN.
    behind_RL = keys_L > positions_RT.amax(1, keepdim=True)
    values_RLKH = _in_fp32(v_RLKH).masked_fill(behind_RL[:, :, None, None], 0.0)
    out = torch.softmax(scores, dim=-1) @ values_RLKH.transpose(1, 2)
    return out.view(R, K, N // K, T, H).permute(0, 3, 1, 2, 4).reshape(R, T, N, H).to(q_RTNH.dtype)


def copy_blocks(caches: list[torch.Tensor], copies_C2: torch.Tensor) -> None:
    source, destination = copies_C2.long().unbind(1)
    for cache_PBKH in caches:
        cache_PBKH.index_copy_(0, destination, cache_PBKH.index_select(0, source))
