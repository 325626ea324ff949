"""Whatever stands where an input should be: answered as it says, or refused by name before any layer runs."""

import math
import os
import warnings
from collections import UserDict
from fractions import Fraction
from types import MappingProxyType

import numpy as np
import pytest
import torch
from PIL import Image

from mminfer import Engine, InputError, MminferError
from mminfer.errors import shortened, shown
from mminfer.inputs import sources
from mminfer.inputs.content import MediaOptions
from mminfer.inputs.parts import EmbeddingPart, VideoPart
from mminfer.media import load_image, load_video

WIDTH = 192
U8 = torch.zeros(8, 8, 3, dtype=torch.uint8)
PICTURE = {"type": "image", "image": Image.new("RGB", (8, 8))}


class Raises:
    """Whose every word is an error."""

    def __repr__(self):
        raise RuntimeError("no words")

    __str__ = __repr__


@pytest.fixture(scope="module")
def engine():
    return Engine.from_pretrained("nano")


@pytest.fixture
def refused(engine):
    """Asserts that a call is refused in few words, and that no layer ran for it."""
    ran = []
    hook = engine.adapter.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))

    def check(act, match="wanted|allowed|use |pass "):
        with pytest.raises(InputError, match=match) as caught:
            act()
        assert len(str(caught.value)) < 600
        assert not ran

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield check
    hook.remove()


def quantised(values):
    with warnings.catch_warnings():  # hosts are about to drop these
        warnings.simplefilter("ignore")
        make = getattr(torch, "quantize_per_tensor", None)
        return None if make is None else make(values.float(), 1.0, 0, torch.quint8)


def nested(*values):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor(list(values))


PIXELS = {
    "bfloat16": U8.bfloat16(),
    "meta": U8.to("meta"),
    "sparse": U8.to_sparse(),
    "fp8": U8.to(torch.float8_e4m3fn),
    "bool": U8.bool(),
    "complex": U8.to(torch.complex64),
    "float with a gradient": torch.zeros(8, 8, 3, requires_grad=True),
    "nested": nested(U8[:2], U8),
    "quantised": quantised(U8),
    "no sides": torch.tensor(3, dtype=torch.uint8),
    "empty": U8[:0],
    "object": np.zeros((8, 8, 3), object),
    "text": np.full((8, 8, 3), "a"),
    "big ends": np.zeros((8, 8, 3), ">u2"),
    "masked": np.ma.masked_array(U8.numpy(), mask=True),
    "records": np.zeros((8, 8), [("a", "u1", 3)]),
    "too many": np.broadcast_to(np.zeros(3, np.uint8), (20_000, 20_000, 3)),
    "dates": np.zeros((8, 8, 3), "M8[s]"),
}


@pytest.mark.parametrize("name", PIXELS)
def test_pixels_of_other_types(engine, refused, name):
    image = PIXELS[name]
    videos = [image] if image is None or name in ("nested", "no sides") else [image[None], [image]]
    refused(lambda: engine.generate([{"type": "image", "image": image}, "What?"], 1))
    refused(lambda: engine.generate([{"type": "image", "image": image}, "What?"], 1, prefill_chunk_size=50))
    for video in videos:
        refused(lambda video=video: engine.generate([{"type": "video", "video": video}, "What?"], 1))


def test_pixels_that_are_held_in_another_way(engine):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    for same in (
        pixels[::-1].copy()[::-1],
        np.asfortranarray(pixels),
        torch.from_numpy(pixels)[:, ::1].expand(8, 12, 3),
    ):
        assert load_image(same).tobytes() == pixels.tobytes()
    frozen = pixels.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(frozen).tobytes() == pixels.tobytes()


