"""Where images and videos come from: local files, data URLs and, if allowed, http(s); nothing else."""

from __future__ import annotations

import base64
import binascii
import stat
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from mminfer.errors import InputError

MAX_REMOTE_BYTES = 64 * 2**20
REMOTE_TIMEOUT_S = 20


@contextmanager
def open_source(source: Any, kind: str, *, allow_remote: bool) -> Iterator[tuple[IO[bytes], str]]:
    """Opens the bytes of an image or video.

    Args:
        source: a path, a "data:image/...;base64," URL or an http(s) URL.
        kind: "image" or "video".
        allow_remote: fetch http(s) URLs.

    Yields:
        A seekable file, and its name for messages.

    Raises:
        InputError: it is not there, not a regular file, or not allowed.
    """
    if not isinstance(source, (str, Path)):
        found = type(source).__name__
        raise InputError(f"the {kind} is a {found}: wanted a path, a URL, a PIL image or uint8 pixels")
    check_source(source, kind, allow_remote=allow_remote)
    scheme = _scheme(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        yield BytesIO(_decode_data_url(source, kind)), "the data: URL"
    elif scheme in ("http", "https"):
        yield BytesIO(_fetch(str(source))), str(source)
    else:
        name = str(source)
        with _open_local(Path(source), name, kind) as file:
            yield file, name


def check_source(source: Any, kind: str, *, allow_remote: bool) -> None:
    """Raises `InputError` if it can be seen without opening it that `open_source` would refuse a path or URL."""
    if not isinstance(source, (str, Path)):
        return  # pixels
    if isinstance(source, str) and source[:5].lower() == "data:":
        return
    scheme = _scheme(source)
    if scheme is None:
        _check_local(Path(source), str(source), kind)
    elif scheme not in ("http", "https"):
        raise InputError(f"{source}: {scheme}:// is not allowed: pass a plain path, http(s) or data: URL")
    elif not allow_remote:
        raise _remote_off(str(source))


def _scheme(source: str | Path) -> str | None:
    return source.partition("://")[0].lower() if isinstance(source, str) and "://" in source[:32] else None


def _open_local(path: Path, name: str, kind: str) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise _unreadable(name, kind, error) from error


def _check_local(path: Path, name: str, kind: str) -> None:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        raise _unreadable(name, kind, error) from error
    if not stat.S_ISREG(mode):  # also keeps us from pipes and devices, which may never end
        found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{name}: {found}: wanted the path of one {kind} file")


def _unreadable(name: str, kind: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{name}: {reason}: wanted the path of a readable {kind} file")


def _remote_off(url: str) -> InputError:
    return InputError(
        f"{url}: remote sources are off: pass allow_remote=True (on the command line --allow-remote), or download it "
        "first"
    )


def _decode_data_url(url: str, kind: str) -> bytes:
    head, _, payload = url.partition(",")
    if kind != "image" or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise InputError(f"the {kind} is {head[:60]!r}: wanted 'data:image/...;base64,', or a path")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data: URL is not base64: {error}") from error


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mminfer"})
    try:
        with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT_S) as response:
            content = response.read(MAX_REMOTE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: could not be fetched: {error}") from error
    if len(content) > MAX_REMOTE_BYTES:
        raise InputError(f"{url}: larger than {MAX_REMOTE_BYTES:,} bytes: download it and pass the path")
    return content
