"""GGUF's block formats, dequantized: each block of 32 or 256 weights has its own scale.

Formats as in the ggml project's `ggml-quants`; the layouts are drawn at each function. Works on any device,
in vectorized torch. Reading files and choosing what to keep quantized is done elsewhere.

Shapes: n blocks; the last dimension of intermediates is the weights' order.
"""

from collections.abc import Callable, Mapping

import torch

from octavo.errors import CheckpointError

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Weights worked on at once: what is in between stays in the processor's cache, and torch does not wake its
# threads for so little; on a busy machine their wake-ups cost many times the work.
_CHUNK = 2**15


def dequantize(data: torch.Tensor, dtype: str, shape: tuple[int, ...], to: torch.dtype = torch.float32) -> torch.Tensor:
    """The tensor of `shape` in the flat uint8 `data` of GGUF's `dtype`: computed in fp32, rounded to `to`.

    Raises `CheckpointError` for an unknown dtype, or if the bytes are not those of so many weights.
    """
    if dtype not in _PLAIN and dtype not in _FORMATS:
        known = ", ".join((*_PLAIN, *_FORMATS))
        raise CheckpointError(f"weights of type {dtype} cannot be read; known: {known}")
    count = torch.Size(shape).numel()
    weights, size = (1, _PLAIN[dtype].itemsize) if dtype in _PLAIN else _FORMATS[dtype][:2]
    if count % weights or data.numel() != count // weights * size:
        raise CheckpointError(
            f"a {dtype} tensor of shape {list(shape)} cannot have {data.numel()} bytes; the file is damaged"
        )
    if dtype in _PLAIN:
        return data.view(_PLAIN[dtype]).view(shape).to(to)
    decode, blocks = _FORMATS[dtype][2], data.view(-1, size)
    out = torch.empty(len(blocks), weights, dtype=to, device=data.device)
    step = _CHUNK // weights if data.device.type == "cpu" else max(len(blocks), 1)
    fp32 = out if to == torch.float32 else torch.empty(step, weights, device=data.device)
    for start in range(0, len(blocks), step):
        part = out[start : start + step]
        decoded = part if fp32 is out else fp32[: len(part)]
        decode(blocks[start : start + step], decoded)
        if decoded is not part:
            part.copy_(decoded)
    return out.view(shape)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 number at byte `start` of each block: [n, 1] in fp32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., b] bytes -> [..., 2, b]: all low halves, then all high halves."""
    return torch.stack((packed & 15, packed >> 4), dim=-2)


def _bit_pairs(packed: torch.Tensor) -> torch.Tensor:
    """[..., b] bytes -> [..., 4, b]: the two lowest bits of each byte, then the next two, and so on."""
    return torch.stack((packed & 3, packed >> 2 & 3, packed >> 4 & 3, packed >> 6), dim=-2)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[..., b] bytes -> [..., 8, b]: bit 0 of each byte, then bit 1, and so on."""
    return torch.stack([packed >> bit & 1 for bit in range(8)], dim=-2)


def _fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The four bytes at `start` hold bit 4 of the block's 32 weights in order: [n, 32], 0 or 16."""
    return _bits(blocks[:, start : start + 4]).transpose(-1, -2).reshape(-1, 32) << 4


def _q8_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | 32 int8."""
    torch.mul(blocks[:, 2:].view(torch.int8), _half(blocks, 0), out=out)


def _q4_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | 16 bytes of nibbles, each 8 too high."""
    torch.mul(_nibbles(blocks[:, 2:]).view(-1, 32).view(torch.int8) - 8, _half(blocks, 0), out=out)


def _q4_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | minimum:2 | 16 bytes of nibbles."""
    torch.mul(_nibbles(blocks[:, 4:]).view(-1, 32), _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q5_0(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | fifth bits:4 | 16 bytes of nibbles, each weight 16 too high."""
    quants = _nibbles(blocks[:, 6:]).view(-1, 32) | _fifth_bits(blocks, 2)
    torch.mul(quants.view(torch.int8) - 16, _half(blocks, 0), out=out)


