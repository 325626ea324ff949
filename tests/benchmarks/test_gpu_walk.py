"""No prompt pass and no decoding step asks more of a GPU than it does now: kernels launched, waits of the host.

The bounds are what was found, so that nothing gets worse; a change that lowers a number lowers its bound.
"""

import pytest
import torch

from benchmarks.gpu.pretended import PretendedTensor, pretended_gpu
from benchmarks.gpu.walk import narrow_model, on_pretended_gpu, replayed, walked
from mminfer import InferenceConfig, patched

HOST = 1150  # launches of the unpatched model's pass
# Launches and waits of a prompt pass, one of them at its end for the clock; launches and waits of a step.
BOUNDS = {
    "host": (HOST, 1, 1142, 0),
    "off": (1145, 2, 1158, 0),
    "v2pe-16": (1137, 2, 1158, 0),
    "skip-ffn": (1181, 2, 1158, 0),
    "aim": (1502, 2, 1146, 0),
    "balanced": (1582, 2, 1148, 0),
    "random-prune": (1308, 2, 1151, 0),
    "lookm-20": (3049, 2, 1130, 0),
    "snapkv-20": (2321, 2, 1130, 0),
    "digest-20": (6930, 5, 1133, 0),
}
pytestmark = pytest.mark.filterwarnings("ignore:V2PE")


@pytest.fixture(scope="module")
def gpu_model():
    torch.manual_seed(0)
    model = narrow_model()
    with on_pretended_gpu(model, frames=4) as (gpu, inputs):
        yield gpu, model, inputs


@pytest.mark.parametrize("setting", BOUNDS)
def test_bounds(gpu_model, setting):
    walk = walked(*gpu_model, setting)
    found = walk.prompt.num_launches, walk.prompt.num_waits, walk.step.num_launches, walk.step.num_waits
    assert all(a <= b for a, b in zip(found, BOUNDS[setting], strict=True)), (found, walk.prompt.waits, walk.step.waits)


@pytest.mark.parametrize("setting", ["off", "replay-20"])
def test_a_recorded_step_is_a_few_launches(setting):
    """Its inputs are put in their places, one launch replays all of it, and its logits are taken out."""
    model = narrow_model(3)
    with on_pretended_gpu(model, 1) as (gpu, inputs):
        step = replayed(gpu, model, inputs, setting)
    assert step.launches["graph"] == 1
    assert (step.num_launches, step.num_waits) <= (6, 0), step


def test_values_are_the_cpus():
    """What is launched follows from values: they are those of a pass on the CPU."""
    model, plain = narrow_model(2), narrow_model(2)
    config = InferenceConfig.from_preset("balanced")
    with on_pretended_gpu(model, 1) as (_, inputs), torch.no_grad(), patched(model, config, verify=False):
        logits = model(**inputs).logits.held
        held = [x.held for x in (inputs["input_ids"], inputs["mm_encoder_outputs"]["video"].pooler_output)]
    inputs["mm_encoder_outputs"]["video"].pooler_output = held[1]
    with torch.no_grad(), patched(plain, config, verify=False):
        expected = plain(**{**inputs, "input_ids": held[0]}).logits
    torch.testing.assert_close(logits, expected, atol=0.02, rtol=0.05)


@pytest.mark.parametrize(
    ("waits", "work"),
    [
        (1, lambda x: x.max().item()),
        (1, lambda x: x.tolist()),
        (1, lambda x: bool((x > 1).any())),
        (1, lambda x: x.nonzero()),
        (1, lambda x: x[x > 1]),
        (1, lambda x: x.bincount()),
        (1, lambda x: x.cpu()),
        (1, lambda x: x[torch.tensor([1, 0])]),
        (1, lambda x: x[[1, 0]]),
        (1, lambda x: torch.tensor([1, 2], device=x.device)),
        (1, lambda x: torch.equal(x, x + 1)),
        (1, lambda x: torch.repeat_interleave(x)),
        (0, lambda x: torch.repeat_interleave(x, output_size=6)),
        (0, lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True)),
        (0, lambda x: x[x.argsort()].cumsum(0) + torch.arange(3, device=x.device)),
        (0, lambda x: x.masked_fill(x > 1, 0)),
    ],
)
def test_waits(waits, work):
    with pretended_gpu() as gpu:
        x = torch.arange(1, 4).to("cuda")
        assert isinstance(x, PretendedTensor)
        assert x.is_cuda
        with gpu.fresh() as counts:
            work(x)
    assert counts.num_waits == waits


def test_launches():
    with pretended_gpu() as gpu:
        x = torch.ones(4, 4).to("cuda")
        with gpu.fresh() as counts:
            (x[1:].T + 1).mul_(2)[0].view(3)
    assert dict(counts.launches) == {"add": 1, "mul": 1}
    assert not torch.cuda.is_initialized()
