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
    scheme = source.partition("://")[0].lower() if isinstance(source, str) and "://" in source[:32] else None
    if isinstance(source, str) and source[:5].lower() == "data:":
        yield BytesIO(_decode_data_url(source, kind)), "the data: URL"
    elif scheme in ("http", "https"):
        yield BytesIO(_fetch(str(source), allow_remote)), str(source)
    elif scheme is not None:
        raise InputError(f"{source}: {scheme}:// is not allowed: pass a plain path, http(s) or data: URL")
    else:
        name = str(source)
        with _open_local(Path(source), name, kind) as file:
            yield file, name


def _open_local(path: Path, name: str, kind: str) -> IO[bytes]:
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # also keeps us from pipes and devices, which may never end
            found = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"{name}: {found}: wanted the path of one {kind} file")
        return path.open("rb")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name}: {reason}: wanted the path of a readable {kind} file") from error


def _decode_data_url(url: str, kind: str) -> bytes:
    head, _, payload = url.partition(",")
    if kind != "image" or not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise InputError(f"the {kind} is {head[:60]!r}: wanted 'data:image/...;base64,', or a path")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"the data: URL is not base64: {error}") from error


def _fetch(url: str, allow_remote: bool) -> bytes:
    if not allow_remote:
        raise InputError(f"{url}: remote sources are off: pass allow_remote=True, or download it first")
    request = urllib.request.Request(url, headers={"User-Agent": "mminfer"})
    try:
        with urllib.request.urlopen(request, timeout=REMOTE_TIMEOUT_S) as response:
            content = response.read(MAX_REMOTE_BYTES + 1)
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{url}: could not be fetched: {error}") from error
    if len(content) > MAX_REMOTE_BYTES:
        raise InputError(f"{url}: larger than {MAX_REMOTE_BYTES:,} bytes: download it and pass the path")
    return content
