"""Chats, batches, streams and files over caches whose heads hold different numbers of entries, on the bundled model."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mminfer import V2PE, AIMMerge, AIMPrune, Engine, InferenceConfig, InputError, LookM, Replay, nano
from mminfer.chat_files.chat_file import CHAT, CHECKSUM, checksum
from mminfer.inspection import inspect_chat, page_html
from mminfer.inspection.words import sentences
from tests.by_head import ByLot

CONTENT = nano.sample_messages()[0]["content"]
QUESTION = "Which image shows a blue 1?"
CONFIGS = {
    "plain": InferenceConfig(cache=ByLot(0.9)),
    "weighed": InferenceConfig(cache=ByLot(0.9, weighed=True)),
    "all of it": InferenceConfig(V2PE(1 / 4), AIMMerge(0.5), AIMPrune(3, 5), cache=ByLot(0.9, weighed=True)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def engine(request):
    plain = Engine.from_pretrained("nano")
    return Engine(plain.model, plain.processor, CONFIGS[request.param])


def asked(chat, **kwargs):
    return chat.send(QUESTION, 6, output_logits=True, **kwargs)


def assert_same(one, other):
    assert one.token_ids == other.token_ids
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-4)


def test_turns_forks_and_files(engine, tmp_path):
    chat = engine.chat()
    chat.read(CONTENT[:4])
    asked(chat)
    chat.read(CONTENT[4:6])
    assert chat.cache.is_packed
    lengths = chat.cache.head_lengths
    fork = chat.fork()
    chat.save(tmp_path / "chat")
    loaded = engine.load_chat(tmp_path / "chat")
    assert loaded.cache.head_lengths == fork.cache.head_lengths == lengths
    assert loaded.cache.nbytes == chat.cache.nbytes
    want = asked(chat)
    assert chat.cache.head_lengths != lengths and fork.cache.head_lengths == lengths
    for other in (fork, loaded):
        assert_same(asked(other), want)
    assert_same(asked(fork), asked(chat))


def tensors_in(thing):
    """All tensors that an object holds, but for those of the cache that a layer belongs to."""
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        return [x for name, part in thing.items() if name != "cache" for x in tensors_in(part)]
    parts = thing if isinstance(thing, list | tuple) else [vars(thing)] if hasattr(thing, "__dict__") else []
    return [x for part in parts for x in tensors_in(part)]


@pytest.mark.parametrize("technique", [Replay(0.2), Replay(0.5), LookM(0.5), None])
def test_a_chat_at_rest_takes_what_its_entries_need(technique, tmp_path):
    """Within 3 %, whatever happened to it, and whatever room the answer was given."""
    plain = Engine.from_pretrained("nano")
    engine = Engine(plain.model, plain.processor, InferenceConfig(cache=technique))
    chat = engine.chat()

    def check(chat):
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(chat.cache.layers)}
        of_columns = sum(
            x.numel() * x.element_size()
            for layer in chat.cache.layers for x in layer.row(0).columns.values() if x is not None
        )  # fmt: skip
        assert of_columns <= chat.cache.allocated_bytes <= sum(storages.values()) <= 1.03 * of_columns
        assert chat.cache.allocated_bytes <= 1.03 * chat.cache.nbytes or isinstance(technique, LookM)

    chat.read(CONTENT[:-1])
    check(chat)
    output = chat.send(QUESTION, 100)
    check(chat)
    assert output.stats.allocated_bytes > 1.05 * chat.cache.allocated_bytes
    check(chat.fork())
    chat.save(tmp_path / "chat")
    check(engine.load_chat(tmp_path / "chat"))


def test_chunks_and_streams(engine):
    at_once, streamed = (engine.chat(prefill_chunk_size=100) for _ in range(2))
    at_once.read(CONTENT[:-1])
    streamed.read(iter(CONTENT[:-1]))
    assert streamed.cache.head_lengths == at_once.cache.head_lengths
    assert_same(asked(streamed), asked(at_once))
    question = [{"role": "user", "content": CONTENT}]
    assert "".join(engine.stream(question, 6)) == engine.generate(question, 6).text


def test_a_batch_whose_rows_end_one_by_one(engine):
    chats = [[{"role": "user", "content": [*CONTENT[:n], {"type": "text", "text": QUESTION}]}] for n in (6, 2, 4)]
    settings = {"max_new_tokens": 40, "output_logits": True}
    together = engine.generate(chats, **settings)
    for chat, output in zip(chats, together, strict=True):
        alone = engine.generate(chat, **settings)
        assert_same(output, alone)
        for name in ("head_entries", "layer_entries", "layer_cache_bytes", "cache_bytes", "prompt_flops"):
            assert getattr(output.stats, name) == getattr(alone.stats, name)
    stats = together[0].stats
    assert len({len(output.token_ids) for output in together}) > 1 or len(together[0].token_ids) == 40
    per_entry = 2 * 32 * 4 + 4 * engine.config.cache.weighed
    assert stats.layer_cache_bytes == tuple(sum(lengths) * per_entry for lengths in stats.head_entries)
    assert stats.cache_bytes == sum(stats.layer_cache_bytes) < stats.full_cache_bytes
    assert stats.layer_entries == tuple(int(sum(lengths) / len(lengths) + 0.5) for lengths in stats.head_entries)


def test_it_is_inspected_by_head(engine):
    found = inspect_chat(engine, nano.sample_messages(), 2)
    assert (found.tokens.held.sum(1) == [sum(layer.head_entries) for layer in found.layers]).all()
    assert sum(layer.cache_bytes for layer in found.layers) == found.stats.cache_bytes
    page = page_html(found, "by head")
    assert f"heads: {', '.join(str(n) for n in found.layers[0].head_entries)}" in page
    assert "of the cache entries stayed" in "".join(sentences(found))


def changed(path, tmp_path, facts=None, tensors=None):
    """The same file with other facts or tensors, and the checksum of these."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        told, held = json.loads(file.metadata()[CHAT]), {name: file.get_tensor(name) for name in names}
    if facts is not None:
        facts(told["cache"])
    if tensors is not None:
        tensors(held)
    text = json.dumps(told)
    save_file(held, tmp_path / "changed", {CHAT: text, CHECKSUM: checksum(text, held)})
    return tmp_path / "changed"


