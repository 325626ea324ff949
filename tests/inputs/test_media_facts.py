"""What a media file says about itself: transparency, orientation, times, shape of pixels, length."""

import base64
import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from mminfer import Engine, InputError
from mminfer.inputs.content import MediaOptions
from mminfer.media import frames, load_image, load_video, read_video
from tests.processors import model_and_processor, reader_of

RATE = 10
QUARTER = 65536


def write_video(path, times=range(4), size=(32, 64), codec="mpeg4", pix_fmt="yuv420p", picture=None, **options):
    """Frame k is grey 10 * k and is shown from times[k] tenths of a second on."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt = *size, pix_fmt
        if codec != "mpeg2video":  # which knows a few rates only
            stream.codec_context.time_base = Fraction(1, 1000)
        for k, time in enumerate(times):
            array = np.full((*size, 3), 10 * k, np.uint8) if picture is None else picture
            frame = av.VideoFrame.from_ndarray(array, format="rgb24" if array.shape[-1] == 3 else "rgba")
            frame.pts, frame.time_base = 100 * time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown(pixels):
    """Which frames of `write_video` these are."""
    return [round(float(frame.mean()) / 10) for frame in pixels]


def with_matrix(path, matrix):
    """Writes a display matrix (a, b, c, d) into the header of an MP4."""
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 44
    a, b, c, d = (QUARTER * value for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


# The host


@pytest.fixture(scope="module")
def host():
    return Engine.from_pretrained("nano").processor.image_processor


def transparent(mode):
    """A stroke on a ground that is not seen, and whose hidden colour is black."""
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 14:18], alpha[4:6] = 255, 100
    rgba = Image.fromarray(np.dstack([np.zeros((32, 32, 3), np.uint8), alpha]), "RGBA")
    if mode == "P":
        image = Image.fromarray((alpha > 127).astype(np.uint8), "P")
        image.putpalette([0, 0, 0, 200, 30, 30])
        image.info["transparency"] = 0
        return image
    if mode == "PA":
        image = Image.merge("LA", [Image.new("L", (32, 32)), Image.fromarray(alpha)]).convert("PA")
        image.putalpha(Image.fromarray(alpha))
        return image
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
@pytest.mark.parametrize("written", [False, True])
def test_white_stands_behind_what_is_transparent_as_the_host_has_it(host, tmp_path, mode, written):
    image = transparent(mode)
    if written and mode != "PA":  # which no format holds
        image.save(tmp_path / "a.png")
        image = Image.open(tmp_path / "a.png")
    ours = load_image(image)
    theirs, same = (host(images=[x], return_tensors="pt")["pixel_values"] for x in (image, ours))
    torch.testing.assert_close(same, theirs, rtol=0, atol=1e-2)
    assert ours.mode == "RGB" and ours.getpixel((0, 0)) == (255, 255, 255)


def test_a_colour_that_stands_for_nothing_is_white(tmp_path):
    for mode, key, other in (("RGB", (1, 2, 3), (9, 9, 9)), ("L", 7, 9)):
        image = Image.new(mode, (4, 4), key)
        image.putpixel((1, 1), other)
        image.save(tmp_path / "a.png", transparency=key)
        seen = load_image(tmp_path / "a.png")
        assert seen.getpixel((0, 0)) == (255, 255, 255) and seen.getpixel((1, 1)) == (9, 9, 9)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    pictures = [Image.new("RGBA", (8, 8), (200, 30, 30, 255)), Image.new("RGBA", (8, 8), (0, 0, 0, 0))]
    pictures[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=pictures[1:], duration=50)
    assert np.abs(np.asarray(load_image(tmp_path / f"a.{suffix}")).astype(int) - [200, 30, 30]).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation(tmp_path, orientation):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    turns = {
        2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
        8: "ROTATE_90",
    }  # fmt: skip
    upright = image if orientation == 1 else image.transpose(Image.Transpose[turns[orientation]])
    assert load_image(tmp_path / "a.png").tobytes() == upright.tobytes()


BASE64 = base64.b64encode(b"\xfb\xff\xbf" * 3 + b"a").decode()


@pytest.mark.parametrize(
    "write",
    [
        lambda data: "data:image/bmp;base64," + base64.encodebytes(data).decode(),
        lambda data: "data:image/bmp;base64," + base64.encodebytes(data).decode().replace("\n", "\r\n"),
        lambda data: "data:image/bmp;base64," + base64.urlsafe_b64encode(data).decode(),
        lambda data: "data:image/bmp;base64," + base64.b64encode(data).decode().rstrip("="),
        lambda data: "data:image/bmp;charset=utf-8;name=a.bmp;base64," + base64.b64encode(data).decode(),
        lambda data: " DATA:image/bmp; BASE64, " + base64.b64encode(data).decode() + "\n",
    ],
)
def test_base64_as_it_is_written(write):
    file = io.BytesIO()
    Image.new("RGB", (5, 7), (250, 255, 190)).save(file, "BMP")
    assert load_image(write(file.getvalue())).getpixel((2, 2)) == (250, 255, 190)


@pytest.mark.parametrize(
    "source",
    [
        "data:image/png;base64," + "A" * 5000,
        "data:image/png;base64," + "!" * 5000,
        "data:image/" + "x" * 5000,
        "iVBORw0KGgo" * 2000,
        "http://host/" + "a" * 5000,
        "x" * 5000 + "://a",
    ],
)
def test_payloads_are_not_quoted(source):
    for load in (load_image, load_video):
        with pytest.raises(InputError) as caught:
            load(source)
        assert len(str(caught.value)) < 600 and source[:250] not in str(caught.value)


# Videos


MATRICES = {
    (1, 0, 0, 1): lambda x: x,
    (0, 1, -1, 0): lambda x: np.rot90(x, -1),
    (0, -1, 1, 0): lambda x: np.rot90(x, 1),
    (-1, 0, 0, -1): lambda x: x[::-1, ::-1],
    (-1, 0, 0, 1): lambda x: x[:, ::-1],
    (1, 0, 0, -1): lambda x: x[::-1],
    (0, 1, 1, 0): lambda x: x.swapaxes(0, 1),
    (0, -1, -1, 0): lambda x: x.swapaxes(0, 1)[::-1, ::-1],
}


@pytest.mark.parametrize("matrix", MATRICES)
def test_videos_stand_upright(tmp_path, matrix):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 255
    plain = load_video(write_video(tmp_path / "a.mp4", picture=picture), num_frames=1)[0]
    path = with_matrix(tmp_path / "a.mp4", matrix)
    turned, facts = read_video(path, num_frames=2)
    wanted = MATRICES[matrix](plain)
    np.testing.assert_array_equal(turned[1], wanted)
    assert (facts["height"], facts["width"]) == wanted.shape[:2]
    np.testing.assert_array_equal(np.asarray(next(frames(path))), wanted)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_are_taken_by_their_times(tmp_path, suffix):
    """Ten frames in the first second, and one a second after that, for ten seconds."""
    path = write_video(tmp_path / f"a.{suffix}", [*range(10), *range(10, 101, 10)])
    for how in ({"fps": 1}, {"num_frames": 10}):
        pixels, facts = read_video(path, **how)
        assert shown(pixels) == [0, *range(10, 19)] or shown(pixels) == [0, *range(10, 20)]
        seconds = [index / facts["fps"] for index in facts["frames_indices"]]
        np.testing.assert_allclose(seconds, range(len(seconds)), atol=0.15)
    assert shown(load_video(path, num_frames=99)) == list(range(20))
    assert shown(map(np.asarray, frames(path))) == list(range(20))
    singly = [np.asarray(image) for image in frames(path, fps=1)]
    np.testing.assert_array_equal(np.stack(singly), load_video(path, fps=1))


def test_a_frame_that_is_shown_for_long_is_taken_often(tmp_path):
    path = write_video(tmp_path / "a.mkv", [0, 1, 2, 3, 40, 41, 42, 43])
    pixels, facts = read_video(path, num_frames=4)
    assert shown(pixels) == [0, 3, 3, 3]
    assert facts["total_num_frames"] == 8


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_clips_shorter_than_what_is_asked_of_them(tmp_path, suffix, count):
    path = write_video(tmp_path / f"a.{suffix}", range(count))
    for how in ({}, {"fps": 1}, {"fps": 100}, {"num_frames": 1}):
        assert shown(load_video(path, **how)) == list(range(1 if how in ({"fps": 1}, {"num_frames": 1}) else count))


@pytest.mark.parametrize("family", ["internvl", "qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_clips_are_answered(tmp_path, family, count):
    """A model may take frames in pairs; file and frames, at once and in chunks."""
    path = write_video(tmp_path / "a.mp4", range(count), size=(32, 32))
    for video in (str(path), np.zeros((count, 32, 32, 3), np.uint8)):
        chat = [{"role": "user", "content": ["a", {"type": "video", "video": video}, "What?"]}]
        whole = reader_of(family).inputs([chat], MediaOptions())["input_ids"]
        pieces = reader_of(family).readings(chat, MediaOptions(), 1)()
        assert torch.cat([piece["input_ids"] for piece in pieces], 1).tolist() == whole.tolist()
    if family == "qwen2_vl":
        assert Engine(*model_and_processor(family)).generate(chat, 1).token_ids


def test_pixels_are_made_square(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8))))
        container.mux(stream.encode())
    assert load_video(path).shape == (1, 32, 64, 3)


def test_white_stands_behind_a_transparent_video(tmp_path):
    pictures = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(2)]
    for n, picture in enumerate(pictures):
        picture.putpixel((3, n), (0, 0, 255, 255))
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    pixels = load_video(tmp_path / "a.gif")
    assert pixels[0, 5, 5].tolist() == [255, 255, 255] and pixels[0, 0, 3].tolist() == [0, 0, 255]
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[0, 0] = 10, 20, 30, 255
    path = write_video(tmp_path / "a.mkv", range(2), (16, 16), "ffv1", "bgra", picture)
    assert load_video(path)[1, 0, 0].tolist() == [10, 20, 30] and load_video(path)[1, 1, 1].tolist() == [255] * 3


@pytest.mark.parametrize("alpha", [0, 255])
def test_white_stands_behind_a_video_whose_transparency_is_a_stream_of_its_own(tmp_path, monkeypatch, alpha):
    """As WebM has it, which FFmpeg's usual decoder leaves out."""
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuva420p"
        for _ in range(3):
            pixels = np.full((32, 32, 4), (0, 0, 0, alpha), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgba")))
        container.mux(stream.encode())
    pixels = load_video(path)
    assert pixels.shape == (3, 32, 32, 3) and (pixels == 255 - alpha).all()
    monkeypatch.setattr("mminfer.inputs.video_files.ALPHA_DECODERS", {"vp9": "no such decoder"})
    with pytest.raises(InputError, match="needs no such decoder"):
        load_video(path)


def test_what_an_edit_list_leaves_out_is_not_counted(tmp_path):
    """The header counts all frames, the player shows those of the edit list."""
    path = write_video(tmp_path / "a.mp4", range(20), g="1")
    data = bytearray(path.read_bytes())
    place = data.find(b"elst")
    duration, start = struct.unpack(">ii", data[place + 12 : place + 20])
    scale = struct.unpack(">i", data[data.find(b"mdhd") + 16 : data.find(b"mdhd") + 20])[0]
    data[place + 12 : place + 20] = struct.pack(">ii", duration // 2, start + scale)  # from the second second on
    path.write_bytes(data)
    with av.open(str(path)) as container:
        seen = [round(float(frame.to_ndarray(format="rgb24").mean()) / 10) for frame in container.decode(video=0)]
    assert len(seen) < 20, "the edit list is not obeyed"
    pixels, facts = read_video(path, num_frames=4)
    assert facts["total_num_frames"] == len(seen)
    assert shown(pixels) == [seen[k * len(seen) // 4] for k in range(4)]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_a_cut_tail_leaves_the_frames_before_it(tmp_path, suffix, share):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    codec = "mpeg2video" if suffix == "ts" else "mpeg4"
    path = write_video(tmp_path / f"a.{suffix}", range(20), (120, 160), codec, **options)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    try:
        pixels, facts = read_video(path, num_frames=4)
    except InputError as error:
        assert share < 0.5 and "wanted a whole video file" in str(error)
        return
    assert shown(pixels) == facts["frames_indices"] and facts["total_num_frames"] <= 20