def _q5_1(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | minimum:2 | fifth bits:4 | 16 bytes of nibbles."""
    quants = _nibbles(blocks[:, 8:]).view(-1, 32) | _fifth_bits(blocks, 4)
    torch.mul(quants, _half(blocks, 0), out=out)
    out += _half(blocks, 2)


def _q2_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """16 scales (low nibble) with minima (high nibble) | 64 bytes of 2-bit weights | d:2 | dmin:2."""
    n = len(blocks)
    scales = (_half(blocks, 80) * (blocks[:, :16] & 15)).view(n, 16, 1)
    minima = (_half(blocks, 82) * (blocks[:, :16] >> 4)).view(n, 16, 1)
    out = out.view(n, 16, 16)
    torch.mul(_bit_pairs(blocks[:, 16:80].view(n, 2, 32)).view(n, 16, 16), scales, out=out)
    out -= minima


def _q3_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """32 bytes of third bits (unset: minus 4) | 64 bytes of 2-bit weights | 12 bytes of 6-bit scales | d:2.

    The scales' low nibbles fill bytes 0 to 7; their two high bits lie in bytes 8 to 11; each is 32 too high.
    """
    n = len(blocks)
    low = _bit_pairs(blocks[:, 32:96].view(n, 2, 32)).view(n, 8, 32)
    quants = (low | _bits(blocks[:, :32]) << 2).view(torch.int8) - 4
    packed = blocks[:, 96:108]
    scales = _nibbles(packed[:, :8]).view(n, 16) | _bit_pairs(packed[:, 8:]).view(n, 16) << 4
    factors = _half(blocks, 108) * (scales.view(torch.int8) - 32)
    torch.mul(quants.view(n, 16, 16), factors.view(n, 16, 1), out=out.view(n, 16, 16))


def _six_bit_pairs(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight minima of 6 bits from 12 bytes; [n, 8] each.

    byte   0-3: scale 0-3, and above it bits 4-5 of scale 4-7
           4-7: minimum 0-3, and above it bits 4-5 of minimum 4-7
          8-11: bits 0-3 of scale 4-7, above them bits 0-3 of minimum 4-7
    """
    first, second, third = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (third & 15) | first >> 6 << 4), dim=1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=1)
    return scales, minima


def _q4_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """d:2 | dmin:2 | 12 bytes of scales and minima | 128 of nibbles, low and high of 32 bytes in turn."""
    _k_with_minima(blocks, _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32), out)


def _q5_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit j for the weights from 32 j on."""
    low = _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32)
    _k_with_minima(blocks, low | _bits(blocks[:, 16:48]) << 4, out)


def _k_with_minima(blocks: torch.Tensor, quants: torch.Tensor, out: torch.Tensor) -> None:
    scales, minima = _six_bit_pairs(blocks[:, 4:16].contiguous())
    out = out.view(-1, 8, 32)
    torch.mul(quants, (_half(blocks, 0) * scales)[..., None], out=out)
    out -= (_half(blocks, 2) * minima)[..., None]


def _q6_k(blocks: torch.Tensor, out: torch.Tensor) -> None:
    """128 bytes of low nibbles | 64 bytes of high bit pairs | 16 int8 scales | d:2; each weight 32 too high.

    By halves of 128 weights: the low nibbles of 64 bytes, then the high ones; the four pairs of 32 bytes in
    turn.
    """
    n = len(blocks)
    low = _nibbles(blocks[:, :128].view(n, 2, 64)).view(n, 2, 128)
    high = _bit_pairs(blocks[:, 128:192].view(n, 2, 32)).view(n, 2, 128)
    quants = (low | high << 4).view(torch.int8) - 32
    factors = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    torch.mul(quants.view(n, 16, 16), factors.view(n, 16, 1), out=out.view(n, 16, 16))


# Format: (weights in a block, bytes of a block, decoder).
_FORMATS: Mapping[str, tuple[int, int, Callable[[torch.Tensor, torch.Tensor], None]]] = {
    "Q8_0": (32, 34, _q8_0),
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
