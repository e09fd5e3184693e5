"""The ops of `octavo.ops` as calls of the C++ kernels: `Recorder` writes them down; `eager` runs each at once.

Weights come packed (`weights.py`) or as plain tensors, which are then packed for the one call; activations are fp32;
the caches' blocks hold K and V in the kernels' own order, which `csrc/cache.h` draws. No torch here: what the ops are
given and give back is named after tensors, and is whatever the tape takes for one.

Shapes as in `octavo.ops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from octavo.batch import Ints
from octavo.config import SCALE_BYTES
from octavo.kernels import library
from octavo.kernels.library import CacheShape, Instruction, KernelThreads, Operand
from octavo.kernels.weights import PackedWeight, Packer, StoredRows, packed_bytes
from octavo.ops.cpu.memory import address_of
from octavo.ops.cpu.tape import SymbolTape, Tape
from octavo.ops.weight import Fp8Weight, Weight

if TYPE_CHECKING:
    import torch

_STORED = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16"}
_PRECISION = {"F32": "float32", "BF16": "bfloat16", "F16": "float32"}


class KernelCalls:
    """Writes each op on `tape`; what becomes of the tape is the subclass's business."""

    def __init__(self, threads: KernelThreads, tape: Tape[Any]):
        self.threads = threads
        self.tape = tape

    def _done(self, **arrays: Any) -> None:
        """After an op: `arrays` is what its instruction reads of a Step."""
        raise NotImplementedError

    def _add(self, code: int, inputs: list[torch.Tensor], outputs: list[torch.Tensor], **fields: Any) -> None:
        tape = self.tape
        of_inputs = (Operand * 3)(*[tape.operand(tensor) for tensor in inputs])
        of_outputs = (Operand * 2)(*[tape.operand(tensor) for tensor in outputs])
        tape.instructions.append(Instruction(code=code, inputs=of_inputs, outputs=of_outputs, **fields))

    def embedding(self, token_ids_T: torch.Tensor, weight_VD: torch.Tensor | StoredRows) -> torch.Tensor:
        rows = stored_rows(weight_VD)
        self.tape.kept.append(rows)
        out_TD: torch.Tensor = self.tape.new(len(token_ids_T), rows.shape[1])
        self._add(
            library.EMBED,
            [],
            [out_TD],
            width=rows.shape[1],
            weight=rows.data.ctypes.data,
            stored=library.STORED[rows.dtype],
        )
        self._done(token_ids=token_ids_T)
        return out_TD

    def linear(self, x_TI: torch.Tensor, weight_OI: Weight, bias_O: torch.Tensor | None = None) -> torch.Tensor:
        assert not isinstance(weight_OI, Fp8Weight), "fp8 weights belong to a GPU"
        weight = weight_OI if isinstance(weight_OI, PackedWeight) else self._packed(weight_OI)
        self.tape.kept.append(weight)
        out_TO: torch.Tensor = self.tape.new(len(x_TI), weight.shape[0])
        for piece in weight.pieces:
            columns = slice(piece.first, piece.first + piece.rows)
            self.tape.most_inputs = max(self.tape.most_inputs, piece.struct.inputs)
            self._add(
                library.LINEAR,
                [x_TI],
                [out_TO[:, columns]],
                width=x_TI.shape[1],
                weight=piece.address,
                bias=self.tape.keep(None if bias_O is None else bias_O[columns]),
            )
        self._done()
        return out_TO

    def _packed(self, weight_OI: torch.Tensor) -> PackedWeight:
        rows = stored_rows(weight_OI)
        precision = _PRECISION[rows.dtype]
        num_bytes = packed_bytes(rows.dtype, *rows.shape, precision) + 4096
        return Packer(self.threads, precision, num_bytes).pack([rows])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out: torch.Tensor = self.tape.new(*x.shape)
        heads = x.shape[1] if x.dim() == 3 else 1
        self._add(library.NORM, [x], [out], heads=heads, width=x.shape[-1], weight=self.tape.keep(weight), number=eps)
        self._done()
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out: torch.Tensor = self.tape.new(*x.shape)
        total: torch.Tensor = self.tape.new(*x.shape)
        self._add(
            library.ADD_NORM,
            [x, residual],
            [out, total],
            width=x.shape[-1],
            weight=self.tape.keep(weight),
            number=eps,
        )
        self._done()
        return out, total

    def silu_mul(self, gate_up_T2F: torch.Tensor) -> torch.Tensor:
        width = gate_up_T2F.shape[1] // 2
        out_TF: torch.Tensor = self.tape.new(len(gate_up_T2F), width)
        self._add(library.SILU_MUL, [gate_up_T2F], [out_TF], width=width)
        self._done()
        return out_TF

    def rope_and_cache(
        self,
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
            q_TNH, k_TKH = self.rms_norm(q_TNH, q_norm_H, eps), self.rms_norm(k_TKH, k_norm_H, eps)
        out_TNH: torch.Tensor = self.tape.new(*q_TNH.shape)
        self._add(
            library.ROPE,
            [q_TNH, k_TKH, v_TKH],
            [out_TNH],
            heads=q_TNH.shape[1],
            width=q_TNH.shape[2],
            half=cos_Tr.shape[1],
            **_caches(k_cache_PBKH, v_cache_PBKH),
        )
        self._done(cos=cos_Tr, sin=sin_Tr, slots=slots_T, q_scale=q_scale_T)
        return out_TNH

    def paged_attention(
        self,
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
        out_TNH: torch.Tensor = self.tape.new(*q_TNH.shape)
        self._add(
            library.ATTEND,
            [q_TNH],
            [out_TNH],
            heads=q_TNH.shape[1],
            width=q_TNH.shape[2],
            number=scale,
            window=sliding_window,
            soft_cap=soft_cap,
            **_caches(k_cache_PBKH, v_cache_PBKH),
        )
        self._done(query_start=query_start_R1, seq_lens=seq_lens_R, block_tables=block_tables_RM)
        return out_TNH

    def copy_blocks(self, caches: list[torch.Tensor], copies_C2: torch.Tensor) -> None:
        # Blocks are copied as they lie; nothing of their inside matters.
        from octavo.ops import reference

        reference.copy_blocks(caches, copies_C2)


def stored_rows(weight: torch.Tensor | StoredRows) -> StoredRows:
    """A tensor [rows, width] seen as rows in a file's words."""
    if isinstance(weight, StoredRows):
        return weight
    import torch

    weight = weight.contiguous()
    data = weight.view(torch.uint8).numpy().reshape(-1)
    return StoredRows(_STORED[str(weight.dtype)], (weight.shape[0], weight.shape[1]), data)


def _caches(k_cache_PBKH: Any, v_cache_PBKH: Any) -> dict[str, Any]:
    _, block_size, kv_heads, width = k_cache_PBKH.shape
    if k_cache_PBKH.itemsize == 1:
        width -= SCALE_BYTES
    shape = CacheShape(block_size, kv_heads, width, k_cache_PBKH.itemsize)
    return {"k_cache": address_of(k_cache_PBKH), "v_cache": address_of(v_cache_PBKH), "cache": shape}


class Recorder(KernelCalls):
    """Only writes down: what it gives back are symbols."""

    tape: SymbolTape

    def __init__(self, threads: KernelThreads):
        super().__init__(threads, SymbolTape())

    def _done(self, **arrays: Any) -> None:
        pass
