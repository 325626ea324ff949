"""Layers that are compressed together, as on a GPU, keep what each keeps by itself: by every door, pass and turn."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from mminfer import AIMPrune, Digest, InferenceConfig, LookM, OperatorSkip, patched
from mminfer.cache import digest_pieces
from mminfer.cache.h2o import H2O
from mminfer.cache.random_evict import RandomEvict
from mminfer.cache.snapkv import SnapKV
from mminfer.forward import layer_groups, prefill
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.forward.layer_attention import PassSettings
from mminfer.forward.layer_groups import MOST_BYTES, PART, most_together
from mminfer.inspection.recording import recording
from mminfer.models.registry import adapter_for
from mminfer.technique import CacheEntries, LayerView, fetched
from tests.tiny import IMAGE, LAYERS, tiny_inputs, tiny_model
from tests.views import layer_view

RAGGED = [[3, IMAGE, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], [4, IMAGE, 7]]
CACHES = {
    "pivot": LookM(0.2, 0.1),
    "average, a budget": LookM(budget=20, merge="average"),
    "weighted, no text first": LookM(0.3, 0.1, merge="weighted", text_prior=False),
    "strided": LookM(0.2, 0.1, queries="strided", stride=3),
    "ratios by layer": LookM((0.2, 0.3, 1.0, 0.3), (0.1, 0.0, 0.0, 0.0)),
    "text over the budget": LookM(budget=9, text_overflow="keep"),
    "snapkv": SnapKV(0.2, 0.1, window=4),
    "h2o": H2O(0.2, 0.1),
    "random": RandomEvict(0.2, 0.1),
    "digest": Digest(0.3),
    "digest, dropping": Digest(0.3, join=False, spread="even"),
}
pytestmark = pytest.mark.filterwarnings("ignore:LookM")


@pytest.fixture
def together(monkeypatch):
    """A function that has so many layers compressed together from then on, as on a GPU."""

    def set_to(most):
        monkeypatch.setattr(prefill, "most_together", lambda device, depth: most)
        monkeypatch.setattr(digest_pieces, "AT_ONCE_ON", {"cpu"})

    return set_to


def held(cache):
    """All that a cache holds: of each layer and sequence its columns, and what was counted."""
    layers = [[layer.row(b).columns for b in range(layer.batch_size)] for layer in cache.layers]
    return layers, cache.head_lengths, cache.tokens, [layer.tokens_seen for layer in cache.layers]


def read(config, prompts, chunk=None):
    """What the cache holds behind each prompt, one behind the other, the last logits, and what was recorded."""
    model, cache, found = tiny_model("qwen2_vl"), None, []
    with patched(model, config, prefill_chunk_size=chunk) as handle:
        for prompt in prompts:
            inputs = tiny_inputs("qwen2_vl", prompt)
            if cache is not None:
                inputs.pop("attention_mask")
            out = model(**inputs, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
            cache = out[CACHE_NAME]
            found.append(held(cache))
        return found, out.logits, handle.records


@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
@pytest.mark.parametrize(
    ("prompts", "chunk"),
    [([RAGGED], None), ([RAGGED], 24), ([[[3, IMAGE, IMAGE, 4]], [[5, IMAGE]], [[6]]], None)],
    ids=["ragged", "chunks", "turns"],
)
def test_layers_together_keep_what_each_keeps(together, cache, prompts, chunk):
    config = InferenceConfig(cache=cache)
    wanted, logits, records = read(config, prompts, chunk)
    together(3)  # of four layers: a whole group, and the rest
    found, found_logits, found_records = read(config, prompts, chunk)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
    assert found_records == records


@pytest.mark.parametrize("cache", [CACHES["pivot"], CACHES["snapkv"], CACHES["digest"]], ids=repr)
@pytest.mark.parametrize("others", [{"prune": AIMPrune(1, 3)}, {"skip": OperatorSkip(attention=[1, 2])}], ids=repr)
def test_beside_rows_that_leave_and_queries_that_are_not_asked(together, cache, others):
    config = InferenceConfig(cache=cache, **others)
    wanted, logits, records = read(config, [RAGGED])
    together(LAYERS)
    found, found_logits, found_records = read(config, [RAGGED])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
    assert found_records == records


@dataclass(frozen=True)
class Own(LookM, register=False):
    """Somebody's, which knows of single layers alone."""

    seen: ClassVar[list[int]] = []

    def apply(self, view):
        assert view.keys.shape[0] == 1
        self.seen.append(view.layer_idx)
        return super().apply(view)