EMBEDDINGS = {
    "object": np.zeros((2, WIDTH), object),
    "longdouble": np.zeros((2, WIDTH), np.longdouble),
    "text": np.full((2, WIDTH), "a"),
    "sparse": torch.ones(2, WIDTH).to_sparse(),
    "meta": torch.zeros(2, WIDTH, device="meta"),
    "fp8": torch.zeros(2, WIDTH).to(torch.float8_e4m3fn),
    "1e300": torch.full((2, WIDTH), 1e300, dtype=torch.float64),
    "complex": torch.zeros(2, WIDTH, dtype=torch.complex64),
    "bool": torch.ones(2, WIDTH, dtype=torch.bool),
    "quantised": quantised(torch.ones(2, WIDTH)),
    "nested": nested(torch.ones(2, WIDTH)),
    "no sides": torch.tensor(1.0),
    "nothing": torch.ones(0, WIDTH),
    "nan": torch.full((2, WIDTH), math.nan),
    "minus inf": np.full((2, WIDTH), -np.inf),
    "masked": np.ma.masked_array(np.ones((2, WIDTH)), mask=True),
    "list": [[0.0] * WIDTH],
    "complex array": np.zeros((2, WIDTH), complex),
    "integers": np.zeros((2, WIDTH), int),
    "words": Raises(),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("size", [None, 100])
def test_embeddings_of_other_types(engine, refused, name, size):
    part = {"type": "embedding", "embedding": EMBEDDINGS[name]}
    refused(lambda: engine.generate([part, "What?"], 1, prefill_chunk_size=size))


def test_embeddings_that_are_held_in_another_way(engine):
    rows = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0))
    wanted = engine.generate([{"type": "embedding", "embedding": rows}, "What?"], 1, output_logits=True).logits
    frozen = rows.numpy().copy()
    frozen.flags.writeable = False
    doubles = rows.numpy().astype(">f8")
    for same in (rows.clone().requires_grad_(), frozen, doubles, rows.double(), np.asfortranarray(rows.numpy())):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours = engine.generate([{"type": "embedding", "embedding": same}, "What?"], 1, output_logits=True).logits
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_must_fit_the_models_type(dtype):
    part = EmbeddingPart(torch.full((1, 4), 1e6))
    if dtype == torch.bfloat16:
        return part.check_fit(4, dtype, "here")
    with pytest.raises(
        InputError, match=r"here: .* up to 1e\+06, too large for this model's torch.float16.* 6.55e\+04"
    ):
        part.check_fit(4, dtype, "here")


def test_lone_surrogates_are_found_before_the_first_piece(engine, refused):
    """Also where they stand behind pictures that go in before."""
    for size in (None, 70):
        for content in ("\ud800", [PICTURE, PICTURE, PICTURE, "a\udcff"]):
            refused(lambda c=content, s=size: engine.generate([*c], 1, prefill_chunk_size=s), "refused the")
            refused(lambda c=content, s=size: engine.chat(prefill_chunk_size=s).send(c, 1), "refused the")
        refused(lambda s=size: engine.chat(system="\udc80", prefill_chunk_size=s).send("a", 1), "refused the")


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": np.array(["user", "x"]), "content": "a"}],
        [{"role": torch.ones(3), "content": "a"}],
        [{"role": Raises(), "content": "a"}],
        [{"role": "user" * 1000, "content": "a"}],
        [{"role": "user", "content": b"a"}],
        [{"role": "user", "content": torch.ones(3)}],
        [{"role": "user", "content": np.array("a")}],
        [{"role": "user", "content": {"type": "text", "text": "a"}}],
        [{"role": "user", "content": [b"a"]}],
        [{"role": "user", "content": [["a"]]}],
        [{"role": "user", "content": [{"type": "images", "images": b"ab"}]}],
        [{"role": "user", "content": "a", "name": "bob"}],
        [{"role": "user", "content": "a", "tool_calls": []}],
        [{"role": "user", "content": "a", 3: 4}],
        [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}],
        [{"role": "user", "content": [{**PICTURE, "min_pixels": 4}]}],
        [{"role": "user", "content": [{**PICTURE, "text": "a"}]}],
        [{"role": "user", "content": [{**PICTURE, "x" * 5000: 1}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}],
        [{"role": "user", "content": [{"type": "video", "video": np.zeros((1, 8, 8, 3), np.uint8), "fps": 2}]}],
        [{"role": "user", "content": [{"type": "text", "text": Raises()}]}],
        [{"role": "user", "content": [{"type": Raises()}]}],
        [{"role": "user", "content": [{"type": "embedding", "embedding": torch.ones(1, WIDTH), "modality": Raises()}]}],
        [{"role": "user", "content": range(3)}],
        range(3),
        torch.ones(3),
        b"abc",
        {},
    ],
)
@pytest.mark.parametrize("size", [None, 100])
def test_odd_messages(engine, refused, messages, size):
    refused(lambda: engine.generate(messages, 1, prefill_chunk_size=size))


def test_mappings_of_any_kind_are_messages_and_parts(engine):
    plain = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "What?"}]}]
    wanted = engine.generate(plain, 1, output_logits=True).logits
    for kind in (UserDict, MappingProxyType, lambda given: {**given, "name": None}):
        chat = [kind({"role": "user", "content": [kind(PICTURE), kind({"type": "text", "text": "What?"})]})]
        for size in (None, 100):
            ours = engine.generate(chat, 1, output_logits=True, prefill_chunk_size=size).logits
            torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    run = MappingProxyType({"type": "images", "images": [PICTURE["image"]]})
    assert torch.equal(engine.generate([run, "What?"], 1, output_logits=True).logits, wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"fps": "1"}, {"fps": [1]}, {"fps": True}, {"fps": math.nan}, {"fps": math.inf}, {"fps": -1}, {"fps": 1j},
        {"fps": torch.ones(2)}, {"fps": 10**400}, {"num_frames": "8"}, {"num_frames": 0}, {"num_frames": 8.0},
        {"num_frames": True}, {"num_frames": None}, {"num_frames": np.ones(2)}, {"max_video_tokens": "a"},
        {"max_video_tokens": math.nan}, {"max_video_tokens": math.inf}, {"max_video_tokens": -5},
        {"max_video_tokens": [1]}, {"max_video_tokens": False}, {"allow_remote": "yes"}, {"allow_private_hosts": 1},
        {"fps": Raises()}, {"num_frames": Raises()}, {"num_frames": "8" * 5000},
    ],
)  # fmt: skip
def test_odd_options_of_media(engine, refused, options):
    for act in (
        lambda: engine.generate("a", 1, **options),
        lambda: engine.stream("a", 1, **options),
        lambda: engine.chat(**options),
        lambda: engine.check("a", **options),
        lambda: MediaOptions(**options),
    ):
        refused(act)


