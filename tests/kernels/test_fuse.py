"""What is joined in a recorded step, against the same ops called one by one: the same bits, and nothing joined that
somebody else reads."""

import numpy as np
import pytest
import torch

from octavo.kernels import library
from octavo.kernels.library import Step
from octavo.kernels.weights import Packer, StoredRows
from octavo.ops.cpu.calls import Recorder
from octavo.ops.cpu.eager import KernelOps
from octavo.ops.cpu.fuse import fuse
from octavo.ops.cpu.tape import Recording
from octavo.ops.symbol import TOKENS
from tests.builds import BUILDS_APART, kernels_of, needs_kernels

pytestmark = needs_kernels
D, F = 80, 96


@pytest.fixture(params=BUILDS_APART)
def threads(request):
    return library.KernelThreads(kernels_of(request.param), 2)


def packed(threads, precision, outputs, inputs):
    rows = (torch.randn(outputs, inputs) / inputs**0.5).numpy().view(np.uint8).reshape(-1)
    return Packer(threads, precision, 2**20).pack([StoredRows("F32", (outputs, inputs), rows)])


class Mlp:
    def __init__(self, threads, precision, bias):
        self.norm = torch.rand(D) + 0.5
        self.gate_up, self.down = packed(threads, precision, 2 * F, D), packed(threads, precision, D, F)
        self.bias = torch.randn(2 * F) if bias else None

    def __call__(self, ops, x_TD):
        """Twice, so that the second norm adds a residual stream."""
        inner = ops.rms_norm(x_TD, self.norm, 1e-5)
        y_TD = self.down_of(ops, inner)
        inner, _ = ops.add_rms_norm(y_TD, x_TD, self.norm, 1e-5)
        return self.down_of(ops, inner)

    def down_of(self, ops, inner):
        return ops.linear(ops.silu_mul(ops.linear(inner, self.gate_up, self.bias)), self.down)


def record(threads, net):
    recorder = Recorder(threads)
    x_TD = recorder.tape.new(TOKENS, D)
    return recorder.tape, x_TD, net(recorder, x_TD)


def joined(tape, output, threads):
    return fuse(tape.instructions, tape.widths, [tape.operand(output).buffer], threads.kernels)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16, 33, 200])
def test_joined_and_one_by_one_are_the_same_bits(threads, precision, bias, tokens):
    torch.manual_seed(0)
    mlp, x_TD = Mlp(threads, precision, bias), 3 * torch.randn(tokens, D)
    recording = Recording(*record(threads, mlp), tokens, threads.kernels)
    recording.inputs[0][:] = x_TD.numpy()
    recording.run(threads, Step(tokens=tokens))
    wanted = mlp(KernelOps(threads), x_TD)
    assert wanted.abs().max() > 0.1
    assert np.array_equal(recording.output, wanted.numpy())


@pytest.mark.parametrize("precision", ["bfloat16", "int4"])
def test_products_take_what_norms_and_gates_hand_over(threads, precision):
    tape, _, output = record(threads, Mlp(threads, precision, False))
    found = joined(tape, output, threads)
    assert all(each.from_room for each in found if each.code == library.LINEAR)
    gated = threads.kernels.name == "amx" and precision == "bfloat16"
    assert [each.code for each in found].count(library.SILU_MUL) == (0 if gated else 2)


def test_what_others_read_is_written(threads):
    weight = packed(threads, "bfloat16", 2 * F, D)
    norm = torch.ones(D)

    def read_by_a_norm_too(ops, x_TD):
        inner = ops.rms_norm(x_TD, norm, 1e-5)
        return ops.linear(ops.add_rms_norm(inner, inner, norm, 1e-5)[1], weight), ops.linear(inner, weight)

    def given_back(ops, x_TD):
        inner = ops.rms_norm(x_TD, norm, 1e-5)
        return inner, ops.linear(inner, weight)

    def gate_read_twice(ops, x_TD):
        gate_up = ops.linear(x_TD, weight)
        return ops.rms_norm(gate_up, torch.ones(2 * F), 1e-5), ops.silu_mul(gate_up)

    for net in (read_by_a_norm_too, given_back, gate_read_twice):
        tape, _, (output, _) = record(threads, net)
        assert not any(each.from_room or each.to_room or each.gated for each in joined(tape, output, threads))


def test_a_room_holds_one_thing_at_a_time(threads):
    """A second norm comes between the first one and its last reader, so it writes to memory."""
    weight, norm = packed(threads, "bfloat16", D, D), torch.ones(D)

    def net(ops, x_TD):
        first, second = ops.rms_norm(x_TD, norm, 1e-5), ops.rms_norm(x_TD, norm, 1e-4)
        return ops.add_rms_norm(ops.linear(second, weight), ops.linear(first, weight), norm, 1e-5)[0]

    tape, _, output = record(threads, net)
    rooms = [each.to_room for each in joined(tape, output, threads)]
    assert rooms == [1, 0, 0, 0, 0]
