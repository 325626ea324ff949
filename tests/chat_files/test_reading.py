"""A saved chat goes on where it was made, and nowhere else; a file that anything happened to is refused."""

import copy
import json
import os
import threading

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import save_file
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from mminfer import Engine, InputError, nano
from mminfer.chat_files.chat_file import CHAT, CHECKSUM
from mminfer.chat_files.digests import SAMPLED_BYTES, template_digest, tokenizer_digest, weights_digest
from tests.chat_files.fuzzing import CONFIGS


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano", CONFIGS["lookm"])


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    """A chat's file, and the engine that wrote it."""
    chat = engine.chat()
    chat.read(nano.sample_messages()[0]["content"][:4])
    path = tmp_path_factory.mktemp("chats") / "chat"
    chat.save(path)
    return path


def test_any_flipped_bit_is_seen(engine, saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "chat"
    for place in (*range(0, len(content), len(content) // 40), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 0x40
        path.write_bytes(changed)
        with pytest.raises(InputError, match="no saved chat"):
            engine.load_chat(path)


def test_a_file_cut_or_gone_on_with_is_refused(engine, saved, tmp_path):
    content, path = saved.read_bytes(), tmp_path / "chat"
    for changed in (b"", content[:7], content[:200], content[:-1], content + b"\0", b"\xff" * 8 + content[8:]):
        path.write_bytes(changed)
        with pytest.raises(InputError, match="no saved chat"):
            engine.load_chat(path)


def test_files_of_earlier_formats_are_refused_by_name(engine, tmp_path):
    facts = {"format": 4, "model": engine.fingerprint, "config": engine.config.to_dict()}
    save_file({"decode_position": torch.zeros(0)}, tmp_path / "chat", {CHAT: json.dumps(facts)})
    with pytest.raises(InputError, match=r"its format is 4, this version's 5: .*read their content once more"):
        engine.load_chat(tmp_path / "chat")


def test_deep_facts_are_refused(engine, tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "chat", {CHAT: "[" * 100_000, CHECKSUM: ""})
    with pytest.raises(InputError, match="no saved chat"):
        engine.load_chat(tmp_path / "chat")


@pytest.mark.skipif(os.name != "posix", reason="pipes and links of POSIX")
def test_regular_files_alone_are_opened(engine, saved, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero"):
        found = []
        loading = threading.Thread(target=_refuse, args=(engine, path, found), daemon=True)
        loading.start()
        loading.join(60)
        assert found and "regular file" in found[0]
    (tmp_path / "link").symlink_to(saved)
    assert engine.load_chat(tmp_path / "link").cache.tokens


def _refuse(engine, path, found):
    try:
        engine.load_chat(path)
    except InputError as error:
        found.append(str(error))


@pytest.mark.parametrize("path", [None, 3, b"chat", "", "a\0b"])
def test_wrong_paths_are_named(engine, path):
    for act in (engine.load_chat, engine.chat().save):
        with pytest.raises(InputError, match="wanted the path of a file"):
            act(path)


@pytest.mark.parametrize("name", ["lm_head.weight", "layers.3.mlp.up_proj.weight", "layers.5.input_layernorm.weight"])
def test_other_weights_of_the_same_shape_are_told_apart(engine, saved, name):
    """As those of an adapter merged into one layer."""
    (weight,) = (
        weight for full, weight in engine.model.named_parameters(remove_duplicate=False) if full.endswith(name)
    )
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.add_(1e-3)
        with pytest.raises(InputError, match=r"its weights is .*: load it with the checkpoint that made it"):
            engine.load_chat(saved)
    finally:
        weight.data.copy_(kept)
    assert engine.load_chat(saved).cache.tokens


def test_another_tokenizer_or_template_is_told_apart(engine, saved):
    processor = copy.deepcopy(engine.processor)
    assert tokenizer_digest(processor.tokenizer) == tokenizer_digest(engine.processor.tokenizer)
    assert template_digest(processor) == template_digest(engine.processor)
    processor.tokenizer.add_tokens(["<|new|>"])
    with pytest.raises(InputError, match="its tokenizer is"):
        Engine(engine.model, processor, engine.config).load_chat(saved)
    processor = copy.deepcopy(engine.processor)
    processor.chat_template += "{# another #}"
    with pytest.raises(InputError, match="its template is"):
        Engine(engine.model, processor, engine.config).load_chat(saved)


def test_other_rotary_settings_are_told_apart(engine, saved):
    text = engine.model.config.get_text_config()
    rope = dict(text.rope_parameters)
    try:
        text.rope_parameters["rope_theta"] *= 2
        with pytest.raises(InputError, match="its model_settings is"):
            engine.load_chat(saved)
    finally:
        text.rope_parameters.update(rope)


def test_a_failed_load_leaves_the_chat_as_it_was(engine, saved, tmp_path):
    chat = engine.load_chat(saved)
    before = (chat.cache, chat._transcript)
    (tmp_path / "chat").write_bytes(saved.read_bytes()[:-4])
    with pytest.raises(InputError):
        chat.restore(tmp_path / "chat")
    assert (chat.cache, chat._transcript) == before


def test_an_empty_chat_goes_through_its_file(engine, tmp_path):
    engine.chat(system="Be brief.").save(tmp_path / "chat")
    assert (
        engine.load_chat(tmp_path / "chat").send("Hi", 1).token_ids
        == engine.chat(system="Be brief.").send("Hi", 1).token_ids
    )


class _Two(nn.Module):
    """A layer whose weight is sampled, and one whose weight is small."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.big = nn.Linear(1024, SAMPLED_BYTES // 2048, bias=False, dtype=dtype)
        self.small = nn.Linear(3, 3, dtype=dtype)
        self.register_buffer("scratch", torch.rand(3), persistent=False)


def test_weights_have_one_digest_wherever_they_are():
    plain, offloaded, wrapped = _Two(), _Two(), nn.Module()
    found = weights_digest(plain)
    cpu_offload(offloaded, execution_device="cpu")
    assert offloaded.big.weight.is_meta and weights_digest(offloaded) == found
    wrapped._orig_mod = plain  # as torch.compile has it
    assert weights_digest(wrapped) == found
    plain.scratch.zero_()
    plain.big.weight.data = plain.big.weight.data.t().contiguous().t()
    assert weights_digest(plain) == found
    assert weights_digest(_Two(torch.bfloat16)) != found


@pytest.mark.parametrize("change", ["first", "last", "all"])
def test_a_digest_reaches_from_the_first_to_the_last_weight(change):
    plain = _Two()
    found, flat = weights_digest(plain), plain.big.weight.data.view(-1)
    flat[{"first": slice(0, 1), "last": slice(-1, None), "all": slice(None)}[change]] += 1
    assert weights_digest(plain) != found


def test_weights_made_of_others_and_such_as_cannot_be_read_have_a_digest():
    """Plain tensors within a subclass count; what has no bytes here counts by its shape."""
    model, found = _Two(), []
    for packed in (
        TwoTensor(torch.zeros(3), torch.zeros(3)),
        TwoTensor(torch.zeros(3), torch.ones(3)),
        torch.eye(3).to_sparse(),
    ):
        model.small._buffers["packed"] = packed
        found += [weights_digest(model), weights_digest(model)]
    found += [weights_digest(_Two().to("meta"))] * 2
    assert found[::2] == found[1::2] and len(set(found)) == 4
