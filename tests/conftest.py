"""Runs before anything imports triton: without a GPU its kernels are interpreted."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
