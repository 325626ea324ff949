"""Runs before anything imports triton: without a GPU its kernels are interpreted."""

import os
import sys

# Before triton is loaded, and so it is for workers that this process starts.
os.environ.setdefault("TRITON_INTERPRET", "0" if "--device cuda" in " ".join(sys.argv).replace("=", " ") else "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # workers have a terminal's, which consoles made on import would keep
os.environ.pop("LINES", None)
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else its import starts processes that load torch anew

import psutil
import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import device as on_device
from tests.interpreted import language_made_over_once_a_launch

torch.set_num_threads(1)  # tiny models: more threads only wait for each other
settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("beside others")

MOST_WORKERS, WORKER_BYTES = 8, 2**31


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto`: one for each processor that this process may use, hyperthreads too, while there is memory."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # then it is asked for by xdist itself
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(processors, MOST_WORKERS, psutil.virtual_memory().total // WORKER_BYTES))


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=on_device.DEVICES,
        default="cpu",
        help="where tests of kernels and rules make their tensors; without one only these run on it",
    )


def pytest_configure(config):
    on_device.begin(config.getoption("--device"))


def pytest_unconfigure(config):
    on_device.end()


def pytest_collection_modifyitems(config, items):
    items[:], left_out = on_device.chosen(config.getoption("--device"), items)
    if left_out:
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def device():
    """Where tests make tensors: the CPU, unless `--device` names another."""
    return on_device.device()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _interpreted_faster():
    with language_made_over_once_a_launch():
        yield


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
