"""A GPU's graphs on machines without one."""

from types import SimpleNamespace

import pytest
import torch

from tests import interpreter


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Kernels run in Triton's interpreter, and a graph computes its step again, into the same memory. Few sizes, few
    graphs kept. The keys of those that were recorded."""
    interpreter.start()
    from octavo.runner import prompt_graphs
    from octavo.runner.cuda_graphs import DecodeGraphs, RecordedStep
    from octavo.runner.prompt_graphs import PromptGraphs

    recorded = []

    def warm_up(graphs, *key):
        kept = [(tensor, tensor.clone()) for tensor in (graphs._drawn_S, graphs._buffers.control)]
        result = graphs._compute(*key)
        for tensor, content in kept:
            tensor.copy_(content)
        recorded.append(key)
        return result

    def record(self, *key):
        ctx, hidden = warm_up(self, *key)
        return RecordedStep(SimpleNamespace(replay=lambda: hidden.copy_(self._compute(*key)[1])), ctx, hidden)

    def record_prompts(self, size):
        warm_up(self, size)
        return SimpleNamespace(replay=lambda: self._compute(size))

    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **more: zeros(*shape, **more))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(DecodeGraphs, "_record", record)
    monkeypatch.setattr(PromptGraphs, "_record", record_prompts)
    monkeypatch.setattr(prompt_graphs, "_SINGLES", (0, 2, 4))
    monkeypatch.setattr(prompt_graphs, "MOST_GRAPHS", 2)
    return recorded
