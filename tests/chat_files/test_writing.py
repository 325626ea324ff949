"""Files are written whole or not at all, and where they may be."""

import errno
import os
import signal
import stat
from pathlib import Path

import pytest

from mminfer import InputError
from mminfer.chat_files.writing import checked_path, write_whole

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


@pytest.fixture(params=["unnamed", "named", "without links"])
def way(request, monkeypatch):
    """How a file comes to its name: every one that a system may need."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif request.param == "without links":
        monkeypatch.setattr(os, "link", _raising(OSError(errno.EPERM, "no links here")))
    return request.param


def _raising(error):
    def act(*_, **__):
        raise error

    return act


def test_a_file_is_written_over_another_and_nothing_else_is_there(tmp_path, way):
    for content in (b"one", b"two" * 1000):
        write_whole(str(tmp_path / "file"), content)
        assert (tmp_path / "file").read_bytes() == content
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, way, monkeypatch, code, call):
    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, call, _raising(OSError(code, os.strerror(code))))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_whole(str(tmp_path / "file"), b"new")
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


@posix
def test_a_file_that_grows_too_large_leaves_what_was_there(tmp_path, way):
    import resource

    (tmp_path / "file").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
        with pytest.raises(OSError, match="too large"):
            write_whole(str(tmp_path / "file"), bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "file").read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_an_interrupt_leaves_what_was_there(tmp_path, way, monkeypatch):
    monkeypatch.setattr(os, "fsync", _raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_whole(str(tmp_path / "file"), b"new")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")
def test_a_killed_process_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        write_whole(str(tmp_path / "file"), bytes(1 << 20))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert os.listdir(tmp_path) == []


@posix
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path, way):
    (tmp_path / "any").write_bytes(b"")
    write_whole(str(tmp_path / "new"), b"1")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "any").stat().st_mode
    (tmp_path / "new").chmod(0o600)
    write_whole(str(tmp_path / "new"), b"2")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o600


@posix
def test_links_stay_links_and_what_is_no_file_is_left_alone(tmp_path, way):
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    (tmp_path / "far").mkdir()
    write_whole(str(tmp_path / "link"), b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "far" / "file").read_bytes() == b"1"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "far", "/dev/null"):
        with pytest.raises(OSError, match="no regular file"):
            write_whole(str(path), b"1")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("path", [None, 3, b"file", "", "a\0b", "\ud800", ["file"], float("nan")])
def test_what_is_no_path_is_named(path):
    with pytest.raises(InputError, match=r"path .*: wanted the path of a file|no file can have such a name"):
        checked_path(path)
    assert checked_path(Path("a") / "b") == os.path.join("a", "b")
