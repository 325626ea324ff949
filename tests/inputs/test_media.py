"""Media come in whole or not at all, and every refusal names the file and the way out."""

import base64
import builtins
import contextlib
import io
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mminfer.errors import InputError
from mminfer.inputs import pixels as limits
from mminfer.inputs import remote
from mminfer.media import load_image, load_video, read_video

RATE = 10
LOCAL = {"allow_remote": True, "allow_private_hosts": True}


def pixels(height=6, width=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array=None):
    buffer = io.BytesIO()
    Image.fromarray(pixels() if array is None else array).save(buffer, "PNG")
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def write_video(path, count=20, codec="mpeg4", size=(48, 64), **options):
    """Frame k is grey 10 * k."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 * k, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(frames):
    """Which frames of `write_video` these are."""
    return [round(float(frame.mean()) / 10) for frame in frames]


@pytest.fixture
def server():
    """A local web server; its `content` is what it sends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path != "/missing" else 404)
            self.end_headers()
            self.wfile.write(httpd.content)

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    httpd.content = png()
    httpd.url = f"http://127.0.0.1:{httpd.server_port}/picture.png"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_one_picture_from_every_source(tmp_path, server):
    array, path = pixels(), tmp_path / "picture.png"
    path.write_bytes(png(array))
    same = [
        Image.fromarray(array),
        path,
        str(path),
        array,
        torch.from_numpy(array),
        torch.from_numpy(array).permute(2, 0, 1),
        "data:image/png;base64," + base64.b64encode(png(array)).decode(),
    ]
    for source in same:
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), array)
    np.testing.assert_array_equal(np.asarray(load_image(server.url, **LOCAL)), array)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif", "tif", "ppm"])
def test_ordinary_formats(tmp_path, suffix):
    path = tmp_path / f"picture.{suffix}"
    Image.new("RGB", (7, 5), (200, 30, 30)).save(path)
    image = load_image(path)
    assert image.size == (7, 5)
    assert np.abs(np.asarray(image).astype(int) - [200, 30, 30]).max() < 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_modes_become_rgb_as_the_host_makes_them(mode):
    image = Image.fromarray(pixels()).convert(mode)
    np.testing.assert_array_equal(np.asarray(load_image(image)), np.asarray(image.convert("RGB")))


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pixels(height=4, width=10))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    upright = image.transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "turned.png")), np.asarray(upright))


def test_the_given_image_is_left_alone():
    image = Image.fromarray(pixels())
    load_image(image).putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(np.asarray(image), pixels())


def bad_files(tmp_path):
    jpeg = io.BytesIO()
    Image.fromarray(pixels(64, 64)).save(jpeg, "JPEG")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    contents = {
        "text.png": b"this is only a text",
        "empty.png": b"",
        "cut.png": png(pixels(64, 64))[:2000],
        "cut.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "bomb.png": png_header(60_000, 60_000),
        "zero.png": png_header(0, 10),
        "nopixels.png": png_header(10, 10),
        "script.eps": eps,
        "script.png": eps,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return list(contents)


def test_bad_files_are_named_and_refused(tmp_path):
    for name in bad_files(tmp_path):
        with pytest.raises(InputError, match=rf"{name}: .*(:|;) "):
            load_image(tmp_path / name)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    # Between Pillow's warning and its error, and with its check switched off: the header alone decides.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png_header(13_378, 13_378))
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(InputError, match="13378 x 13378 pixels: wanted 1 to 178,956,970"):
        load_image(tmp_path / "bomb.png")
    assert Image.MAX_IMAGE_PIXELS is None


def test_refused_paths(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: No such file"):
        load_image(tmp_path / "gone.png")
    with pytest.raises(InputError, match="a folder: wanted the path of one image file"):
        load_image(tmp_path)
    with pytest.raises(InputError, match="wanted the path of a readable image file"):
        load_image("nul\0byte.png")
    with pytest.raises(InputError, match="wanted the path of a readable image file"):
        load_image("x" * 5000)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="not a regular file"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "FILE:///etc/hostname", "ftp://host/a.png", "s3://bucket/a.png"]
)
@pytest.mark.parametrize("load", [load_image, load_video])
def test_other_schemes_are_refused(url, load):
    with pytest.raises(InputError, match="is not allowed"):
        load(url, allow_remote=True)


