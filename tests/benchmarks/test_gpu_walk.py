"""No prompt pass and no decoding step asks more of a GPU than it does now: kernels launched, waits of the host.

The bounds are what was found, so that nothing gets worse; a change that lowers a number lowers its bound.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.gpu.pretended import PretendedTensor, pretended_gpu
from benchmarks.gpu.walk import VOCABULARY, narrow_model, on_pretended_gpu, replayed, walked
from benchmarks.models.geometries import video_prompt
from mminfer import AIMMerge, AIMPrune, Digest, InferenceConfig, LookM, RegionMerge, Replay, patched
from mminfer.cache.snapkv import SnapKV
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.layout import TokenLayout
from mminfer.technique import CacheEntries, PruneTechnique
from mminfer.tokens.downsample import Downsample
from tests.views import layer_view

HOST = 1150  # launches of the unpatched model's pass
# Launches and waits of a prompt pass, one of them at its end for the clock; launches and waits of a step.
# Of `replay-20` 1,118 are the layers' own when all rows go through them once more.
BOUNDS = {
    "host": (HOST, 1, 1142, 0),
    "off": (1145, 2, 1158, 0),
    "v2pe-16": (1137, 2, 1158, 0),
    "skip-ffn": (1181, 2, 1158, 0),
    "aim": (1319, 2, 1146, 0),
    "balanced": (1381, 2, 1148, 0),
    "random-prune": (1179, 2, 1151, 0),
    "regions": (1190, 3, 1158, 0),
    "lookm-20": (1478, 2, 1130, 0),
    "snapkv-20": (1454, 2, 1130, 0),
    "digest-20": (1592, 3, 1133, 0),
    "replay-20": (2855, 3, 1194, 0),
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


@dataclass(frozen=True)
class Doubled(AIMMerge, register=False):
    """Merges, then says by plain `replace` that tokens stand for twice as many and the first images are text."""

    def apply(self, inputs_embeds, layout):
        out, merged = super().apply(inputs_embeds, layout)
        return out, replace(merged, modality=merged.modality * (merged.image_id != 0))


@dataclass(frozen=True)
class Wrapped(PruneTechnique, register=False):
    """Has one of ours as `technique`, and drops text beside what that drops."""

    technique: AIMPrune

    def check(self, spec):
        self.technique.check(spec)

    def prunes(self, layer_idx, num_layers):
        return self.technique.prunes(layer_idx, num_layers)

    def apply(self, view):
        return self.technique.apply(view)[2:]


@pytest.mark.parametrize(
    "settings",
    [{"merge": Doubled(0.5)}, {"prune": Wrapped(AIMPrune(1, 4))}, {"merge": Doubled(0.5), "prune": AIMPrune(1, 3)}],
    ids=["columns replaced behind a merge", "a technique around one of ours", "both"],
)
def test_what_the_host_knows_of_rows_is_forgotten_where_it_may_be_so_no_longer(settings):
    """On a GPU counts of rows are known on the host: techniques of others change rows as they like."""
    config = InferenceConfig(**settings, cache=LookM(0.2, 0.1))
    kept = []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        model = narrow_model(5)
        with torch.no_grad(), ExitStack() as stack:
            if on_gpu:
                _, inputs = stack.enter_context(on_pretended_gpu(model, 2))
            else:
                inputs = video_prompt(model, 2, vocabulary=VOCABULARY - 2)
                features = inputs["mm_encoder_outputs"]["video"]
                features.pooler_output = features.pooler_output.to(model.dtype)
            stack.enter_context(patched(model, config, verify=False))
            kept.append(getattr(model(**inputs), CACHE_NAME).lengths)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("cache", [LookM(0.2, 0.1), SnapKV(0.2, 0.1, window=4), Digest(0.3, recent=3)], ids=repr)
def test_layers_on_several_devices_are_compressed_where_they_are(cache):
    """By turns on the CPU and on a GPU: nothing is moved, and every layer keeps what it keeps by itself."""
    flags, generator = torch.arange(60) % 20 > 5, torch.Generator().manual_seed(0)
    columns = {"is_visual": flags.expand(1, 2, 60), "score": torch.zeros(1, 2, 60), "size": torch.ones(1, 2, 60)}
    columns = {name: columns[name] for name in cache.columns}
    q = torch.randn(4, 1, 4, 60, 8, generator=generator)
    rows = torch.randn(4, 2, 1, 2, 60, 8, generator=generator)
    plain = [
        layer_view(queries, CacheEntries(*own, **columns), is_visual=flags, layer_idx=n)
        for n, (queries, own) in enumerate(zip(q, rows, strict=True))
    ]
    wanted = cache.apply_layers([cache.held(view) for view in plain])
    with pretended_gpu():
        views = [there(view) if n % 2 else view for n, view in enumerate(plain)]
        found = cache.apply_layers([cache.held(view) for view in views])
    for n, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for name, column in ours.columns.items():
            if column is not None:
                assert isinstance(column, PretendedTensor) == bool(n % 2)
                torch.testing.assert_close(column.held if n % 2 else column, theirs.columns[name], rtol=1e-4, atol=1e-5)


def there(view):
    """The view, all of it on the GPU."""
    columns = {name: None if x is None else x.to("cuda") for name, x in view.entries.columns.items()}
    own = {"queries": view.queries.to("cuda"), "is_visual": view.is_visual.to("cuda")}
    return replace(view, entries=CacheEntries.of(columns), **own)


@pytest.mark.parametrize("prune", [None, AIMPrune(1, 3)], ids=["all rows", "rows leave"])
def test_what_is_replayed_together_is_what_is_replayed_one_by_one(prune):
    """On a GPU all stretches of a sequence look in one call; what entries write is told once all layers are through."""
    config, held = InferenceConfig(prune=prune, cache=Replay(0.3, stretch=256)), []
    for on_gpu in (False, True):
        torch.manual_seed(0)
        model = narrow_model(3).float()
        with torch.no_grad(), ExitStack() as stack:
            if on_gpu:
                _, inputs = stack.enter_context(on_pretended_gpu(model, 2))
            else:
                inputs = video_prompt(model, 2, vocabulary=VOCABULARY - 2)
            stack.enter_context(patched(model, config, verify=False))
            layers = getattr(model(**inputs), CACHE_NAME).layers
            held.append([(x.head_lengths, {n: getattr(b, "held", b) for n, b in x.buffers.items()}) for x in layers])
    for (lengths, here), (theirs, there) in zip(*held, strict=True):
        assert lengths == theirs
        for name in ("keys", "values", "is_visual", "score", "log_mass"):
            torch.testing.assert_close(here[name], there[name], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("merge", [RegionMerge(), RegionMerge(None, None, 0.2), Downsample(0.25)], ids=repr)
def test_merging_by_places_knows_on_the_host_what_is_left(merge):
    count, generator = 2 + 64 + 3, torch.Generator().manual_seed(0)
    rows = torch.arange(count)
    is_visual = (rows >= 2) & (rows < 66)
    owner = is_visual.long() - 1
    layout = TokenLayout(
        rows * 0, is_visual.to(torch.int8), owner, rows * 0 + 1.0, rows, rows[None] * 1.0, torch.ones(1)
    )
    x = torch.randn(count, 8, generator=generator)
    x[2:34] = x[2]  # the upper half is blank
    wanted, left = merge.apply(x, layout)
    assert len(left) < count - 20
    with pretended_gpu() as gpu:
        x, there = x.to("cuda"), layout.to(torch.device("cuda"))
        with gpu.fresh():
            found, merged = merge.apply(x, there)
        with gpu.fresh() as counts:
            assert merged.known.lengths == left.lengths and merged.visual_lengths == left.visual_lengths
        assert counts.num_waits == 0
        torch.testing.assert_close(found.held, wanted)
        for name in ("sequence", "modality", "image_id", "size", "source", "position"):
            assert torch.equal(getattr(merged, name).held, getattr(left, name))
            assert torch.equal(getattr(merged.host, name), getattr(left, name))


def test_layouts_forget_what_was_known_of_other_columns():
    with pretended_gpu():
        text = torch.zeros(4, dtype=torch.int64)
        made = TokenLayout(text, text.to(torch.int8), text - 1, text + 1.0, text, text[None].double(), torch.ones(1))
        there = made.to(torch.device("cuda"))
        assert there.known is not None and there.on_host.sequence is made.sequence
        narrowed = there.select(torch.tensor([0, 2]))
        assert narrowed.host is not None and narrowed.known.lengths == (2,)
        other = replace(there, modality=there.modality + 1)
        assert other.host is None and other.known is None and other.visual_lengths == (4,)
        assert other.select(torch.tensor([1]).to("cuda")).modality.tolist() == [1] and other.visual_lengths == (4,)
        assert replace(there, run_before=torch.ones(1)).host is there.host
        placed = there.at(there.position + 1, there.next_position)
        assert placed.host is None and placed.known.visual_lengths == (0,)
        assert replace(placed, sequence=placed.sequence.clone()).known is None