def test_a_technique_of_anybodys_is_asked_layer_by_layer(together):
    Own.seen.clear()
    together(LAYERS)
    read(InferenceConfig(cache=Own(0.2, 0.1)), [[[3, IMAGE, 4]]])
    assert Own.seen == list(range(LAYERS))


@pytest.mark.parametrize("cache", [CACHES["pivot"], CACHES["digest"]], ids=repr)
def test_a_failed_pass_leaves_the_cache_as_it_was(together, monkeypatch, cache):
    together(3)
    model, config = tiny_model("qwen2_vl"), InferenceConfig(cache=cache)
    first, second = (tiny_inputs("qwen2_vl", [prompt]) for prompt in ([3, IMAGE], [4, IMAGE, 2]))
    second.pop("attention_mask")
    with patched(model, config):
        kept = model(**first, use_cache=True)[CACHE_NAME]
        layers, before = kept.layers, held(kept)

        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(type(cache), "apply_layers", fail)
        with pytest.raises(KeyboardInterrupt):
            model(**second, **{CACHE_NAME: kept}, use_cache=True)
    assert kept.layers is layers
    torch.testing.assert_close(held(kept), before, rtol=0, atol=0)


@pytest.mark.parametrize(("most_bytes", "wanted"), [(MOST_BYTES, [3, 1]), (1, [1] * LAYERS)])
def test_few_layers_wait_and_few_bytes(together, monkeypatch, most_bytes, wanted):
    sizes, plain = [], LookM.apply_layers

    def counted(self, views):
        sizes.append(len(views))
        return plain(self, views)

    monkeypatch.setattr(LookM, "apply_layers", counted)
    monkeypatch.setattr(layer_groups, "MOST_BYTES", most_bytes)
    together(3)
    read(InferenceConfig(cache=LookM(0.2, 0.1)), [[[3, IMAGE, 4]]])
    assert sizes == wanted


def test_on_a_cpu_none_waits():
    assert most_together(torch.device("cpu"), 28) == 1
    assert most_together(torch.device("cuda", 0), 28) == 28 // PART
    assert most_together(torch.device("cuda", 0), 2) == 1


def test_layers_that_differ_or_lie_elsewhere_go_by_themselves(monkeypatch):
    """Of a model over several devices each has the layers that are there."""
    groups, plain = [], LayerView.stacked.__func__

    def noted(cls, views):
        groups.append(views)
        return plain(cls, views)

    monkeypatch.setattr(LayerView, "stacked", classmethod(noted))
    q, keys, flags = torch.randn(1, 4, 30, 8), torch.randn(1, 2, 30, 8), torch.arange(30) > 9
    entries = CacheEntries(keys, keys, flags.expand(1, 2, 30), torch.zeros(1, 2, 30))
    views = [layer_view(q, entries, is_visual=flags, layer_idx=n) for n in range(4)]
    apart = layer_view(q, entries.last(20), is_visual=flags, layer_idx=4, tokens_seen=30)
    packed = layer_view(q, entries.packed())
    assert packed.kind != layer_view(q, entries.packed()).kind
    there = layer_view(
        q.to("meta"), CacheEntries.of({n: x.to("meta") for n, x in entries.columns.items() if x is not None})
    )
    assert there.kind != layer_view(q, entries).kind
    kept = LookM(0.2, 0.1, queries="last", window=4).apply_layers([views[0], apart, *views[1:]])
    assert [[view.layer_idx for view in group] for group in groups] == [[0, 1, 2, 3], [4]]
    assert [len(own) for own in kept] == [13, 9, 13, 13, 13]  # the short one has no text


def test_numbers_are_fetched_together():
    assert fetched([]) == [] and fetched([None, 3, torch.tensor(2)]) == [None, 3, 2]
    found = fetched([torch.tensor(1.5), 0.0, torch.tensor(2.5)])
    assert found == [1.5, 0.0, 2.5] and isinstance(found[0], float)


@dataclass(frozen=True)
class WritingLookM(LookM, register=False):
    """Anybody's own, which may write into the columns that it is given."""


@pytest.mark.parametrize(("cache", "written"), [(LookM(), False), (WritingLookM(), True)])
def test_columns_for_anybodys_own_technique_can_be_written_into_also_while_it_is_recorded(cache, written):
    config, adapter = InferenceConfig(cache=cache), adapter_for(tiny_model("llava"))
    for own in (config, recording(config)[0]):
        column = PassSettings(adapter, own, (5,)).blank(torch.empty(1, 2, 5, 8, device="meta"), 1.0)
        assert column.is_contiguous() == written