@pytest.mark.parametrize(
    "rest", ["text/plain;base64,aGk=", "image/png,a", "image/png;base64,?", "image/png;base64,aGk="]
)
def test_bad_data_urls(rest):
    with pytest.raises(InputError, match="data:"):
        load_image("data:" + rest)


def test_remote_sources_need_leave(server, monkeypatch):
    for load in (load_image, load_video):
        with pytest.raises(InputError, match="remote sources are off: pass allow_remote=True"):
            load(server.url)
    with pytest.raises(InputError, match="could not be fetched: HTTP Error 404"):
        load_image(server.url.replace("picture.png", "missing"), **LOCAL)
    with pytest.raises(InputError, match="could not be fetched"):
        load_image("http://127.0.0.1:1/a.png", **LOCAL)
    monkeypatch.setattr(remote, "MAX_REMOTE_BYTES", 20)
    with pytest.raises(InputError, match="larger than 20 bytes"):
        load_image(server.url, **LOCAL)


@pytest.mark.parametrize(
    "source",
    [
        None,
        5,
        b"bytes",
        {"path": "x"},
        pixels().astype(np.float32),
        torch.rand(3, 4, 4),
        pixels()[..., :2],
        pixels()[0],
        pixels()[:0],
        Image.new("RGB", (0, 4)),
        Image.new("RGB", (4, 0)),
        Image.new("I;16", (4, 4)),
        Image.new("F", (4, 4)),
    ],
)
def test_things_that_are_not_images(source):
    with pytest.raises(InputError, match=r"wanted|scale its pixels"):
        load_image(source)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_images_load_or_are_refused(data):
    """Nothing but InputError comes out of broken bytes."""
    good = png(pixels(8, 8))
    broken = bytearray(good[: data.draw(st.integers(0, len(good)))])
    for index in data.draw(st.lists(st.integers(0, len(good) - 1), max_size=4)):
        if index < len(broken):
            broken[index] ^= 255
    url = "data:image/png;base64," + base64.b64encode(bytes(broken)).decode()
    with contextlib.suppress(InputError):
        assert load_image(url).mode == "RGB"


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "ts"])
def test_frames_are_spread_evenly(tmp_path, suffix):
    """With the length in the header (mp4, avi) and without (mkv, ts)."""
    path = write_video(tmp_path / f"a.{suffix}", codec="mpeg2video" if suffix == "ts" else "mpeg4")
    frames, metadata = read_video(path, num_frames=5)
    assert frames.shape == (5, 48, 64, 3) and frames.dtype == np.uint8
    assert shown(frames) == metadata["frames_indices"] == [0, 4, 8, 12, 16]
    assert (metadata["total_num_frames"], metadata["fps"], metadata["duration"]) == (20, 10.0, 2.0)
    np.testing.assert_array_equal(load_video(str(path), num_frames=5), frames)
    assert len(load_video(path, num_frames=99)) == 20