def widened(tensors):
    scores = {name: x for name, x in tensors.items() if name.endswith("score")}
    assert {x.dtype for x in scores.values()} == {torch.bfloat16}
    tensors |= {name: x.float() for name, x in scores.items()}


def longer(lengths):
    lengths[0][0][0] += 1


def moved(lengths):
    lengths[1][0][0] -= 1
    lengths[1][0][1] += 1000


def negative(lengths):
    lengths[1][0][1] += lengths[1][0][0] + 1
    lengths[1][0][0] = -1


def test_files_whose_heads_do_not_add_up_are_refused(engine, tmp_path):
    chat = engine.chat()
    chat.read(CONTENT[:3])
    chat.save(tmp_path / "chat")
    for change in (
        longer, moved, negative, lambda x: x.pop(), lambda x: x[0].append(None), lambda x: x[0][0].append(0),
        lambda x: x.__setitem__(0, None), lambda x: x[0].__setitem__(0, None), lambda x: x[0][0].__setitem__(0, 1.0),
        lambda x: x[0].__setitem__(0, [0, 0]),
    ):  # fmt: skip
        path = changed(tmp_path / "chat", tmp_path, lambda cache, change=change: change(cache["head_lengths"]))
        with pytest.raises(InputError, match="cannot be: found"):
            engine.load_chat(path)
    for name, value in (("0.0.log_mass", float("nan")), ("0.0.keys", float("inf"))):

        def spoil(held, name=name, value=value):
            like = held["0.0.keys"][..., 0].clone()
            held.setdefault(name, like)
            held[name].view(-1)[0] = value

        with pytest.raises(InputError, match="out of range"):
            engine.load_chat(changed(tmp_path / "chat", tmp_path, tensors=spoil))


def test_files_by_head_do_not_fit_where_heads_are_alike(engine, tmp_path):
    chat = engine.chat()
    chat.read(CONTENT[:3])
    chat.save(tmp_path / "chat")
    other = Engine(engine.model, engine.processor, InferenceConfig(cache=LookM()))
    with pytest.raises(InputError, match="its config is"):
        other.load_chat(tmp_path / "chat")
    own = other.chat()
    own.read(CONTENT[:3])
    own.save(tmp_path / "other")

    def claim(cache):
        cache["head_lengths"][0] = [[50, 60]]

    with pytest.raises(InputError, match="head_lengths cannot be"):
        other.load_chat(changed(tmp_path / "other", tmp_path, claim))


def test_half_precision_chats_hold_scores_in_two_bytes(tmp_path):
    """Copied, saved and loaded so; a file whose scores take four is taken as well."""
    engine = Engine.from_pretrained("nano", config=InferenceConfig(cache=Replay(0.4)), dtype="bfloat16")
    chat = engine.chat()
    chat.read(CONTENT[:2])
    chat.save(tmp_path / "chat")
    wide = changed(tmp_path / "chat", tmp_path, tensors=widened)
    chats = [chat.fork(), engine.load_chat(tmp_path / "chat"), engine.load_chat(wide)]
    for other in (chat, *chats):
        other.read(CONTENT[2:4])
        assert {layer.buffers["score"].dtype for layer in other.cache.layers} == {torch.bfloat16}
        assert other.cache.head_lengths == chat.cache.head_lengths
    for other in chats:
        assert_same(asked(other), asked(chat.fork()))
