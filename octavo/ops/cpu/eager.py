"""The CPU's kernels called op by op, on torch's tensors: to test a kernel, for a call outside of any step, and for a
model whose step cannot be recorded."""

import ctypes
from typing import Any

import numpy as np
import torch

from octavo.kernels.library import KernelThreads, Operand, Step
from octavo.ops.cpu.calls import KernelCalls
from octavo.ops.cpu.tape import Tape


class TensorTape(Tape[torch.Tensor]):
    """The tape of one call: any tensor can be a buffer, and is known by its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []  # one a buffer, each the first view that was seen of it
        self._buffers: dict[int, int] = {}  # address of the memory -> number

    def new(self, tokens: int, *shape: int) -> torch.Tensor:
        tensor = torch.empty(tokens, *shape)
        self._name(tensor)
        return tensor

    def _name(self, tensor: torch.Tensor) -> None:
        self._buffers[tensor.untyped_storage().data_ptr()] = len(self.tensors)
        self.tensors.append(tensor)

    def operand(self, tensor: torch.Tensor) -> Operand:
        if tensor.untyped_storage().data_ptr() not in self._buffers:
            self._name(tensor)
        number = self._buffers[tensor.untyped_storage().data_ptr()]
        whole = self.tensors[number]
        assert tensor.dtype == torch.float32, "activations of the CPU kernels are fp32"
        assert tensor.stride(0) == whole.stride(0), "a view has its buffer's rows"
        assert tensor[0].is_contiguous(), "what a view has of a row is one piece"
        return Operand(number, tensor.storage_offset() - whole.storage_offset())

    def run(self, threads: KernelThreads, step: Step) -> None:
        """Runs it on the tensors it was written with."""
        program = self.program([(tensor.data_ptr(), tensor.stride(0)) for tensor in self.tensors], self.instructions)
        threads.kernels.run(threads.address, ctypes.byref(program), ctypes.byref(step))


class KernelOps(KernelCalls):
    """Each op computes at once."""

    tape: TensorTape

    def __init__(self, threads: KernelThreads):
        super().__init__(threads, TensorTape())

    def _done(self, **arrays: Any) -> None:
        tape, self.tape = self.tape, TensorTape()
        tape.run(self.threads, _step(tape, **arrays))


def _step(
    tape: TensorTape,
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
        rows=len(query_start) - 1,
        query_start=address(query_start),
        seq_lens=address(query_start[1:] if seq_lens is None else seq_lens.int()),
        block_tables=address(None if block_tables is None else block_tables.int()),
        table_stride=0 if block_tables is None else block_tables.shape[1],
        cos=tables[0].ctypes.data,
        sin=tables[1].ctypes.data,
        q_scale=address(q_scale),
    )
