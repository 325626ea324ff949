"""Reading and writing the file of a saved chat."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mminfer.chat_files.checks import FACTS, Shape, check_facts, check_shapes, check_values
from mminfer.chat_files.identity import FILE_FORMAT, ChatIdentity
from mminfer.chat_files.writing import checked_path, write_whole
from mminfer.errors import InputError
from mminfer.forward.kv_cache import CompressedCache
from mminfer.forward.storage import cache_facts, cache_tensors, restore_cache
from mminfer.inputs.transcript import Transcript

# Of the metadata in the header: what the chat is, and the checksum of that and of all tensors.
CHAT, CHECKSUM = "mminfer_chat", "sha256"
_DTYPES = {
    "BOOL": torch.bool,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def write_chat(
    path: Any, cache: CompressedCache, transcript: Transcript, identity: ChatIdentity, content: str = ""
) -> None:
    """Writes a chat to a safetensors file, whole or not at all. Pixels are not kept.

    Args:
        path: of the file.
        cache: what is held.
        transcript: of that.
        identity: of the engine.
        content: digest of what the chat was made of, where files are found by it.

    Raises:
        InputError: the file cannot be written; what was there is as it was.
    """
    path = checked_path(path)
    told = {"content": content} if content else {}
    facts = json.dumps({**identity.facts(), "cache": cache_facts(cache), **transcript.to_dict(), **told})
    tensors = {name: tensor.cpu().contiguous() for name, tensor in cache_tensors(cache).items()}
    try:
        write_whole(path, save(tensors, {CHAT: facts, CHECKSUM: checksum(facts, tensors)}))
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{path:.200}: could not be written ({error}): wanted a folder that is there, may be written and has room"
        ) from error


def read_chat(
    path: Any, identity: ChatIdentity, device: torch.device, content: str = ""
) -> tuple[CompressedCache, Transcript]:
    """Reads a chat from its file; nothing in the file is trusted before it was looked at.

    Args:
        path: of the file.
        identity: of the engine that goes on with it.
        device: where the cache goes.
        content: as it was written; a chat of other content is refused.

    Raises:
        InputError: there is no such file, it holds no chat or a damaged one, or another model or config made it.
    """
    path = checked_path(path)
    try:
        _check_regular(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            facts = _facts(metadata, content)
            check_facts(facts, identity)
            names = list(file.keys())
            check_shapes({name: _shape(file.get_slice(name)) for name in names}, facts, identity)
            tensors = {name: file.get_tensor(name) for name in names}
        if metadata.get(CHECKSUM) != checksum(metadata[CHAT], tensors):
            raise InputError("its checksum is not that of what it holds: it was damaged or changed")
        check_values(tensors, facts)
        return restore_cache(tensors, facts["cache"], device), Transcript.from_dict(facts)
    except InputError as error:
        raise InputError(f"{path:.200}: no saved chat for this engine: {error}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise InputError(f"{path:.200}: no saved chat ({error!r:.200}): pass a file that chat.save() wrote") from error


def checksum(facts: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over all that a file holds, in hex digits: its facts and, by name, every tensor.

    Args:
        facts: as they stand in the file.
        tensors: contiguous, on the CPU.
    """
    found = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\0{name} {tensor.dtype} {list(tensor.shape)}\0".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found.hexdigest()


def _check_regular(path: str) -> None:
    """Raises `InputError` for what would wait for ever, or is no file."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise InputError("no saved chat: what is there is no regular file")


def _facts(metadata: Mapping[str, str], content: str) -> dict[str, Any]:
    """What the header says of the chat."""
    facts = json.loads(metadata[CHAT])
    if not isinstance(facts, dict):
        raise TypeError(f"facts of type {type(facts).__name__}")
    if facts.get("format") != FILE_FORMAT:
        raise InputError(
            f"its format is {facts.get('format')!s:.200}, this version's {FILE_FORMAT}: chats of other versions cannot "
            "be taken up; read their content once more"
        )
    if set(metadata) != {CHAT, CHECKSUM} or set(facts) != {*FACTS, *(["content"] if content else [])}:
        raise InputError("what it says of itself is not what chat.save() writes")
    if content and facts["content"] != content:
        raise InputError("it was made of other content than its name tells: the file was moved or changed")
    return facts


def _shape(found: Any) -> Shape:
    """Of a tensor that was not read yet."""
    dtype = found.get_dtype()
    if dtype not in _DTYPES:
        raise InputError(f"a tensor of type {dtype}: wanted one of {', '.join(_DTYPES)}")
    return Shape(_DTYPES[dtype], tuple(found.get_shape()))