def test_frames_at_a_rate(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert shown(load_video(path, fps=2)) == [0, 5, 10, 15]
    assert len(load_video(path, fps=0.01)) == 1
    assert len(load_video(path, fps=1000)) == 20


def test_the_hosts_rule_of_sampling(tmp_path):
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    if default_sample_indices_fn(VideoMetadata(total_num_frames=20), num_frames=3)[-1] == 12:
        pytest.skip("this host is old and steps by whole frames")
    path = write_video(tmp_path / "a.mp4")
    for kwargs in ({"num_frames": 3}, {"num_frames": 7}, {"fps": 3}, {"fps": 7.5}):
        wanted = default_sample_indices_fn(VideoMetadata(total_num_frames=20, fps=10.0), **kwargs)
        assert read_video(path, **kwargs)[1]["frames_indices"] == wanted.tolist()


def test_given_frames(tmp_path):
    frames = np.stack([np.full((4, 6, 3), 10 * k, np.uint8) for k in range(6)])
    for source in (frames, torch.from_numpy(frames), list(frames), [Image.fromarray(f) for f in frames]):
        np.testing.assert_array_equal(load_video(source), frames)
        np.testing.assert_array_equal(load_video(source, num_frames=3), frames)  # sampled already
    with pytest.raises(InputError, match="fps needs a video file"):
        load_video(frames, fps=2)


@pytest.mark.parametrize("source", [None, 3, [], np.zeros((2, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)])
def test_things_that_are_not_videos(source):
    with pytest.raises(InputError, match="wanted"):
        load_video(source)


def test_frames_of_different_sizes_are_refused():
    with pytest.raises(InputError, match="differ in size"):
        load_video([pixels(4, 4), pixels(4, 5)])


@pytest.mark.parametrize(
    "kwargs",
    [{"num_frames": 0}, {"num_frames": 2.5}, {"num_frames": True}, {"fps": 0}, {"fps": float("nan")}],
)
def test_impossible_sampling(kwargs):
    with pytest.raises(InputError, match="wanted"):
        load_video(np.zeros((2, 4, 4, 3), np.uint8), **kwargs)


def test_a_cut_video_gives_what_is_there(tmp_path, caplog):
    whole = write_video(tmp_path / "a.mp4", count=24, size=(240, 320), options={"movflags": "faststart"})
    content = whole.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * 0.6)])
    frames, metadata = read_video(tmp_path / "cut.mp4", num_frames=4)
    assert len(frames) == 4 and 4 <= metadata["total_num_frames"] < 24
    assert shown(frames) == metadata["frames_indices"]
    assert "frames are there" in caplog.text


def test_bad_videos_are_named_and_refused(tmp_path):
    whole = write_video(tmp_path / "a.mp4").read_bytes()
    cut = whole[: len(whole) // 2]
    contents = {"cut.mp4": cut, "empty.mp4": b"", "text.mp4": b"only a text", "image.mp4": png()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    for name in [*contents, "sound.mp4"]:
        with pytest.raises(InputError, match=rf"{name}: .*video"):
            load_video(tmp_path / name)
    with pytest.raises(InputError, match="a folder"):
        load_video(tmp_path)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_videos_load_or_are_refused(tmp_path, data):
    """Nothing but InputError comes out of broken bytes."""
    path = tmp_path / "a.mp4"
    if not path.exists():
        write_video(path)
    broken = bytearray(path.read_bytes())
    for index in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=8)):
        broken[index] ^= 255
    (tmp_path / "broken.mp4").write_bytes(broken)
    with contextlib.suppress(InputError):
        assert load_video(tmp_path / "broken.mp4", num_frames=3).ndim == 4


def test_playlists_do_not_open_other_files(tmp_path):
    video = write_video(tmp_path / "a.ts", codec="mpeg2video")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nfile://{video}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile {video}\n"
    for name, content in {"list.mp4": playlist, "concat.mp4": concat}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=f"{name}: not a video"):
            load_video(tmp_path / name)


def test_huge_frames_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(limits, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="frames of 64 x 48 pixels: wanted at most 1,000"):
        load_video(path)


def test_missing_pyav_names_the_extra(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    real = builtins.__import__

    def without_av(name, *args, **kwargs):
        if name == "av":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(InputError, match=r"pip install mminfer\[video\]"):
        load_video(path)


def test_a_remote_video(tmp_path, server):
    server.content = write_video(tmp_path / "a.mp4").read_bytes()
    assert shown(load_video(server.url, num_frames=2, **LOCAL)) == [0, 10]
