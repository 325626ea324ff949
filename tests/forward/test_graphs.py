"""Decoding steps as CUDA graphs, under a stand-in that replays the very ops of one step on the very tensors it had."""

import copy
import gc
import logging

import pytest
import torch
from mminfer_kernels import record_backends
from torch import nn

from benchmarks.gpu.pretended_graphs import RecordedGraph, pretended_graphs
from mminfer import V2PE, AIMPrune, Engine, InferenceConfig, LookM, Replay, nano, patched
from mminfer.forward import cuda_graph, graphed
from mminfer.forward.decode import Decoder
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.forward.room import HEADROOM
from mminfer.models.registry import adapter_for
from tests.by_head import ByLot
from tests.tiny import IMAGE, MARKED_FAMILIES, fitting, tiny_inputs, tiny_model

BATCH = [[3, IMAGE, 5, IMAGE, 4], [2, IMAGE, 9], [6]]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
OFF = InferenceConfig()
CONFIGS = {
    "off": OFF,
    "compressed": InferenceConfig(V2PE(1 / 4), prune=AIMPrune(1, 3), cache=LookM(0.3, 0.1)),
    "packed": InferenceConfig(cache=ByLot(weighed=True)),
}
QUESTION = "Which image shows a blue 1?"
pytestmark = pytest.mark.filterwarnings("ignore:V2PE")


@pytest.fixture(autouse=True)
def _no_verdicts():
    """What one test finds of a model is not for the next one."""
    yield
    graphed._verdicts.clear()


@pytest.fixture(scope="module")
def plain():
    return Engine.from_pretrained("nano")


def run(model, inputs, config=OFF, **kwargs):
    """The output of `generate`, and what ran the last step."""
    with patched(model, config, verify=False), record_backends() as backends:
        out = model.generate(**inputs, **GREEDY | kwargs)
    return out, backends.get("decode_step")


def recorded(*args, **kwargs):
    """The same where steps are recorded, and how many graphs were made."""
    with pretended_graphs() as graphs:
        return *run(*args, **kwargs), graphs.made


def assert_same(ours, want):
    assert torch.equal(ours.sequences, want.sequences)
    for a, b in zip(ours.logits, want.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def assert_same_answer(ours, want):
    assert ours.token_ids == want.token_ids
    torch.testing.assert_close(ours.logits, want.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", MARKED_FAMILIES)
def test_replayed_steps_are_the_steps(family, config):
    """Rows of different lengths; layers, heads and kinds of layers that differ."""
    model, inputs, config = tiny_model(family), tiny_inputs(family, BATCH), fitting(family, CONFIGS[config])
    ours, ran, made = recorded(model, inputs, config)
    assert (ran, made) == ("cuda graph", 1)
    assert_same(ours, run(model, inputs, config)[0])


@pytest.mark.parametrize("config", ["off", "packed"])
def test_a_cache_that_grows_gets_one_more_graph(config):
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[5], [3]])
    longer = {"max_new_tokens": HEADROOM + 8, "min_new_tokens": HEADROOM + 8}
    ours, ran, made = recorded(model, inputs, CONFIGS[config], **longer)
    assert (ran, made) == ("cuda graph", 2 if config == "off" else 3)
    assert_same(ours, run(model, inputs, CONFIGS[config], **longer)[0])


@pytest.mark.parametrize("kwargs", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_samples(kwargs):
    """Beams move the cache from step to step, so that there is seldom something to record."""
    model, inputs, outs = tiny_model("qwen3_vl"), tiny_inputs("qwen3_vl", BATCH), []
    for way in (run, recorded):
        torch.manual_seed(3)
        outs.append(way(model, inputs, **{"output_logits": False} | kwargs)[0])
    assert torch.equal(outs[0].sequences, outs[1].sequences)


@pytest.mark.parametrize("config", [OFF, InferenceConfig(cache=Replay(0.5))], ids=["off", "replay"])
def test_rows_that_end_at_different_times(plain, config):
    """An ended row stays until half of the rows have ended, so that there are few graphs."""
    content = nano.sample_messages()[0]["content"]
    chats = [[*content[:n], {"type": "text", "text": QUESTION}] for n in (2, 4, 6, 8, 10)]
    engine = Engine(plain.model, plain.processor, config)
    told = {"max_new_tokens": 14, "output_logits": True, "do_sample": True, "temperature": 1e3}
    told["eos_token_id"] = list(range(1, plain.adapter.spec.vocab_size, 5))

    def answers():
        torch.manual_seed(1)
        return engine.generate(chats, **told)

    want = answers()
    assert len({len(one.token_ids) for one in want}) > 3
    with pretended_graphs() as graphs:
        ours = answers()
        assert 1 <= graphs.made <= 3
    for one, other in zip(ours, want, strict=True):
        assert_same_answer(one, other)


@pytest.mark.parametrize("config", [OFF, InferenceConfig(cache=Replay(0.5))], ids=["off", "replay"])
def test_chats_forks_and_chunks(plain, config):
    content, engine = nano.sample_messages()[0]["content"], Engine(plain.model, plain.processor, config)

    def answers():
        chat = engine.chat(output_logits=True, prefill_chunk_size=200, max_new_tokens=6, min_new_tokens=6)
        chat.read(content[:4])
        fork = chat.fork()
        found = [chat.send(QUESTION), fork.send([*content[4:6], {"type": "text", "text": QUESTION}])]
        return [*found, chat.send("And a red 2?"), chat.fork().send("And a red 2?")]

    want = answers()
    with pretended_graphs() as graphs:
        found = answers()
        assert graphs.made == len(found)
    assert {one.stats.backends["decode_step"] for one in found} == {"cuda graph"}
    for one, other in zip(found, want, strict=True):
        assert_same_answer(one, other)
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is RecordedGraph]


