"""Runs before anything imports triton: without a GPU its kernels are interpreted."""

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def _no_techniques_of_other_tests():
    """Defining a technique makes it known to the process: what tests define must not stand in the tables of others."""
    _forget_own_techniques()
    yield
    _forget_own_techniques()


def _forget_own_techniques():
    registry = sys.modules.get("mminfer.technique.registry")
    if registry is not None:
        for name, technique in list(registry._classes.items()):
            if not technique.__module__.startswith("mminfer."):
                del registry._classes[name], registry._homes[name]
