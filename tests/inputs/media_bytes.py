"""Files of images and videos for fuzzing: whole ones, mutated ones, and bytes that are none."""

import contextlib
import io
import tempfile
from functools import cache
from pathlib import Path

import av
import numpy as np
from hypothesis import strategies as st
from PIL import Image

from mminfer.errors import InputError
from mminfer.media import frames, load_image, read_video

IMAGES = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
VIDEOS = ("mp4", "matroska", "avi", "mpegts", "gif")


@cache
def whole_file(kind):
    """A small file of a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    if kind in IMAGES:
        image = Image.fromarray(pixels)
        more = {"save_all": True, "append_images": [image.rotate(90)]} if kind in ("GIF", "WEBP", "TIFF") else {}
        image.save(buffer, kind, **more)
        return buffer.getvalue()
    codec = {"mpegts": "mpeg2video", "gif": "gif"}.get(kind, "mpeg4")
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = 16, 16
        stream.pix_fmt = "rgb8" if kind == "gif" else "yuv420p"
        for k in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(pixels, k, 0), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@st.composite
def media_files(draw):
    """The name of a file's format and its bytes: those of a whole file, mutated, or drawn."""
    kind = draw(st.sampled_from([*IMAGES, *VIDEOS]))
    content = bytearray(whole_file(kind))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        if not content:
            break
        what = draw(st.sampled_from(["flip", "value", "word", "cut", "drop", "twice", "zeros"]))
        size = draw(st.integers(1, 64))
        if what == "flip":
            content[place] ^= 1 << draw(st.integers(0, 7))
        elif what == "value":
            content[place] = draw(st.sampled_from([0, 1, 127, 128, 255]))
        elif what == "word":
            content[place : place + 4] = draw(st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]))
        elif what == "cut":
            del content[place:]
        elif what == "drop":
            del content[place : place + size]
        elif what == "twice":
            content[place:place] = content[place : place + size]
        else:
            content[place : place + size] = bytes(len(content[place : place + size]))
    if draw(st.integers(0, 9)) == 0:
        content = bytearray(draw(st.binary(max_size=200)))
    return kind, bytes(content)


def fuzz_media(file):
    """One file through every loader: pixels as they are promised, or `InputError` in few words; nothing else.

    Args:
        file: what `media_files` draws.

    Returns:
        Whether it was "refused" or "loaded" by some loader.
    """
    kind, content = file
    loaded: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file.{kind.lower()}"
        path.write_bytes(content)
        with _refusals():
            image = load_image(path)
            assert image.mode == "RGB" and min(image.size) > 0
            assert np.asarray(image).shape == (image.height, image.width, 3)
            loaded.append("image")
        for how in ({"num_frames": 3}, {"fps": 2}):
            with _refusals():
                pixels, facts = read_video(path, **how)
                assert pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[-1] == 3 and len(pixels) > 0
                assert len(facts["frames_indices"]) == len(pixels) and facts["frames_indices"] == sorted(
                    facts["frames_indices"]
                )
                assert (facts["height"], facts["width"]) == pixels.shape[1:3]
                assert facts["total_num_frames"] >= max(facts["frames_indices"]) + 1
                loaded.append("video")
        with _refusals():
            for count, frame in enumerate(frames(path)):
                assert frame.mode == "RGB"
                loaded.append("frame")
                if count > 20:
                    break
    return "loaded" if loaded else "refused"


@contextlib.contextmanager
def _refusals():
    try:
        yield
    except InputError as error:
        assert len(str(error)) < 1000
