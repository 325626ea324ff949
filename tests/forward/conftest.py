"""What several tests of the passes need."""

import pytest
import torch

from mminfer.forward import compiled


@pytest.fixture
def traced(monkeypatch):
    """torch.compile without its slow half: the graph runs as it was traced."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    step = torch.compile(compiled._step, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiled, "_compiled", lambda: step)
    yield
    torch._dynamo.reset()
