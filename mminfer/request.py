"""From messages to model inputs: every mistake is found here, before any forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import BatchFeature

from mminfer.errors import InputError
from mminfer.media import load_image, read_video, spread

if TYPE_CHECKING:
    from mminfer.metrics.stats import GenerationStats

ROLES = ("system", "user", "assistant")
SOURCE_KEYS = {"image": ("image", "path", "url"), "video": ("video", "path", "url")}
LEFT_PADDED = {"padding": True, "padding_side": "left"}

Part = dict[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class GenerationOutput:
    """One answer.

    Attributes:
        text: the answer without special tokens.
        token_ids: what was generated, the end of the turn included.
        stats: what it cost.
        logits: [new tokens, V] float32, of every generated token, where `output_logits=True` was asked for.
    """

    text: str
    token_ids: list[int]
    stats: GenerationStats
    logits: torch.Tensor | None = None


def is_batch(messages: Any) -> bool:
    """Whether this is a list of chats; else it is one chat."""
    return isinstance(messages, (list, tuple)) and any(isinstance(chat, (list, tuple)) for chat in messages)


def normalise_messages(
    messages: Any,
    *,
    allow_remote: bool = False,
    num_frames: int = 8,
    fps: float | None = None,
    supports_video: bool = True,
) -> list[Message]:
    """Check one chat and load its media; what was given is left as it is.

    Args:
        messages: a list of {"role", "content"}, or the content of a single user message: a string or a list
            of parts. A part is a string or {"type": "text", "text": ...},
            {"type": "image", "image" | "path" | "url": ...} or
            {"type": "video", "video" | "path" | "url": ...}.
        allow_remote: fetch http(s) URLs.
        num_frames: frames to take of each video file, evenly spread.
        fps: take so many frames a second of it instead.
        supports_video: whether the model takes videos; if not, their frames go in as images.

    Returns:
        The chat with contents as lists of parts, images as RGB PIL images, videos as uint8 [F, H, W, 3] with
        the fields of their `VideoMetadata` beside them under "metadata".

    Raises:
        InputError: the chat is malformed or empty, does not end with the user, or a medium cannot be loaded.
    """
    given = _as_messages(messages)
    _check_order(given)
    checked = []
    for n, message in enumerate(given):
        content = message["content"]
        parts = [content] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            found = type(parts).__name__
            raise InputError(f"message {n}: content is {found}: wanted a string or a list of parts")
        new: list[Part] = []
        for k, part in enumerate(parts):
            where = f"message {n}, part {k}"
            new += _load_part(part, where, {"num_frames": num_frames, "fps": fps}, allow_remote, supports_video)
        checked.append({"role": message["role"], "content": new})
    if not any(p["type"] != "text" or p["text"].strip() for m in checked for p in m["content"]):
        raise InputError("the prompt is empty: wanted text, an image or a video")
    return checked


def build_inputs(
    processor: Any, chats: list[list[Message]], *, device: torch.device | str, dtype: torch.dtype | None
) -> BatchFeature:
    """Model inputs for one batch, by the processor's own chat template, padded on the left.

    Args:
        processor: the host's, with a chat template.
        chats: what `normalise_messages` gave.
        device: where the tensors go.
        dtype: of the floating-point tensors; None leaves them as they are.

    Raises:
        InputError: a text holds a placeholder of an image or video, or the processor refuses the chats.
    """
    if not chats:
        raise InputError("the batch is empty: wanted at least one chat")
    parts = [part for chat in chats for message in chat for part in message["content"]]
    check_placeholders(processor, parts)
    try:
        inputs = processor.apply_chat_template(
            # The host puts its own lists into messages: not into the caller's.
            [[dict(message) for message in chat] for chat in chats],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"text_kwargs": dict(LEFT_PADDED), **_video_kwargs(parts)},
        )
    except Exception as error:  # templates and processors raise anything
        raise InputError(f"{type(processor).__name__} refused the chat: {error}") from error
    return _to(inputs, device, dtype)


def build_piece(
    processor: Any,
    rendered: str,
    parts: list[Part],
    *,
    first: bool,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    """Model inputs for a piece of a rendered chat.

    Args:
        processor: the host's.
        rendered: what the chat template made, with a placeholder for each image and video.
        parts: the piece's parts, as `normalise_messages` gave them.
        first: whether the chat begins here; tokenizers may put a start token there.
        device: where the tensors go.
        dtype: of the floating-point tensors; None leaves them as they are.

    Raises:
        InputError: a text holds a placeholder of an image or video, or the processor refuses the piece.
    """
    check_placeholders(processor, parts)
    start = processor.tokenizer.bos_token
    special = first and not (start is not None and rendered.startswith(start))
    images = [part["image"] for part in parts if part["type"] == "image"]
    videos = [part["video"] for part in parts if part["type"] == "video"]
    try:
        inputs = processor(
            text=[rendered],
            images=[images] if images else None,
            videos=[videos] if videos else None,
            text_kwargs={"add_special_tokens": special},
            return_tensors="pt",
            **_video_kwargs(parts),
        )
    except Exception as error:  # processors raise anything
        raise InputError(f"{type(processor).__name__} refused the turn: {error}") from error
    return dict(_to(inputs, device, dtype))


def cap_video(processor: Any, part: Part, max_tokens: int) -> Part:
    """A video part of no more frames than so many tokens hold, evenly spread over those it has.

    Raises:
        InputError: not even one frame fits.
    """
    frames = part["video"]
    probe = {"type": "video", "video": frames[[0, 0]], "metadata": {**part["metadata"], "frames_indices": [0, 1]}}
    chat = [{"role": "user", "content": [probe, {"type": "text", "text": "?"}]}]
    ids = build_inputs(processor, [chat], device="cpu", dtype=None)["input_ids"]
    visual = {getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video")}
    per_frame = sum(int((ids == token).sum()) for token in visual if token is not None) / 2
    count = int(max_tokens / max(per_frame, 1))
    if count < 1:
        raise InputError(
            f"max_video_tokens={max_tokens}: one frame takes {per_frame:.0f} tokens: allow at least so many"
        )
    chosen = spread(min(count, len(frames)), len(frames))
    places = [part["metadata"]["frames_indices"][i] for i in chosen]
    return {**part, "video": frames[chosen], "metadata": {**part["metadata"], "frames_indices": places}}


def check_placeholders(processor: Any, parts: Iterable[Part]) -> None:
    """Refuse texts that hold the processor's marks for media: they would move images to other places.

    Raises:
        InputError: one does.
    """
    owners = (processor, processor.tokenizer)
    marks = {getattr(o, f"{kind}_token", None) for o in owners for kind in ("image", "video", "audio", "boi")}
    for part in parts:
        for mark in marks:
            if mark and part["type"] == "text" and mark in part["text"]:
                raise InputError(
                    f"the text {part['text'][:40]!r} holds {mark!r}, which stands for an image or video: "
                    "take it out and pass the medium as a part of its own"
                )


def _as_messages(messages: Any) -> list[Message]:
    if is_batch(messages):
        raise InputError("a list of chats where one chat was wanted: pass them one by one, or to generate()")
    if isinstance(messages, str):
        messages = [messages]
    if not isinstance(messages, (list, tuple)) or not messages:
        found = "an empty list" if isinstance(messages, (list, tuple)) else type(messages).__name__
        raise InputError(f'the messages are {found}: wanted a string or a list of {{"role", "content"}}')
    if not any(isinstance(m, dict) and m.keys() & {"role", "content"} for m in messages):
        return [{"role": "user", "content": list(messages)}]
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            keys = list(message) if isinstance(message, dict) else type(message).__name__
            raise InputError(f'message {n} is {keys}: wanted a dict with "role" and "content"')
        if message["role"] not in ROLES:
            raise InputError(f"message {n} has role {message['role']!r}: wanted one of {', '.join(ROLES)}")
    return list(messages)


def _check_order(messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise InputError(f"message {roles.index('system', 1)} is the system's: wanted at most one, in front")
    if roles[-1] != "user":
        raise InputError(f"the last message is the {roles[-1]}'s: wanted the user's, to be answered")


def _load_part(part: Any, where: str, sampling: dict[str, Any], allow_remote: bool, supports_video: bool) -> list[Part]:
    if isinstance(part, str):
        return [{"type": "text", "text": part}]
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise InputError(f'{where}: "text" is {type(part.get("text")).__name__}: wanted a string')
        return [{"type": "text", "text": part["text"]}]
    if not isinstance(kind, str) or kind not in SOURCE_KEYS:
        found = f"a part of type {kind!r}" if isinstance(part, dict) else type(part).__name__
        raise InputError(f'{where}: {found}: wanted a string or a dict of type "text", "image" or "video"')
    source = _source(part, kind, where)
    try:
        if kind == "image":
            return [{"type": "image", "image": load_image(source, allow_remote=allow_remote)}]
        frames, metadata = read_video(source, allow_remote=allow_remote, **sampling)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if supports_video:
        return [{"type": "video", "video": frames, "metadata": metadata}]
    return [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]


def _source(part: Part, kind: str, where: str) -> Any:
    keys = [key for key in SOURCE_KEYS[kind] if part.get(key) is not None]
    if len(keys) != 1:
        found = " and ".join(map(repr, keys)) if keys else "none"
        wanted = ", ".join(SOURCE_KEYS[kind])
        raise InputError(f"{where}: {kind} part with {found} of {wanted}: wanted exactly one")
    return part[keys[0]]


def _video_kwargs(parts: Iterable[Part]) -> dict[str, Any]:
    """The frames are sampled already; the processor gets their times."""
    metadata = [part["metadata"] for part in parts if part["type"] == "video"]
    return {"videos_kwargs": {"do_sample_frames": False, "video_metadata": metadata}} if metadata else {}


def _to(inputs: BatchFeature, device: torch.device | str, dtype: torch.dtype | None) -> BatchFeature:
    return inputs.to(device=device) if dtype is None else inputs.to(device=device, dtype=dtype)
