"""What is kept on disk: found again by another server, whole or not at all, bounded, never trusted."""

import os
import time

import openai
import pytest

from mminfer import Engine, InferenceConfig
from mminfer.chat_files import ChatIdentity
from mminfer.errors import InputError
from mminfer.scheduling import Limits
from mminfer.serving.disk import DiskStore
from mminfer.serving.limits import ServerSettings
from mminfer.serving.prefixes import Known, PromptFacts
from tests.serving.test_server import PRESETS, SMALL, ask, openai_messages, serving, value

KEYS = [bytes([n]) * 32 for n in range(4)]


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture(scope="module")
def known(engine):
    chat = engine.chat()
    chat.read("Some words to keep.")
    return Known(chat.cache, chat._transcript, PromptFacts(0, 5, 4, 3))


def identity(engine, config=None):
    return ChatIdentity(engine.adapter, engine.processor, config or engine.config)


def filled(folder, engine, known, most_bytes=2**30, keys=KEYS[:1]):
    store = DiskStore(folder, most_bytes)
    for key in keys:
        store.put(key, known, identity(engine))
    store.close()
    return store


def test_another_server_finds_what_one_left(engine, known, tmp_path):
    filled(tmp_path, engine, known)
    found = DiskStore(tmp_path, 2**30).get(KEYS[0], identity(engine), engine.device)
    assert found.transcript == known.transcript and found.facts == known.facts
    assert found.cache.lengths == known.cache.lengths and found.cache.nbytes == known.cache.nbytes


def test_bytes_are_bounded_and_the_least_used_goes_first(engine, known, tmp_path):
    one = filled(tmp_path / "one", engine, known).nbytes
    store = DiskStore(tmp_path / "two", 2 * one)
    for key in KEYS[:2]:
        store.put(key, known, identity(engine))
    while len(store) < 2:
        time.sleep(0.01)
    assert store.get(KEYS[0], identity(engine), engine.device) is not None
    store.put(KEYS[2], known, identity(engine))
    store.close()
    assert [key in store for key in KEYS] == [True, False, True, False] and store.nbytes == 2 * one
    assert len(list((tmp_path / "two").iterdir())) == 2
    assert len(DiskStore(tmp_path / "two", one)) == 1


@pytest.mark.parametrize("damage", ["cut short", "other bytes", "empty", "another engine"])
def test_what_is_damaged_or_anothers_is_taken_away(engine, known, tmp_path, damage):
    """A process that is killed in the middle of a write leaves a file without a name, or one like these."""
    store = filled(tmp_path, engine, known, keys=KEYS[:2])
    (path,) = tmp_path.glob(f"{KEYS[0].hex()}*")
    content = path.read_bytes()
    changed = {"cut short": content[:-9], "other bytes": content[:-9] + b"\1" * 9, "empty": b""}
    path.write_bytes(changed.get(damage, content))
    other = InferenceConfig.from_preset("replay-20") if damage == "another engine" else None
    store = DiskStore(tmp_path, 2**30)
    assert store.get(KEYS[0], identity(engine, other), engine.device) is None
    assert KEYS[0] not in store and not path.exists()
    assert store.get(KEYS[1], identity(engine), engine.device) is not None


def test_what_stands_under_the_name_of_another_content_is_not_taken_for_it(engine, known, tmp_path):
    """Two pictures of one size have the same tokens: nothing but the file itself can tell them apart."""
    filled(tmp_path, engine, known, keys=KEYS[:2])
    first, second = sorted(tmp_path.iterdir())
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    store = DiskStore(tmp_path, 2**30)
    assert [store.get(key, identity(engine), engine.device) for key in KEYS[:2]] == [None, None]
    assert list(tmp_path.iterdir()) == []


def test_pictures_of_another_image_processor_are_not_taken(engine, known, tmp_path, monkeypatch):
    filled(tmp_path, engine, known)
    monkeypatch.setattr(engine.processor.image_processor, "image_mean", [0.5, 0.5, 0.5])
    assert DiskStore(tmp_path, 2**30).get(KEYS[0], identity(engine), engine.device) is None


def test_a_folder_is_looked_at_and_nothing_else_in_it_is_touched(tmp_path):
    (tmp_path / f".{'a' * 16}.tmp").write_bytes(b"left behind")
    (tmp_path / "notes.txt").write_text("mine")
    os.symlink(tmp_path / "notes.txt", tmp_path / f"{'0' * 64}-1-1-1.safetensors")
    assert len(DiskStore(tmp_path, 2**20)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{'0' * 64}-1-1-1.safetensors", "notes.txt"]
    with pytest.raises(InputError, match="wanted a folder"):
        DiskStore(tmp_path / "notes.txt", 2**20)


def test_a_server_begins_with_what_is_on_disk(engine, tmp_path):
    answers = []
    for _ in range(2):
        server = ServerSettings("nano", PRESETS, SMALL)
        with serving(engine, server, Limits(chunk_size=256), disk=DiskStore(tmp_path, 2**30)) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            answers.append(ask(client, openai_messages(), extra_body={"mminfer": {"preset": "replay-20"}}))
            assert value(address, "mminfer_store_entries") > 0
    first, again = answers
    assert first.choices[0].message.content == again.choices[0].message.content
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens > 0.9 * again.usage.prompt_tokens
    assert first.usage.mminfer["visual_tokens"] == again.usage.mminfer["visual_tokens"] == 512
