"""What was read, on disk: a safetensors file for each beginning of a prompt, found again by another server."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import torch

from mminfer.chat_files import ChatIdentity, read_chat, write_chat
from mminfer.chat_files.digests import digest_of, media_digest
from mminfer.errors import InputError, shown
from mminfer.serving.prefixes import Known, PromptFacts

MOST_WAITING = 16  # files that wait to be written; what comes beyond is not written
_NAME = re.compile(r"([0-9a-f]{64})-(\d{1,9})-(\d{1,9})-(\d{1,9})\.safetensors")
_LEFT_BEHIND = re.compile(r"\.[0-9a-f]{16}\.tmp")  # by a process that was killed while it wrote


class DiskStore:
    """Beginnings of prompts in a folder, those used least recently out first, bounded in bytes.

    A file is written whole or not at all, and looked at all through before it is used. One that another model,
    tokenizer, image processor or version made, that is damaged, or that stands under the name of another content, is
    taken away. Any thread may call.

    Args:
        folder: made if it is not there; no other server should have it at the same time.
        most_bytes: of all files together.

    Raises:
        InputError: the folder cannot be had.
    """

    def __init__(self, folder: str | Path, most_bytes: int) -> None:
        self._folder, self._most = Path(folder), most_bytes
        self._lock, self._writer = Lock(), ThreadPoolExecutor(1, "mminfer-disk")
        self._files: OrderedDict[bytes, tuple[Path, int]] = OrderedDict()
        self._pending: set[Future[None]] = set()
        self.nbytes = 0
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._find()
        except OSError as error:
            raise InputError(f"{shown(str(folder))}: wanted a folder that can be read and written ({error})") from error
        self._shrink()

    def __contains__(self, key: bytes) -> bool:
        return key in self._files

    def __len__(self) -> int:
        return len(self._files)

    def get(self, key: bytes, identity: ChatIdentity, device: torch.device) -> Known | None:
        """What stands under a key; None: nothing that this engine can go on from.

        Args:
            key: of what it holds.
            identity: of the engine.
            device: where the cache goes.
        """
        with self._lock:
            if key not in self._files:
                return None
            self._files.move_to_end(key)
            path, _ = self._files[key]
        try:
            cache, transcript = read_chat(path, identity, device, _content(key, identity))
            os.utime(path)
        except (InputError, OSError):
            self._forget(key)
            return None
        visual, merged, kept = (int(number) for number in _NAME.fullmatch(path.name).groups()[1:])  # type: ignore[union-attr]
        return Known(cache, transcript, PromptFacts(0, visual, merged, kept))

    def put(self, key: bytes, known: Known, identity: ChatIdentity) -> None:
        """Writes it beside whoever calls, unless it is there, or too much waits to be written."""
        with self._lock:
            self._pending = {one for one in self._pending if not one.done()}
            if key in self._files or len(self._pending) >= MOST_WAITING:
                return
            with suppress(RuntimeError):  # of a store that was closed
                self._pending.add(self._writer.submit(self._write, key, known, identity))

    def close(self) -> None:
        """Waits for what is being written."""
        self._writer.shutdown()

    def _write(self, key: bytes, known: Known, identity: ChatIdentity) -> None:
        facts = known.facts
        path = self._folder / f"{key.hex()}-{facts.visual}-{facts.merged}-{facts.kept}.safetensors"
        with suppress(InputError, OSError):  # no room, for instance: it stays in memory
            write_chat(path, known.cache, known.transcript, identity, _content(key, identity))
            self._note(key, path)
            self._shrink()

    def _find(self) -> None:
        """What earlier servers left, in the order of its use."""
        found = []
        for path in self._folder.iterdir():
            if _LEFT_BEHIND.fullmatch(path.name):
                path.unlink(missing_ok=True)
            elif _NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found):
            self._note(bytes.fromhex(path.name[:64]), path)

    def _note(self, key: bytes, path: Path) -> None:
        size = path.stat().st_size
        with self._lock:
            self.nbytes += size - self._files.pop(key, (path, 0))[1]
            self._files[key] = path, size

    def _forget(self, key: bytes) -> None:
        with self._lock:
            path, size = self._files.pop(key, (None, 0))
            self.nbytes -= size
        if path is not None:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _shrink(self) -> None:
        while self.nbytes > self._most and self._files:
            self._forget(next(iter(self._files)))


def _content(key: bytes, identity: ChatIdentity) -> str:
    """Of what a file was made: what its key tells, and how pictures became pixels."""
    return digest_of(key, media_digest(identity.processor).encode())


@dataclass(frozen=True)
class EngineShelf:
    """A store on disk for one engine's settings.

    Args:
        store: of all.
        identity: of the engine.
        device: where caches go.
    """

    store: DiskStore
    identity: ChatIdentity
    device: torch.device

    def get(self, key: bytes) -> Known | None:
        return self.store.get(key, self.identity, self.device)

    def put(self, key: bytes, known: Known) -> None:
        self.store.put(key, known, self.identity)
