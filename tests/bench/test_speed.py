"""Time and memory by stage: stages add up, work and cache are those of the passes, the model is left as it was."""

import time

import pytest

from mminfer import AIMMerge, InferenceConfig, LookM
from mminfer.bench.contexts import made_contexts
from mminfer.bench.speed import HOST, STAGES, _run, _vision_timed, measure

pytest.importorskip("sklearn")

SETTINGS = {
    "merged": InferenceConfig(merge=AIMMerge(0.25)),
    "off": InferenceConfig(),
    "small": InferenceConfig(cache=LookM(0.1, 0.1)),
}


def chats(count=1):
    return [c.chat(c.questions[0]) for c in made_contexts(3, count, 1, 0, None)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["nano_engine", "tiny_engine"])
def test_host_and_settings_side_by_side(engine, request):
    engine = request.getfixturevalue(engine)
    rows = {row.setting: row for row in measure(engine, SETTINGS, chats(2), 3, 2)}
    assert list(rows) == [HOST, *SETTINGS]
    for row in rows.values():
        assert row.batch == 2 and row.repeats == 2 and row.new_tokens == 3
        assert row.prompt_tokens == rows[HOST].prompt_tokens
        assert row.steady_bytes > 0 and row.peak_bytes > 0
        for stage in STAGES:
            assert 0 < row.times[f"{stage}_p20"] <= row.times[f"{stage}_p50"] <= row.times[f"{stage}_p80"]
        assert row.tokens_per_s == pytest.approx(2e3 / row.times["tpot_ms_p50"])
        assert row.ttft_speedup == pytest.approx(rows[HOST].times["ttft_ms_p50"] / row.times["ttft_ms_p50"])
    assert rows["off"].prompt_gflop == rows[HOST].prompt_gflop and rows["off"].cache_bytes == rows[HOST].cache_bytes
    assert rows["merged"].prompt_gflop < 0.6 * rows[HOST].prompt_gflop
    assert rows["small"].cache_bytes < 0.5 * rows[HOST].cache_bytes
    assert rows["small"].prompt_gflop > rows[HOST].prompt_gflop


def test_one_call_in_its_stages(nano_engine):
    run = _run(nano_engine, SETTINGS["off"], chats(), 4)
    assert run.ttft_ms == pytest.approx(run.prepare_ms + run.vision_ms + run.prompt_ms)
    assert len(run.token_ms) == 3 and min(run.vision_ms, run.prompt_ms, *run.token_ms) > 0
    assert run.record is not None and _run(nano_engine, None, chats(), 4).record is None


def test_encoders_that_call_each_other_are_timed_once(monkeypatch, nano_engine):
    base = nano_engine.adapter.base

    def images(*args, **kwargs):
        time.sleep(0.05)

    monkeypatch.setattr(base, "get_image_features", images, raising=False)
    monkeypatch.setattr(base, "get_video_features", lambda *args: base.get_image_features(*args), raising=False)
    begin = time.perf_counter()
    with _vision_timed(nano_engine) as span:
        base.get_video_features()
    assert 50 <= span.ms <= 1e3 * (time.perf_counter() - begin)
    assert vars(base)["get_image_features"] is images  # somebody's own is put back


def test_the_model_is_left_as_it_was(nano_engine):
    before = set(vars(nano_engine.adapter.base)), set(vars(nano_engine.model))
    with pytest.raises(ValueError, match="max_new_tokens"):
        _run(nano_engine, None, chats(), 0)
    assert (set(vars(nano_engine.adapter.base)), set(vars(nano_engine.model))) == before