def test_rates_that_numbers_of_other_kinds_say():
    for fps in (2, 2.0, Fraction(2), np.float32(2), np.int64(2)):
        assert MediaOptions(fps=fps).fps == 2


def test_odd_turns(engine, refused):
    chat = engine.chat()
    for act in (
        lambda: chat.send(""),
        lambda: chat.send(b"a"),
        lambda: chat.send(None),
        lambda: chat.send([]),
        lambda: chat.send(3),
        lambda: chat.read(None),
        lambda: chat.read(b"a"),
        lambda: chat.read([None]),
        lambda: chat.read({"type": "text", "text": "a"}),
        lambda: chat.read(Raises()),
    ):
        refused(act)
    chat.read([])
    assert chat.send("What?", 1).token_ids


def paths(folder):
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    (folder / "loop.png").symlink_to("loop.png")
    odd = os.fsdecode(bytes(folder) + b"/\xff\xfe.png")
    return [
        folder / "empty.png", folder / "folder.png", folder / "pipe.png", folder / "loop.png", "/dev/zero", "/dev/null",
        odd, "", " ", "~", "a\0b", f"file://{folder}/empty.png", "FILE:/etc/hostname", "file:etc", "data:", "data:,",
        "data:image/png;base64", "data:image/png;base64,", "://", "a" * 300,
    ]  # fmt: skip


def test_odd_paths(engine, refused, tmp_path):
    for path in paths(tmp_path):
        for kind in ("image", "video"):
            refused(lambda p=path, k=kind: engine.generate([{"type": k, k: p}, "What?"], 1), "")
        for load in (load_image, load_video):
            with pytest.raises(InputError) as caught:
                load(path)
            str(caught.value).encode()


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, monkeypatch):
    """It may come there after the path was looked at."""
    os.mkfifo(tmp_path / "a.png")
    monkeypatch.setattr(sources, "check_source", lambda *_, **__: None)
    for load in (load_image, load_video):
        with pytest.raises(InputError, match="not a regular file"):
            load(tmp_path / "a.png")


def test_bombs_of_arrays_and_frames(refused):
    too_large = np.broadcast_to(np.zeros(3, np.uint8), (1, 20_000, 20_000, 3))
    refused(lambda: load_image(too_large[0]), "20000 x 20000 pixels")
    refused(lambda: load_video(too_large), "20000 x 20000 pixels")
    refused(lambda: VideoPart(too_large), "20000 x 20000 pixels")


@pytest.mark.parametrize(
    "metadata",
    [
        {"frames_indices": [0]}, {"frames_indices": 3}, {"frames_indices": "ab"}, {"fps": "1"}, {"fps": -1},
        {"fps": math.nan}, {"duration": True}, {"total_num_frames": 0}, {"name": "a"}, 3, [1],
    ],
)  # fmt: skip
def test_odd_metadata(metadata):
    with pytest.raises(InputError, match="wanted"):
        VideoPart(np.zeros((2, 8, 8, 3), np.uint8), metadata)


def test_words_about_values_are_few():
    for value in (
        "a" * 10**6,
        list(range(10**6)),
        10**3000,
        {"a" * 500: "b" * 500},
        np.zeros(10**6),
        "\ud800",
        Raises(),
    ):
        assert len(shown(value)) <= 200 and shown(value).encode()
        if not isinstance(value, Raises):
            assert len(shortened(value)) <= 200
    assert shown("a'b") == '"a\'b"' and shortened("short") == "short"
    assert issubclass(InputError, MminferError)


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("wrong", [U8.bfloat16(), np.zeros((8, 8), np.uint8), 5, b"x", {"a": 1}])
def test_what_is_no_medium_is_seen_before_the_first_piece(engine, refused, kind, wrong):
    content = [PICTURE, "Which code?", {"type": kind, kind: wrong}, "And now?"]
    refused(lambda: engine.generate([{"role": "user", "content": content}], 1, prefill_chunk_size=40))
    refused(lambda: engine.chat(prefill_chunk_size=40).read(content))
    frames = [PICTURE, "Which code?", {"type": "video", "video": [Image.new("RGB", (8, 8)), wrong]}]
    refused(lambda: engine.chat(prefill_chunk_size=40).read(frames))
