"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mminfer.errors import InputError, shown

_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def checked_path(path: Any) -> str:
    """The path of a file as a string.

    Raises:
        InputError: it is none.
    """
    wanted = "wanted the path of a file, as a string or a pathlib.Path"
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"path {shown(path)}, of type {type(path).__name__}: {wanted}")
    found = os.fspath(path)
    if not isinstance(found, str) or not found or "\0" in found:
        raise InputError(f"path {shown(found)}: {wanted}")
    try:
        os.fsencode(found)
    except UnicodeEncodeError as error:
        raise InputError(f"path {shown(found)}: no file can have such a name ({error.reason}): {wanted}") from error
    return found


def write_whole(path: str, content: bytes) -> None:
    """Writes a file in one step: whoever looks finds what was there before, or all of the new.

    Where the system can, the new file has no name until it is whole, so that a process that is killed leaves nothing
    behind. A link is followed; a file that is there keeps its permissions.

    Args:
        path: of the file; what is there and no regular file is left alone.
        content: of the file.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    path = os.path.realpath(path)
    mode = _mode_of(path)
    folder = os.path.dirname(path)
    beside = os.path.join(folder, f".{secrets.token_hex(8)}.tmp")
    try:
        if not _write_unnamed(folder, beside, content, mode):
            _write(os.open(beside, _NEW, 0o666), content, mode)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise
    _sync_folder(folder)


def _write(descriptor: int, content: bytes, mode: int | None, name: Callable[[int], None] | None = None) -> None:
    """Writes a file and closes it; name: gives it a name once all of it is there."""
    with open(descriptor, "wb") as file:
        if mode is not None and os.chmod in os.supports_fd:
            os.chmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        if name is not None:
            name(file.fileno())


def _write_unnamed(folder: str, beside: str, content: bytes, mode: int | None) -> bool:
    """Writes a file that gets its name last; False: this system or file system has none such."""
    if not hasattr(os, "O_TMPFILE"):
        return False
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    except OSError:
        return False
    named = True

    def name(of: int) -> None:
        nonlocal named
        try:
            descriptors = os.open("/proc/self/fd", os.O_RDONLY | os.O_CLOEXEC)
            try:  # a link to a descriptor has to be followed, which needs a folder to start from
                os.link(str(of), beside, src_dir_fd=descriptors, follow_symlinks=True)
            finally:
                os.close(descriptors)
        except OSError:
            named = False

    _write(descriptor, content, mode, name)
    return named


def _mode_of(path: str) -> int | None:
    """The permissions of the file that is there; None: there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError("what is there is no regular file")
    if not os.access(path, os.W_OK):
        raise PermissionError("the file that is there may not be written")
    return stat.S_IMODE(found.st_mode)


def _sync_folder(folder: str) -> None:
    """Makes the new name last; some file systems have nothing to do for that, and say so by an error."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
