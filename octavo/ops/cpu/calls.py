"""The ops of `octavo.ops` as calls of the C++ kernels: `KernelOps` runs each at once, `Recorder` writes them down.

Weights come packed (`weights.py`) or as plain tensors, which are then packed for the one call; activations are fp32;
the caches' blocks hold K and V in the kernels' own order, which `csrc/cache.h` draws.

Shapes as in `octavo.ops`.
"""

from typing import Any

import numpy as np
import torch

from octavo.batch import Ints
from octavo.kernels import library
from octavo.kernels.library import CacheShape, Instruction, KernelThreads, Operand, Rows, Step
from octavo.kernels.weights import PackedWeight, Packer, StoredRows, packed_bytes
from octavo.ops import reference
from octavo.ops.cpu.tape import Tape
from octavo.ops.weight import Fp8Weight, Weight

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_PRECISION = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float32"}


class KernelCalls:
    """Writes each op on `tape`; what becomes of the tape is the subclass's business."""

    def __init__(self, threads: KernelThreads, tape: Tape):
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
        out_TD = self.tape.new(len(token_ids_T), rows.shape[1])
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
        out_TO = self.tape.new(len(x_TI), weight.shape[0])
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
        rows, precision = stored_rows(weight_OI), _PRECISION[weight_OI.dtype]
        num_bytes = packed_bytes(rows.dtype, *rows.shape, precision) + 4096
        return Packer(self.threads, precision, num_bytes).pack([rows])

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        out = self.tape.new(*x.shape)
        heads = x.shape[1] if x.dim() == 3 else 1
        self._add(library.NORM, [x], [out], heads=heads, width=x.shape[-1], weight=self.tape.keep(weight), number=eps)
        self._done()
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, total = self.tape.new(*x.shape), self.tape.new(*x.shape)
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
        out_TF = self.tape.new(len(gate_up_T2F), width)
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
        out_TNH = self.tape.new(*q_TNH.shape)
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
        out_TNH = self.tape.new(*q_TNH.shape)
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
        reference.copy_blocks(caches, copies_C2)


def stored_rows(weight: torch.Tensor | StoredRows) -> StoredRows:
    """A tensor [rows, width] seen as rows in a file's words."""
    if isinstance(weight, StoredRows):
        return weight
    weight = weight.contiguous()
    data = weight.view(torch.uint8).numpy().reshape(-1)
    return StoredRows(_STORED[weight.dtype], (weight.shape[0], weight.shape[1]), data)


def _caches(k_cache_PBKH: torch.Tensor, v_cache_PBKH: torch.Tensor) -> dict[str, Any]:
    _, block_size, kv_heads, width = k_cache_PBKH.shape
    shape = CacheShape(block_size, kv_heads, width, k_cache_PBKH.element_size())
    return {"k_cache": k_cache_PBKH.data_ptr(), "v_cache": v_cache_PBKH.data_ptr(), "cache": shape}


class Recorder(KernelCalls):
    """Only writes down. What it gives back holds nothing yet, and only its memory's address counts."""

    def __init__(self, threads: KernelThreads):
        super().__init__(threads, Tape(fixed=True))

    def _done(self, **arrays: Any) -> None:
        pass


class KernelOps(KernelCalls):
    """Each op computes at once: to test a kernel, or for a call outside of any step."""

    def __init__(self, threads: KernelThreads):
        super().__init__(threads, Tape())

    def _done(self, **arrays: Any) -> None:
        tape, self.tape = self.tape, Tape()
        tape.run(self.threads, _step(tape, **arrays))


def _step(
    tape: Tape,
    token_ids: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    q_scale: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    block_tables: torch.Tensor | None = None,
) -> Step:
    """A Step with the arrays of one op. Angles come one row a token, so token t stands at position t of its table."""
    tokens = len(tape.tensors[-1])

    def address(array: torch.Tensor | None) -> int:
        if array is None:
            return 0
        array = array.contiguous()
        tape.kept.append(array)
        return array.data_ptr()

    tables = [np.array([address(table)], np.uint64) for table in (cos, sin)]
    query_start = torch.tensor([0, tokens], dtype=torch.int32) if query_start is None else query_start.int()
    tape.kept += [tables, query_start]
    return Step(
        tokens=tokens,
        token_ids=address(None if token_ids is None else token_ids.int()),
        positions=address(torch.arange(tokens, dtype=torch.int32)),
        slots=address(None if slots is None else slots.int()),
        rows=Rows(
            rows=len(query_start) - 1,
            query_start=address(query_start),
            seq_lens=address(query_start[1:] if seq_lens is None else seq_lens.int()),
            block_tables=address(None if block_tables is None else block_tables.int()),
            table_stride=0 if block_tables is None else block_tables.shape[1],
        ),
        cos=tables[0].ctypes.data,
        sin=tables[1].ctypes.data,
        q_scale=address(q_scale),
    )
