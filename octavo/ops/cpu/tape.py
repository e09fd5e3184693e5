"""Kernel calls written down: a `Tape` of instructions, over tensors that are known by their memory.

A tape knows nothing of what an instruction computes. `calls.py` writes on it; `Recording` replays it on other
memory and any number of tokens.
"""

import ctypes
from collections.abc import Sequence

import torch

from octavo.kernels import library
from octavo.kernels.library import Buffer, Instruction, KernelThreads, Operand, Program, Step


class NotRecordableError(Exception):
    """A model computes something between the ops, which a replayed step would miss; the text says what."""


class Tape:
    """Instructions in order, and the tensors that they name. `fixed`: a tensor that no instruction has made, and no
    input is, cannot be named."""

    def __init__(self, fixed: bool = False):
        self.instructions: list[Instruction] = []
        self.tensors: list[torch.Tensor] = []  # one a buffer, each the first view that was seen of it
        self.kept: list[object] = []  # what instructions point into
        self.most_inputs = 0
        self._fixed = fixed
        self._buffers: dict[int, int] = {}  # address of the memory -> number

    def new(self, tokens: int, *shape: int) -> torch.Tensor:
        """A result, [tokens, *shape] in fp32, as a buffer of its own."""
        tensor = torch.empty(tokens, *shape)
        self.name(tensor)
        return tensor

    def name(self, tensor: torch.Tensor) -> None:
        """Makes `tensor` a buffer; an input must be one before it is used."""
        self._buffers[tensor.untyped_storage().data_ptr()] = len(self.tensors)
        self.tensors.append(tensor)

    def owns(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._buffers

    def operand(self, tensor: torch.Tensor) -> Operand:
        """A tensor [tokens, ...] whose rows lie in one piece, wherever in a buffer."""
        if not self.owns(tensor):
            if self._fixed:
                raise NotRecordableError(f"a tensor of shape {list(tensor.shape)} was not made by an op")
            self.name(tensor)
        number = self._buffers[tensor.untyped_storage().data_ptr()]
        whole = self.tensors[number]
        assert tensor.dtype == torch.float32, "activations of the CPU kernels are fp32"
        if tensor.stride(0) != whole.stride(0) or not tensor[0].is_contiguous():
            raise NotRecordableError(f"a view of shape {list(tensor.shape)} does not hold a piece of each token's row")
        return Operand(number, tensor.storage_offset() - (0 if self._fixed else whole.storage_offset()))

    def keep(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor's numbers in fp32, which live as long as the tape; 0 for None."""
        if tensor is None:
            return 0
        tensor = tensor.float().contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def program(self, buffers: Sequence[tuple[int, int]]) -> Program:
        """The tape over `buffers`, (address, stride in floats) each."""
        return Program(
            (Instruction * len(self.instructions))(*self.instructions),
            len(self.instructions),
            (Buffer * len(buffers))(*[Buffer(*buffer) for buffer in buffers]),
            self.most_inputs,
        )

    def run(self, threads: KernelThreads, step: Step) -> None:
        """Runs it on the tensors it was written with."""
        program = self.program([(tensor.data_ptr(), tensor.stride(0)) for tensor in self.tensors])
        threads.kernels.run(threads.address, ctypes.byref(program), ctypes.byref(step))


class Recording:
    """A tape that runs on memory of its own, for up to `max_tokens` tokens."""

    def __init__(self, tape: Tape, inputs: Sequence[torch.Tensor], output: torch.Tensor, max_tokens: int):
        # Torch counts what is written into a tensor; the kernels' results were never written, only named.
        if written := [tensor for tensor in tape.tensors if tensor._version]:
            raise NotRecordableError(f"a result of shape {list(written[0].shape)} is written into in place")
        self._tape = tape
        number = tape.operand(output).buffer
        places = _places(tape, [tape.operand(tensor).buffer for tensor in inputs], number)
        widths = [tensor.stride(0) for tensor in tape.tensors]
        memory: dict[int, torch.Tensor] = {}
        for buffer, place in enumerate(places):
            if place not in memory:
                memory[place] = torch.empty(max_tokens, widths[buffer])
        self.inputs = [memory[places[tape.operand(tensor).buffer]] for tensor in inputs]
        self.output = memory[places[number]]
        self._memory = [memory[place] for place in places]
        self._program = tape.program([(tensor.data_ptr(), tensor.stride(0)) for tensor in self._memory])

    def run(self, threads: KernelThreads, step: Step) -> None:
        """Computes the step's tokens; what comes out lies in the first rows of `output`."""
        threads.kernels.run(threads.address, ctypes.byref(self._program), ctypes.byref(step))


def _places(tape: Tape, inputs: Sequence[int], output: int) -> list[int]:
    """For each buffer the first buffer whose memory it takes over: one as wide that nobody reads any more.

    Fewer buffers stay in the processor's caches, and a step of many tokens needs less memory.
    """
    last_use = dict.fromkeys(range(len(tape.tensors)), -1)
    for index, instruction in enumerate(tape.instructions):
        for buffer in (*_read(instruction), *_written(instruction)):
            last_use[buffer] = index
    last_use[output] = len(tape.instructions)
    places = list(range(len(tape.tensors)))
    free: dict[int, list[int]] = {}
    seen = set(inputs)
    for index, instruction in enumerate(tape.instructions):
        for buffer in _written(instruction):
            idle = free.get(tape.tensors[buffer].stride(0))
            if buffer not in seen and idle:
                places[buffer] = idle.pop()
            seen.add(buffer)
        for buffer in {*_read(instruction), *_written(instruction)}:
            if last_use[buffer] == index:
                free.setdefault(tape.tensors[buffer].stride(0), []).append(places[buffer])
    return places


_NUM_INPUTS = {
    library.EMBED: 0,
    library.NORM: 1,
    library.ADD_NORM: 2,
    library.LINEAR: 1,
    library.SILU_MUL: 1,
    library.ROPE: 3,
    library.ATTEND: 1,
}


def _read(instruction: Instruction) -> list[int]:
    return [operand.buffer for operand in instruction.inputs[: _NUM_INPUTS[instruction.code]]]


def _written(instruction: Instruction) -> list[int]:
    return [operand.buffer for operand in instruction.outputs[: 2 if instruction.code == library.ADD_NORM else 1]]
