"""From checked messages to model inputs, by the host's own processor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import BatchFeature

from mminfer.errors import InputError
from mminfer.inputs.embeddings import as_text, check_fillers, filler_id, ready_rows
from mminfer.inputs.media import spread
from mminfer.inputs.messages import Message, Part
from mminfer.layout import READY

LEFT_PADDED = {"padding": True, "padding_side": "left"}


def build_inputs(
    processor: Any, chats: list[list[Message]], *, device: torch.device | str, dtype: torch.dtype | None
) -> BatchFeature:
    """Model inputs for one batch, by the processor's own chat template, padded on the left.

    Args:
        processor: the host's, with a chat template.
        chats: what `normalise_messages` gave.
        device: where the tensors go.
        dtype: of the floating-point tensors; None leaves them as they are.

    Returns:
        What the processor gives; beside it, under `READY`, which rows the user gave ready made, if any.

    Raises:
        InputError: a text holds a placeholder of an image or video, or the processor refuses the chats.
    """
    if not chats:
        raise InputError("the batch is empty: wanted at least one chat")
    parts = [part for chat in chats for message in chat for part in message["content"]]
    embeddings = [part for part in parts if part["type"] == "embedding"]
    check_placeholders(processor, parts)
    if embeddings:
        check_fillers(processor, parts)
        chats = [[_shown(message, processor) for message in chat] for chat in chats]
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
    inputs = _to(inputs, device, dtype)
    if embeddings:
        rows = ready_rows(inputs["input_ids"], inputs.get("attention_mask"), filler_id(processor), embeddings)
        inputs[READY] = rows
    return inputs


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
        rendered: what the chat template made, with a placeholder for each image and video, and fillers for embeddings.
        parts: the piece's images, videos and embeddings, as `normalise_messages` gave them.
        first: whether the chat begins here; tokenizers may put a start token there.
        device: where the tensors go.
        dtype: of the floating-point tensors; None leaves them as they are.

    Raises:
        InputError: the processor refuses the piece.
    """
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
    ready = {}
    embeddings = [part for part in parts if part["type"] == "embedding"]
    if embeddings:
        ready[READY] = ready_rows(inputs["input_ids"], None, filler_id(processor), embeddings)
    return {**_to(inputs, device, dtype), **ready}


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


def _shown(message: Message, processor: Any) -> Message:
    """The message as templates take it, embeddings as fillers."""
    parts = [as_text(part, processor) if part["type"] == "embedding" else part for part in message["content"]]
    return {**message, "content": parts}


def _video_kwargs(parts: Iterable[Part]) -> dict[str, Any]:
    """The frames are sampled already; the processor gets their times."""
    metadata = [part["metadata"] for part in parts if part["type"] == "video"]
    return {"videos_kwargs": {"do_sample_frames": False, "video_metadata": metadata}} if metadata else {}


def _to(inputs: BatchFeature, device: torch.device | str, dtype: torch.dtype | None) -> BatchFeature:
    return inputs.to(device=device) if dtype is None else inputs.to(device=device, dtype=dtype)
