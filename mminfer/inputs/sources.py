"""Where images and videos come from: local files, data URLs and, if allowed, http(s); nothing else."""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from mminfer.errors import InputError, shortened, shown
from mminfer.inputs.remote import fetch, url_name

_SCHEME = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):(?=//)")
_SPACE = re.compile(r"\s+")


@contextmanager
def open_source(
    source: Any, kind: str, *, allow_remote: bool, allow_private_hosts: bool = False
) -> Iterator[tuple[IO[bytes], str]]:
    """Opens the bytes of an image or video.

    Args:
        source: a path, a "data:image/...;base64," URL or an http(s) URL.
        kind: "image" or "video".
        allow_remote: fetch http(s) URLs.
        allow_private_hosts: fetch them from this machine and its network too.

    Yields:
        A seekable file, and its name for messages.

    Raises:
        InputError: it is not there, not a regular file, or not allowed.
    """
    if not isinstance(source, (str, Path)):
        found = type(source).__name__
        raise InputError(f"the {kind} is a {found}: wanted a path, a URL, a PIL image or uint8 pixels")
    for name, value in (("allow_remote", allow_remote), ("allow_private_hosts", allow_private_hosts)):
        if not isinstance(value, bool):
            raise InputError(f"{name} is {shown(value)}: wanted True or False")
    check_source(source, kind, allow_remote=allow_remote)
    scheme = _scheme(source)
    if _is_data_url(source):
        yield BytesIO(_decode_data_url(str(source), kind)), "the data: URL"
    elif scheme in ("http", "https"):
        content = fetch(str(source).strip(), allow_private_hosts=allow_private_hosts)
        yield BytesIO(content), url_name(str(source))
    else:
        name = shortened(source)
        with _open_local(Path(source), name, kind) as file:
            yield file, name


def data_url_bytes(url: str) -> bytes:
    """What a "data:image/...;base64," URL holds.

    Raises:
        InputError: it is none, or damaged.
    """
    return _decode_data_url(url, "image")


def check_source(source: Any, kind: str, *, allow_remote: bool) -> None:
    """Raises `InputError` if it can be seen without opening it that `open_source` would refuse a path or URL."""
    if not isinstance(source, (str, Path)):
        return  # pixels
    if _is_data_url(source):
        return
    scheme = _scheme(source)
    name = shortened(source) if scheme is None else url_name(str(source))
    if scheme is None:
        _check_local(Path(source), name, kind)
    elif scheme not in ("http", "https"):
        raise InputError(f"{name}: {shortened(scheme)}:// is not allowed: pass a plain path, http(s) or data: URL")
    elif not allow_remote:
        raise _remote_off(name)


def _is_data_url(source: str | Path) -> bool:
    return isinstance(source, str) and source[:20].lstrip()[:5].lower() == "data:"


def _scheme(source: str | Path) -> str | None:
    found = _SCHEME.match(source) if isinstance(source, str) else None
    return found[1].lower() if found else None


def _open_local(path: Path, name: str, kind: str) -> IO[bytes]:
    """Opens a regular file, also where something else has come to its place since it was looked at."""
    try:
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise _unreadable(name, kind, error) from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, name, kind)
    except InputError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_local(path: Path, name: str, kind: str) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(name, kind, error) from error
    _check_regular(mode, name, kind)


def _check_regular(mode: int, name: str, kind: str) -> None:
    if not stat.S_ISREG(mode):  # also keeps us from pipes and devices, which may never end
        found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{name}: {found}: wanted the path of one {kind} file")


def _unreadable(name: str, kind: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or shortened(error)
    return InputError(f"{name}: {reason}: wanted the path of a readable {kind} file")


def _remote_off(url: str) -> InputError:
    return InputError(
        f"{url}: remote sources are off: pass allow_remote=True (on the command line --allow-remote), or download it "
        "first"
    )


def _decode_data_url(url: str, kind: str) -> bytes:
    """The bytes of "data:image/png;base64,...", which may have other parameters and stand in lines, as MIME has it.

    The alphabet of URLs is taken too, and so is a payload without the padding at its end.
    """
    head, _, payload = url.strip().partition(",")
    words = [word.strip().lower() for word in head.split(";")]
    if kind != "image" or not words[0].startswith("data:image/") or "base64" not in words[1:]:
        raise InputError(f"the {kind} is {head[:60]!r}: wanted 'data:image/...;base64,', or a path")
    try:
        plain = _SPACE.sub("", payload).replace("%3D", "=").replace("%2B", "+").replace("%2F", "/")
        plain = plain.translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data: URL is not base64: {shortened(error)}") from error
