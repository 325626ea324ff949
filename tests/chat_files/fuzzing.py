"""Files of saved chats that somebody or something changed: each loads as it was, or is refused by a typed error."""

import contextlib
import copy
import functools
import json
import tempfile
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from mminfer import Digest, Engine, InferenceConfig, InputError, LookM, MminferError, Replay, nano
from mminfer.chat_files.chat_file import CHAT, CHECKSUM, checksum
from mminfer.forward.storage import cache_facts, cache_tensors
from tests.by_head import ByLot

CONFIGS = {
    "off": InferenceConfig(),
    "lookm": InferenceConfig(cache=LookM(0.4, 0.2)),
    "digest": InferenceConfig(cache=Digest(0.5)),
    "replay": InferenceConfig(cache=Replay(0.5)),
    "by head": InferenceConfig(cache=ByLot(0.7, weighed=True)),
}
_ODD = [None, True, 0, 1, -1, 2**31, 2**70, 0.5, 1e308, float("inf"), float("nan"), "", "x", "\ud800", [], [[]], {}]
_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8]
_VALUES = [float("nan"), float("inf"), -1.0, 0.0, 1e30, 2.0**40]


@functools.cache
def _saved(name):
    """An engine, what a chat of it holds, and the bytes of its file."""
    engine = Engine.from_pretrained("nano", CONFIGS[name])
    chat = engine.chat(system="Be brief.")
    chat.read(nano.sample_messages()[0]["content"][:4])
    chat.send("Which code?", 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat"
        chat.save(path)
        return engine, _contents(chat), path.read_bytes()


def _contents(chat):
    return cache_tensors(chat.cache), cache_facts(chat.cache), chat._transcript.to_dict()


def _equal(one, other):
    tensors, others = one[0], other[0]
    same = tensors.keys() == others.keys() and one[1:] == other[1:]
    return same and all(torch.equal(x.nan_to_num(-7), others[name].nan_to_num(-7)) for name, x in tensors.items())


def fuzz_chat_file(data: st.DataObject) -> str:
    """Draws a chat, changes its file, and loads it.

    Args:
        data: what examples are drawn from.

    Returns:
        Whether it was "refused" or "loaded".

    Raises:
        AssertionError: the file loads, though its chat is another than the saved one under the old checksum; or the
            chat of a file whose checksum was computed anew ends in an error that is no `MminferError`.
    """
    engine, saved, content = _saved(data.draw(st.sampled_from(sorted(CONFIGS)), "config"))
    sealed = data.draw(st.booleans(), "with a checksum of its own")
    changed = (
        _resealed(data, content) if sealed else data.draw(st.sampled_from([_flipped, _cut, _header]))(data, content)
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat"
        path.write_bytes(changed)
        chat = engine.chat()
        try:
            chat.restore(path)
        except InputError:
            assert chat.cache.tokens == () and not chat._transcript.ids
            return "refused"
        if not sealed:
            assert _equal(_contents(chat), saved), "another chat under the old checksum"
            return "loaded"
        with contextlib.suppress(MminferError):
            chat.send("And now?", 1)
        return "loaded"


def _flipped(data, content):
    """With a few other bits."""
    out = bytearray(content)
    in_header = data.draw(st.booleans())
    last = int.from_bytes(content[:8], "little") + 8 if in_header else len(out)
    for _ in range(data.draw(st.integers(1, 3))):
        out[data.draw(st.integers(0, last - 1))] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(out)


def _cut(data, content):
    """Shorter, longer, or with a stretch from another place."""
    start, stop = sorted(data.draw(st.integers(0, len(content))) for _ in range(2))
    kind = data.draw(st.sampled_from(["begin", "end", "without", "longer", "moved"]))
    return {
        "begin": content[:stop],
        "end": content[start:],
        "without": content[:start] + content[stop:],
        "longer": content + content[start:stop],
        "moved": content[:start] + content[: stop - start] + content[stop:],
    }[kind]


def _header(data, content):
    """With another header over the same bytes, under the old checksum."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if data.draw(st.booleans()):
        facts = json.loads(header["__metadata__"][CHAT])
        change(data, facts)
        header["__metadata__"][CHAT] = json.dumps(facts)
    else:
        change(data, header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _resealed(data, content):
    """As somebody would write it who knows how the checksum is made."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "chat"
        path.write_bytes(content)
        with safe_open(path, "pt") as file:
            facts = json.loads(file.metadata()[CHAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for _ in range(data.draw(st.integers(1, 3))):
        if data.draw(st.booleans()):
            change(data, facts)
        else:
            _change_tensor(data, tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(tensors, {CHAT: json.dumps(facts), CHECKSUM: checksum(json.dumps(facts), tensors)})


def change(data, facts):
    """Changes one place of plain data."""
    at = facts
    while True:
        keys = sorted(at) if isinstance(at, dict) else range(len(at))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(at[key], (dict, list)) and at[key] and data.draw(st.integers(0, 3)):
            at = at[key]
            continue
        kind = data.draw(st.sampled_from(["odd", "gone", "near", "twice"]))
        if kind == "gone":
            del at[key]
        elif kind == "near" and type(at[key]) in (int, float):
            at[key] += data.draw(st.sampled_from([-1, 1, 0.5]))
        elif kind == "twice" and isinstance(at, list):
            at.insert(key, copy.deepcopy(at[key]))
        else:
            at[key] = copy.deepcopy(data.draw(st.sampled_from(_ODD)))  # a later change may reach into it
        return


def _change_tensor(data, tensors):
    """Retypes, reshapes, renames or overwrites one tensor."""
    if not tensors:
        return
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = data.draw(st.sampled_from(["dtype", "shape", "rows", "name", "gone", "value"]))
    if kind == "dtype":
        tensors[name] = tensor.to(data.draw(st.sampled_from(_DTYPES)))
    elif kind == "shape":
        tensors[name] = tensor.reshape(-1) if tensor.dim() > 1 else tensor[None]
    elif kind == "rows":
        tensors[name] = tensor[..., : data.draw(st.integers(0, tensor.shape[-1]))].clone()
    elif kind == "name":
        tensors[data.draw(st.sampled_from(["0.0.keys", "9.0.keys", "x", "0.1.keys"]))] = tensors.pop(name)
    elif kind == "gone":
        del tensors[name]
    elif tensor.numel():
        tensor = tensors[name] = tensor.clone()
        place = data.draw(st.integers(0, tensor.numel() - 1))
        value = data.draw(st.sampled_from(_VALUES))
        tensor.reshape(-1)[place] = value if tensor.is_floating_point() else (-1 if value != value else int(value > 0))
