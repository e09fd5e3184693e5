"""What a step need not write to memory: instructions joined where linear layers alone read a result.

A norm, silu_mul or gated product hands its rows over to the linear layers behind it in the precision that these take; a
linear layer whose outputs silu_mul alone reads becomes gated, in the builds that can. Results stay the same to the bit.
It knows who reads which buffer, and nothing of what is computed.
"""

from collections.abc import Collection

from octavo.kernels import library
from octavo.kernels.library import Instruction, Kernels, Operand, Weight

_NUM_INPUTS = {
    library.EMBED: 0,
    library.NORM: 1,
    library.ADD_NORM: 2,
    library.LINEAR: 1,
    library.SILU_MUL: 1,
    library.ROPE: 3,
    library.ATTEND: 1,
}
# The room of activations (program.h) that each kind hands over in.
_ROOMS = {library.NORM: 1, library.ADD_NORM: 1, library.SILU_MUL: 2, library.LINEAR: 2}


def read(instruction: Instruction) -> list[int]:
    """The buffers that an instruction reads."""
    return [operand.buffer for operand in instruction.inputs[: _NUM_INPUTS[instruction.code]]]


def written(instruction: Instruction) -> list[int]:
    """The buffers that an instruction writes."""
    return [operand.buffer for operand in instruction.outputs[: 2 if instruction.code == library.ADD_NORM else 1]]


def fuse(
    instructions: list[Instruction], widths: list[int], kept: Collection[int], kernels: Kernels
) -> list[Instruction]:
    """The joined instructions; `widths` are those of the buffers, `kept` the buffers that are read from outside."""
    fused = _gated([Instruction.from_buffer_copy(each) for each in instructions], kept, kernels)
    busy = dict.fromkeys(_ROOMS.values(), -1)  # the last instruction that reads what is in a room
    for index, maker in enumerate(fused):
        buffer = maker.outputs[0].buffer
        readers = [i for i, other in enumerate(fused) if buffer in read(other)]
        room = _ROOMS.get(maker.code, 0)
        if buffer in kept or not room or busy[room] >= index or not _can_make(maker):
            continue
        if not readers or not all(_takes(fused[i], Operand(buffer, 0), widths[buffer]) for i in readers):
            continue
        weights = [Weight.from_address(fused[i].weight) for i in readers]
        if len({(weight.format, weight.inputs, weight.group, weight.halves) for weight in weights}) > 1:
            continue
        if maker.gated and not kernels.can_gate_into(fused[readers[0]].weight):
            continue
        maker.to_room, maker.next, busy[room] = room, fused[readers[0]].weight, readers[-1]
        for i in readers:
            fused[i].from_room = room
    return fused


def _gated(instructions: list[Instruction], kept: Collection[int], kernels: Kernels) -> list[Instruction]:
    """Each linear layer joined with the silu_mul behind it, if that alone reads its outputs."""
    joined: list[Instruction] = []
    for each in instructions:
        last = joined[-1] if joined else each
        outputs = each.inputs[0].buffer
        if (
            (last.code, each.code) == (library.LINEAR, library.SILU_MUL)
            and _takes(each, last.outputs[0], each.width)
            and Weight.from_address(last.weight).outputs == 2 * each.width
            and sum(outputs in read(other) for other in instructions) == 1
            and outputs not in kept
            and kernels.can_gate(last.weight)
        ):
            last.gated, last.outputs = 1, each.outputs
        else:
            joined.append(each)
    return joined


def _can_make(maker: Instruction) -> bool:
    """Whether it computes whole rows, which can be prepared."""
    if maker.code == library.LINEAR:
        return bool(maker.gated)
    return bool(maker.code != library.NORM or maker.heads == 1)


def _takes(reader: Instruction, operand: Operand, width: int) -> bool:
    """Whether it reads rows of `width` numbers at `operand`, as a linear layer or silu_mul does."""
    place = reader.inputs[0]
    rows: bool = (place.buffer, place.offset, operand.offset, reader.width) == (operand.buffer, 0, 0, width)
    return rows and reader.code in (library.LINEAR, library.SILU_MUL)
