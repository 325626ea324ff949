"""From typed chats to model inputs, by the host's own processor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature

from mminfer.errors import InputError, shortened
from mminfer.inputs.embeddings import given_rows
from mminfer.inputs.markers import Markers
from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, Part, VideoPart
from mminfer.layout import GIVEN_ROWS

LEFT_PADDED = {"padding": True, "padding_side": "left"}


@dataclass(frozen=True)
class InputBuilder:
    """Makes model inputs.

    Args:
        processor: the host's, with a chat template.
        markers: its marks.
        device: where the tensors go.
        dtype: of the floating-point tensors; None leaves them as they are.
    """

    processor: Any
    markers: Markers
    device: torch.device | str
    dtype: torch.dtype | None

    def batch(self, chats: Sequence[Sequence[Message]]) -> dict[str, Any]:
        """Model inputs of whole chats, by the processor's own chat template, padded on the left to one batch.

        Returns:
            What the processor gives; beside it, under `GIVEN_ROWS`, which rows are embeddings of the user's, if any.

        Raises:
            InputError: a text holds a placeholder of an image or video, or the processor refuses the chats.
        """
        if not chats:
            raise InputError("the batch is empty: wanted at least one chat")
        parts = [part for chat in chats for message in chat for part in message.parts]
        self.markers.check_placeholders(parts)
        if any(isinstance(part, EmbeddingPart) for part in parts):
            self.markers.check_fillers(parts)
        try:
            inputs = self.processor.apply_chat_template(
                [[self._host_message(message) for message in chat] for chat in chats],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"text_kwargs": dict(LEFT_PADDED), **_video_kwargs(parts)},
            )
        except InputError:
            raise
        except Exception as error:  # templates and processors raise anything
            raise InputError(f"{type(self.processor).__name__} refused the chat: {shortened(error)}") from error
        return self._finished(inputs, parts)

    def piece(self, rendered: str, parts: Sequence[Part], *, first: bool) -> dict[str, Any]:
        """Model inputs of a piece of a rendered chat.

        Args:
            rendered: what the chat template made, with a placeholder for each image and video, and fillers for rows of
                embeddings.
            parts: the piece's images, videos and embeddings, each kind in the order of the text.
            first: whether the chat begins here; tokenizers may put a start token there.

        Raises:
            InputError: the processor refuses the piece.
        """
        start = self.processor.tokenizer.bos_token
        special = first and not (start is not None and rendered.startswith(start))
        images = [part.image for part in parts if isinstance(part, ImagePart)]
        videos = [part.frames for part in parts if isinstance(part, VideoPart)]
        try:
            inputs = self.processor(
                text=[rendered],
                images=[images] if images else None,
                videos=[videos] if videos else None,
                text_kwargs={"add_special_tokens": special},
                return_tensors="pt",
                **_video_kwargs(parts),
            )
        except Exception as error:  # processors raise anything
            raise InputError(f"{type(self.processor).__name__} refused the turn: {shortened(error)}") from error
        return self._finished(inputs, parts)

    def _host_message(self, message: Message) -> dict[str, Any]:
        """A message of the host's own, media among its parts."""
        return {"role": message.role, "content": [self._host_part(part) for part in message.parts]}

    def _host_part(self, part: Part) -> dict[str, Any]:
        if isinstance(part, ImagePart):
            return {"type": "image", "image": part.image}
        if isinstance(part, VideoPart):
            return {"type": "video", "video": part.frames, "metadata": part.metadata}
        return self.markers.template_part(part)

    def _finished(self, inputs: BatchFeature, parts: Sequence[Part]) -> dict[str, Any]:
        """On the device, and with the rows of embeddings."""
        finished = dict(inputs.to(device=self.device, **({} if self.dtype is None else {"dtype": self.dtype})))
        embeddings = [part for part in parts if isinstance(part, EmbeddingPart)]
        if embeddings:
            mask = finished.get("attention_mask")
            finished[GIVEN_ROWS] = given_rows(finished["input_ids"], mask, self.markers.filler_id, embeddings)
        return finished


def _video_kwargs(parts: Iterable[Part]) -> dict[str, Any]:
    """The frames are sampled already; the processor gets their times."""
    metadata = [part.metadata for part in parts if isinstance(part, VideoPart)]
    return {"videos_kwargs": {"do_sample_frames": False, "video_metadata": metadata}} if metadata else {}
