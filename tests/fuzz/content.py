"""Content, options and arguments as strategies: sound ones, and whatever else may stand in their place."""

import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image

from mminfer.running.arguments import HONOURED, NUMBERS, REASONS, SWITCHES
from tests.fuzz.watching import engine_of
from tests.inputs.media_bytes import IMAGES, whole_file
from tests.inputs.test_chunk_tokens import TEXTS
from tests.inputs.test_odd_inputs import EMBEDDINGS, PIXELS, WIDTH, Raises
from tests.running.test_arguments import WRONG


class Wordless(Raises):
    """Which hypothesis can print."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text("Raises()")


ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**70, 0.5, 1e308, math.inf, math.nan, "", "x", "x" * 5000, "\ud800", b"x",
    (), [], [[]], [None] * 3000, {}, {"x" * 3000: 1}, {1}, 3 + 4j, object(), Wordless(), int, lambda *_: None,
    torch.ones(2), torch.ones(1, device="meta"), np.array("a"), np.ones((2, 2)), 10**400,
]  # fmt: skip
odd = st.sampled_from(range(len(ODD))).map(ODD.__getitem__)
UNICODE = [
    "\0",
    "\u202eabc",
    "e\u0301" * 3,
    "\N{FAMILY}\u200d",
    "\U0001f469\u200d\U0001f467",
    "\ufdfa",
    "\ufeff",
    "\u2028",
]
MODES = ["RGB", "L", "RGBA", "P", "1", "LA", "CMYK", "I", "F"]


class Parts:
    """An iterable of parts that is no list, and can be gone through again.

    Args:
        parts: what it gives.
        breaks: whether it raises behind them.
    """

    def __init__(self, parts: list[Any], breaks: bool = False) -> None:
        self.parts, self.breaks = parts, breaks

    def __iter__(self) -> Iterator[Any]:
        yield from self.parts
        if self.breaks:
            raise ValueError("x" * 5000)

    def __repr__(self) -> str:
        return f"Parts({self.parts!r}, {self.breaks})"


def shown(value: Any) -> str:
    """Its words; "" where it has none."""
    try:
        return repr(value)
    except Exception:  # what is drawn may raise anything
        return ""


@functools.cache
def marks() -> list[str]:
    """What stands for something else in rendered text."""
    return sorted(engine_of("off").processor.tokenizer.get_added_vocab())


@functools.cache
def folder() -> Path:
    """A whole file of every format of images, one cut in the middle, and a clip."""
    path = Path(tempfile.mkdtemp(prefix="mminfer-fuzz-"))
    for kind in IMAGES:
        (path / f"{kind}.{kind.lower()}").write_bytes(whole_file(kind))
    (path / "cut.png").write_bytes(whole_file("PNG")[:400])
    (path / "clip.mp4").write_bytes(whole_file("mp4"))
    return path


def texts() -> st.SearchStrategy[str]:
    return st.one_of(
        TEXTS, st.text(max_size=8), st.sampled_from(UNICODE), st.deferred(lambda: st.sampled_from(marks()))
    )


@st.composite
def images(draw: st.DrawFn) -> dict[str, Any]:
    """A part of an image: PIL in any mode, an array, a file, or a run of images."""
    height, width, shade = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(0, 255))
    kind = draw(st.sampled_from(["pil", "pil", "array", "tensor", "file", "images"]))
    pixels = (np.arange(height * width * 3).reshape(height, width, 3) * 7 + shade).astype(np.uint8)
    made: dict[str, Any] = {
        "pil": lambda: Image.fromarray(pixels).convert(draw(st.sampled_from(MODES))),
        "array": lambda: pixels,
        "tensor": lambda: torch.from_numpy(pixels),
        "file": lambda: folder() / f"{(name := draw(st.sampled_from(IMAGES)))}.{name.lower()}",
    }
    if kind == "images":
        run = [Image.fromarray(pixels)] * draw(st.integers(0, 3))
        return {"type": "images", "images": run if draw(st.booleans()) else Parts(run)}
    return {"type": "image", draw(st.sampled_from(["image", "image", "path", "url"])): made[kind]()}


@st.composite
def videos(draw: st.DrawFn) -> dict[str, Any]:
    shade, frames = draw(st.integers(0, 200)), draw(st.integers(1, 3))
    arrays = np.arange(frames * 32 * 32 * 3).reshape(frames, 32, 32, 3)
    given = draw(st.sampled_from([(arrays + shade).astype(np.uint8), str(folder() / "clip.mp4")]))
    return {"type": "video", "video": given}


@st.composite
def embeddings(draw: st.DrawFn) -> dict[str, Any]:
    rows = torch.randn(draw(st.integers(1, 4)), WIDTH, generator=torch.Generator().manual_seed(1))
    kinds = [rows, rows.double(), rows.half(), rows.numpy()]
    part = {"type": "embedding", "embedding": draw(st.sampled_from(kinds))}
    return part | draw(st.sampled_from([{}, {"modality": "text"}, {"modality": "visual"}]))


def sound_parts() -> st.SearchStrategy[Any]:
    text = st.one_of(texts(), texts().map(lambda text: {"type": "text", "text": text}))
    return st.one_of(text, text, images(), images(), videos(), embeddings())


def odd_parts() -> st.SearchStrategy[Any]:
    """Something in the place of a part, or a part with something in the place of its value."""
    return st.one_of(
        odd,
        st.sampled_from(sorted(PIXELS)).map(lambda name: {"type": "image", "image": PIXELS[name]}),
        st.sampled_from(sorted(PIXELS)).map(lambda name: {"type": "video", "video": PIXELS[name]}),
        st.sampled_from(sorted(EMBEDDINGS)).map(lambda name: {"type": "embedding", "embedding": EMBEDDINGS[name]}),
        st.builds(
            lambda kind, key, value: {"type": kind, key: value},
            st.sampled_from(["text", "image", "video", "images", "embedding", "audio"]),
            st.sampled_from(["text", "image", "video", "images", "embedding", "path", "url", "modality", "fps"]),
            odd,
        ),
        st.builds(lambda part, value: {**part, "more": value}, st.one_of(images(), videos(), embeddings()), odd),
        st.builds(lambda value: {"type": "image", "image": value}, st.sampled_from(["gone.png", "http://a/b.png"])),
        st.builds(lambda: {"type": "image", "image": folder() / "cut.png"}),
    )


@st.composite
def contents(draw: st.DrawFn, hostile: bool) -> Any:
    """The content of a message: a string, a list of parts or another iterable."""
    if draw(st.integers(0, 4)) == 0:
        return draw(texts())
    parts = draw(st.lists(sound_parts(), min_size=1, max_size=5))
    if hostile:
        parts.insert(draw(st.integers(0, len(parts))), draw(odd_parts()))
    kind = draw(st.sampled_from(["list", "list", "list", "tuple", "iterable", "breaks" if hostile else "list"]))
    return {"list": parts, "tuple": tuple(parts)}.get(kind, Parts(parts, kind == "breaks"))


@st.composite
def chats(draw: st.DrawFn, hostile: bool) -> Any:
    """Messages of one chat; a hostile one has something wrong in one of its places."""
    places = ["part", "part", "role", "content", "key", "message", "chat"]
    wrong = draw(st.sampled_from(places)) if hostile else None
    if wrong == "chat":
        return draw(odd)
    messages = [{"role": "user", "content": draw(contents(wrong == "part"))}]
    if draw(st.integers(0, 3)) == 0:
        earlier = {"role": "user", "content": draw(contents(False))}
        messages = [earlier, {"role": "assistant", "content": draw(texts())}, *messages]
    if draw(st.integers(0, 3)) == 0:
        messages = [{"role": "system", "content": draw(texts())}, *messages]
    if wrong in ("role", "content", "key", "message"):
        at = draw(st.integers(0, len(messages) - 1))
        value = draw(odd)
        changed = {"role": {"role": value}, "content": {"content": value}, "key": {"more": value}}
        messages[at] = value if wrong == "message" else {**messages[at], **changed[wrong]}
    return messages


GENERATION = [
    {}, {}, {}, {"min_new_tokens": 2}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}, {"num_beams": 2},
    {"do_sample": True, "temperature": 0.7, "top_k": 5}, {"stop_strings": "a"}, {"eos_token_id": [5, 6]},
    {"suppress_tokens": [1]}, {"guidance_scale": 1.5}, {"bad_words_ids": [[3, 4]]}, {"sequence_bias": {(5,): 2.0}},
]  # fmt: skip
MEDIA = [{}, {}, {}, {"num_frames": 2}, {"fps": 2}, {"max_video_tokens": 64}, {"max_video_tokens": 1}]
MEDIA_NAMES = ["num_frames", "fps", "max_video_tokens", "allow_remote", "allow_private_hosts", "progress"]
NAMES = sorted(
    {*HONOURED, *NUMBERS, *SWITCHES, *REASONS, "input_ids", "nonsense", *MEDIA_NAMES} - {"prefill_chunk_size"}
)


@st.composite
def options(draw: st.DrawFn, hostile: bool) -> dict[str, Any]:
    """Arguments of `generate` beside the messages and the chunks; no answer is longer than the host's default."""
    given = {
        "max_new_tokens": draw(st.integers(1, 3)),
        **draw(st.sampled_from(GENERATION)),
        **draw(st.sampled_from(MEDIA)),
    }
    if not hostile:
        return given
    if draw(st.booleans()):
        return {**given, **draw(st.sampled_from(range(len(WRONG))).map(WRONG.__getitem__))}
    name, value = draw(st.sampled_from(NAMES)), draw(odd)
    return {**given, name: value}