def test_steps_that_are_taken_back_and_caches_in_turn():
    model, inputs = tiny_model("llava"), tiny_inputs("llava", BATCH)
    ids = [torch.full((3, 1), token) for token in range(20, 28)]

    def logits(record):
        with patched(model, CONFIGS["packed"]) as handle:
            if not record:
                handle._decoder = Decoder(handle.adapter, handle.config, record=False)
            caches = [getattr(model(**inputs, use_cache=True), CACHE_NAME) for _ in range(graphed.MOST_GRAPHS + 1)]
            found = [model(input_ids=x, **{CACHE_NAME: cache}).logits for x in ids for cache in caches[:2]]
            restore = caches[0].snapshot()
            found += [model(input_ids=x, **{CACHE_NAME: caches[0]}).logits for x in ids[:3]]
            restore()
            found += [model(input_ids=x, **{CACHE_NAME: caches[0]}).logits for x in ids[3:]]
            found += [model(input_ids=x, **{CACHE_NAME: cache}).logits for cache in caches for x in ids[:3]]
            steps = handle._decoder._graphed
            assert steps is None or len(steps._caches) == graphed.MOST_GRAPHS
        return found

    with pretended_graphs() as graphs:
        found = logits(record=True)
        assert graphs.made >= graphed.MOST_GRAPHS
    for a, b in zip(found, logits(record=False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_weights_that_are_replaced_between_steps_are_seen():
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", BATCH)
    head, ids = model.lm_head, {"input_ids": torch.full((3, 1), 20)}
    with pretended_graphs(), patched(model, OFF):
        cache = getattr(model(**inputs, use_cache=True), CACHE_NAME)
        before = [model(**ids, **{CACHE_NAME: cache}).logits for _ in range(3)]
        restore = cache.snapshot()
        again = model(**ids, **{CACHE_NAME: cache}).logits
        restore()
        head.weight.data = -head.weight.data
        torch.testing.assert_close(model(**ids, **{CACHE_NAME: cache}).logits, -again)
    assert len(before) == 3


class Waiting(nn.Module):
    """An FFN that asks for a value on the host."""

    def __init__(self, ffn):
        super().__init__()
        self.ffn = ffn

    def forward(self, x):
        return self.ffn(x) * (1.0 if x.abs().max().item() >= 0 else 0.0)


def broken_begin(self, pool=None, capture_error_mode="global"):
    raise RuntimeError("no recording today\nat all")


def broken_end(self):
    whole_end(self)
    raise RuntimeError("no recording today\nat all")


whole_end, whole_replay = RecordedGraph.capture_end, RecordedGraph.replay


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (None, "_local_scalar_dense waits for the GPU"),
        ({"capture_begin": broken_begin}, "no recording today"),
        ({"capture_end": broken_end}, "no recording today"),
        ({"replay": lambda self: None}, "a step that was recorded gives other logits than the modules"),
    ],
)
def test_models_that_cannot_be_recorded(monkeypatch, caplog, broken, said):
    """They are told of once, and answer by their modules, this time and the next."""
    model, inputs = copy.deepcopy(tiny_model("llava")), tiny_inputs("llava", BATCH)
    layer = adapter_for(model).layers[1]
    if broken is None:
        layer.mlp = Waiting(layer.mlp)
    for name, function in (broken or {}).items():
        monkeypatch.setattr(RecordedGraph, name, function)
    want = model.generate(**inputs, **GREEDY)
    with pretended_graphs(), caplog.at_level(logging.WARNING, "mminfer"):
        for _ in range(2):
            with patched(model, OFF), record_backends() as backends:
                assert_same(model.generate(**inputs, **GREEDY), want)
            assert backends["decode_step"] in ("host", "native")
        assert RecordedGraph.recording is None and not torch.cuda.is_current_stream_capturing()
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == [
        f"mminfer: decoding goes on without CUDA graphs: {said}"
    ]
    monkeypatch.setattr(cuda_graph, "_failed", [])


def test_what_else_keeps_steps_from_being_recorded(monkeypatch):
    """Hooks, autocast, the environment, weights elsewhere, and a recording of somebody else's around the call."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava", [[6]])
    handle = adapter_for(model).layers[0].mlp.register_forward_hook(lambda *args: None)
    try:
        assert recorded(model, inputs)[1:] == ("host", 0)
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert recorded(model, inputs)[2] == 0
    with monkeypatch.context() as m:
        m.setenv(graphed.SWITCH, "0")
        assert recorded(model, inputs)[2] == 0
    with pretended_graphs() as graphs, monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        run(model, inputs)
        assert graphs.made == 0
    sharded = copy.deepcopy(model)
    sharded.lm_head.to("meta")
    with pretended_graphs():
        assert not graphed.GraphedSteps(adapter_for(sharded)).takes(torch.device("cpu"))
    assert recorded(model, inputs)[1:] == ("cuda graph", 1)
