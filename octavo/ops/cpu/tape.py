"""Kernel calls written down: a `Tape` of instructions over buffers that are known by number.

A tape knows nothing of what an instruction computes. `calls.py` writes on it, with symbols in the place of tensors;
`Recording` replays it on other memory and any number of tokens. No torch here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from octavo.batch import Floats
from octavo.kernels.library import Buffer, Instruction, Kernels, KernelThreads, Operand, Program, Step
from octavo.ops.cpu.fuse import fuse, read, written
from octavo.ops.cpu.memory import zeros
from octavo.ops.symbol import TOKENS, NotRecordableError, Symbol

Result = TypeVar("Result")  # what stands for a tensor while a tape is written


class Tape(Generic[Result]):
    """Instructions in order, and how wide the rows of the buffers are that they name."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.widths: list[int] = []  # one a buffer, in floats
        self.kept: list[object] = []  # what instructions point into
        self.most_inputs = 0

    def new(self, tokens: int, *shape: int) -> Result:
        """A result, [tokens, *shape] in fp32, as a buffer of its own."""
        raise NotImplementedError

    def operand(self, tensor: Result) -> Operand:
        """Where the rows of a result, or of a view of one, lie; in each row they must be one piece."""
        raise NotImplementedError

    def keep(self, numbers: Any) -> int:
        """The address of an array's or tensor's numbers in fp32, which live as long as the tape; 0 for None."""
        if numbers is None:
            return 0
        if not isinstance(numbers, np.ndarray):
            numbers = numbers.float().numpy()
        numbers = np.ascontiguousarray(numbers, np.float32)
        self.kept.append(numbers)
        address: int = numbers.ctypes.data
        return address

    def program(self, buffers: Sequence[tuple[int, int]], instructions: list[Instruction]) -> Program:
        """The instructions over `buffers`, (address, stride in floats) each."""
        return Program(
            (Instruction * len(instructions))(*instructions),
            len(instructions),
            (Buffer * len(buffers))(*[Buffer(*buffer) for buffer in buffers]),
            self.most_inputs,
        )


class SymbolTape(Tape[Symbol]):
    """A tape that is only written: what ops give back are symbols."""

    def new(self, tokens: int, *shape: int) -> Symbol:
        assert tokens == TOKENS, "a recorded step has so many tokens"
        places = np.arange(tokens * int(np.prod(shape))).reshape(tokens, *shape)
        self.widths.append(places[0].size)
        return Symbol(len(self.widths) - 1, places)

    def operand(self, tensor: Symbol) -> Operand:
        if not isinstance(tensor, Symbol):
            raise NotRecordableError(f"a tensor of shape {list(tensor.shape)} was not made by an op")
        width = self.widths[tensor.buffer]
        first = tensor.places.reshape(len(tensor), -1)[:, 0]
        piece = np.arange(tensor.places[0].size)
        wanted = np.arange(TOKENS)[:, None] * width + first[0] + piece
        if not np.array_equal(tensor.places.reshape(len(tensor), -1), wanted):
            raise NotRecordableError(f"a view of shape {list(tensor.shape)} does not hold a piece of each token's row")
        return Operand(tensor.buffer, int(first[0]))


class Recording:
    """A tape that runs on memory of its own, for up to `max_tokens` tokens."""

    def __init__(self, tape: SymbolTape, inputs: Sequence[Symbol], output: Symbol, max_tokens: int, kernels: Kernels):
        self._tape = tape
        number = tape.operand(output).buffer
        instructions = fuse(tape.instructions, tape.widths, [number], kernels)
        places = _places(instructions, tape.widths, [symbol.buffer for symbol in inputs], number)
        memory: dict[int, Floats] = {}
        for buffer, place in enumerate(places):
            if place not in memory:
                memory[place] = zeros((max_tokens, tape.widths[buffer]), np.float32)
        self.inputs = [memory[places[symbol.buffer]] for symbol in inputs]
        self.output = memory[places[number]]
        self._memory = [memory[place] for place in places]
        buffers = [(array.ctypes.data, array.shape[1]) for array in self._memory]
        self._program = tape.program(buffers, instructions)

    def run(self, threads: KernelThreads, step: Step) -> None:
        """Computes the step's tokens; what comes out lies in the first rows of `output`."""
        threads.kernels.run(threads.address, ctypes.byref(self._program), ctypes.byref(step))


def _places(instructions: list[Instruction], widths: list[int], inputs: Sequence[int], output: int) -> list[int]:
    """For each buffer the first buffer whose memory it takes over: one as wide that nobody reads any more.

    Fewer buffers stay in the processor's caches, and a step of many tokens needs less memory.
    """
    last_use = dict.fromkeys(range(len(widths)), -1)
    for index, instruction in enumerate(instructions):
        for buffer in (*read(instruction), *written(instruction)):
            last_use[buffer] = index
    last_use[output] = len(instructions)
    places = list(range(len(widths)))
    free: dict[int, list[int]] = {}
    seen = set(inputs)
    for index, instruction in enumerate(instructions):
        for buffer in written(instruction):
            idle = free.get(widths[buffer])
            if buffer not in seen and idle:
                places[buffer] = idle.pop()
            seen.add(buffer)
        for buffer in {*read(instruction), *written(instruction)}:
            if last_use[buffer] == index:
                free.setdefault(widths[buffer], []).append(places[buffer])
    return places
