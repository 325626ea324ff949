"""Whoever reads for a model: fits typed parts to it, and turns chats into its inputs, at once or piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image

from mminfer.errors import InputError, shortened
from mminfer.inputs.assembling import Assembling
from mminfer.inputs.content import Content, Entry, MediaOptions, PendingPart
from mminfer.inputs.cutting import Cutting
from mminfer.inputs.joints import Joints
from mminfer.inputs.markers import Markers, tokenizer_of
from mminfer.inputs.messages import load_entry, parse_chat, refuse_empty
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, Part, VideoPart
from mminfer.inputs.reading import Reading
from mminfer.inputs.rendering import GroupwiseRendering, Rendering, Turn, WholeRendering
from mminfer.inputs.template import Template
from mminfer.inputs.transcript import Transcript
from mminfer.inputs.video_limit import VideoLimit
from mminfer.models.adapter import ModelAdapter
from mminfer.models.structure import running_device


class RequestReader:
    """Reads chats for one model.

    Args:
        model: the host's.
        processor: the host's, with a chat template.
        adapter: how the model is read.
    """

    def __init__(self, model: Any, processor: Any, adapter: ModelAdapter) -> None:
        self._model, self.processor, self._adapter = model, processor, adapter

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return running_device(self._model.get_input_embeddings())

    @property
    def _row_dtype(self) -> torch.dtype:
        """Of the rows that embeddings are put among."""
        dtype: torch.dtype = self._model.get_input_embeddings().weight.dtype
        return dtype if dtype.is_floating_point else self._model.dtype

    @property
    def supports_video(self) -> bool:
        """Whether the host's processor takes videos; else their frames go in as images."""
        return getattr(self.processor, "video_processor", None) is not None

    @cached_property
    def markers(self) -> Markers:
        """The processor's."""
        return Markers(self.processor)

    @cached_property
    def _template(self) -> Template:
        return Template(self.processor, self.markers)

    @cached_property
    def _video_limit(self) -> VideoLimit:
        return VideoLimit(InputBuilder(self.processor, self.markers, "cpu", None))

    @cached_property
    def _joints(self) -> Joints:
        return Joints(InputBuilder(self.processor, self.markers, "cpu", None))

    @property
    def _builder(self) -> InputBuilder:
        return InputBuilder(self.processor, self.markers, self.device, self._model.dtype)

    def check_options(self, media: MediaOptions) -> None:
        """Raises `InputError` for options that this model does not take, or where there is no processor to ask."""
        tokenizer_of(self.processor)
        if media.max_video_tokens is not None and not self.supports_video:
            raise InputError("max_video_tokens: this model takes a video as single images; use num_frames")

    def check(self, messages: Any, media: MediaOptions) -> list[Message]:
        """One chat, checked, its media loaded and fitted to the model.

        Args:
            messages: as users write them. Typed ones that fit are given back as they are.
            media: how media are taken.

        Raises:
            InputError: the chat is wrong, or does not fit the model.
        """
        self.check_options(media)
        checked = [message.load(partial(self._fitted, media)) for message in parse_chat(messages, media)]
        refuse_empty(part for message in checked for part in message.parts)
        return checked

    def inputs(self, chats: Sequence[Any], media: MediaOptions) -> dict[str, Any]:
        """Chats as the model's inputs, left-padded to one batch."""
        return self._builder.batch([self.check(chat, media) for chat in chats])

    def readings(self, messages: Any, media: MediaOptions, size: int | None) -> Callable[[], Reading]:
        """A chat to be read from its beginning, piece by piece, the media of its last message opened as they come.

        What can be told of it without opening these is checked here. A last message that is a list is also rendered
        here, once, however often it is read; an iterator is gone through anew, and rendered group by group, each time.

        Args:
            messages: as users write them.
            media: how media are taken.
            size: tokens that a piece should hold at most; None: one piece.
        """
        self.check_options(media)
        *earlier, last = parse_chat(messages, media)
        history = [message.load(partial(self._fitted, media)) for message in earlier]
        turn = Turn(
            Transcript((*map(self._template_message, history), {"role": last.role, "content": []})),
            before=[part for message in history for part in message.parts],
        )
        render = self._rendering(turn, last.content, media)
        return lambda: self._reading(render(), turn, size, last.content.expected_parts)

    def turn(
        self, transcript: Transcript, content: Any, media: MediaOptions, *, closes: bool, size: int | None
    ) -> Reading:
        """What a turn of a chat adds to what was read before.

        Args:
            transcript: what was read before.
            content: of the user's turn, or of the rest of an open one.
            media: how media are taken.
            closes: whether the turn ends with it, so that the answer is next.
            size: tokens that a piece should hold at most. None: media are all opened now, so that mistakes are found
                before anything runs, and go in at once.
        """
        ends_here = transcript.turn_is_open and isinstance(content, str) and not content.strip()
        parsed = Content([] if ends_here else content, "message 0", media)
        turn = Turn(transcript.with_open_turn(), closes)
        if size is None:
            parts = [part for entry in parsed for part in self._fitted(media, entry)]
            rendering: Rendering = WholeRendering(self._template, self.markers, turn, parts)
        else:
            rendering = self._rendering(turn, parsed, media)()
        return self._reading(rendering, turn, size, parsed.expected_parts)

    def onward(self, transcript: Transcript, messages: Sequence[Message], *, closes: bool, size: int | None) -> Reading:
        """What is new in a chat of which the first part was read before.

        Args:
            transcript: what was read before: messages of this chat, of the last one perhaps some parts.
            messages: checked ones, up to where the reading ends; the last is the user's.
            closes: whether its turn ends there, so that the answer is next.
            size: tokens that a piece should hold at most; None: one piece.
        """
        known, history, before = transcript.messages, list[dict[str, Any]](), list[Part]()
        for place, message in enumerate(messages):
            taken = known[place] if place < len(known) else {"role": message.role, "content": []}
            if place == len(messages) - 1:
                history.append(taken)
            elif place < len(known) - 1 or (taken["role"] == "assistant" and place < len(known)):
                history.append(taken)  # an answer stands there as a mark
            else:
                new = message.parts[len(taken["content"]) :]
                shown = [self.markers.template_part(part) for part in new]
                history.append({**taken, "content": [*taken["content"], *shown]})
                before += new
        parts = messages[-1].parts[len(history[-1]["content"]) :]
        turn = Turn(replace(transcript, messages=tuple(history)), closes, before)
        rendering = WholeRendering(self._template, self.markers, turn, parts)
        return self._reading(rendering, turn, size, len(parts))

    def tokens_of(self, text: str) -> list[int]:
        """The token ids of a text by itself."""
        ids: list[int] = self.processor.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _rendering(self, turn: Turn, content: Content, media: MediaOptions) -> Callable[[], Rendering]:
        """Renders a turn: a list at once, here; anything else group by group, whenever it is called."""
        parts = self._known_parts(content, media)
        if parts is not None:
            rendering = WholeRendering(self._template, self.markers, turn, parts)
            return lambda: rendering
        self.markers.check_placeholders([*turn.before, *content.known_texts])
        return lambda: GroupwiseRendering(
            self._template, self.markers, turn, (part for entry in content for part in self._fitted(media, entry))
        )

    def _reading(self, rendering: Rendering, turn: Turn, size: int | None, parts_expected: int | None) -> Reading:
        least = self._adapter.least_images_in_a_call
        cutting = Cutting(rendering, self._template, self._joints, self._count_tokens, size, least)
        assembling = Assembling(self._builder, self._adapter, turn.transcript, self._joints)
        return Reading(rendering, cutting, assembling, parts_expected)

    def _template_message(self, message: Message) -> dict[str, Any]:
        return {"role": message.role, "content": [self.markers.template_part(part) for part in message.parts]}

    def _count_tokens(self, text: str) -> int:
        try:
            return len(self.processor.tokenizer(text, add_special_tokens=False).input_ids)
        except Exception as error:  # tokenizers raise anything, on lone surrogates for instance
            raise InputError(f"{type(self.processor).__name__} refused the turn: {shortened(error)}") from error

    def _known_parts(self, content: Content, media: MediaOptions) -> list[Part | PendingPart] | None:
        """The parts of a list, media not opened; None where only opening them would tell how many there are."""
        if not content.is_list:
            return None
        parts: list[Part | PendingPart] = []
        for entry in content:
            if entry.part.kind == "video" and not self.supports_video:
                return None
            if isinstance(entry.part, PendingPart):
                parts.append(PendingPart(entry.part.kind, partial(self._only, media, entry)))
            else:
                parts += self._fitted(media, entry)
        return parts

    def _only(self, media: MediaOptions, entry: Entry) -> Any:
        (part,) = self._fitted(media, entry)
        return part

    def _fitted(self, media: MediaOptions, entry: Entry) -> Iterable[Part]:
        """What an entry is to this model, loaded: a video may be its frames."""
        (part,) = load_entry(entry)
        if isinstance(part, EmbeddingPart):
            part.check_fit(self._adapter.spec.hidden_size, self._row_dtype, entry.where)
        if not isinstance(part, VideoPart):
            return [part]
        if not self.supports_video:
            return [ImagePart(Image.fromarray(frame)) for frame in part.frames]
        part = part.lengthened(getattr(self.processor.video_processor, "temporal_patch_size", None) or 1)
        return [part if media.max_video_tokens is None else self._video_limit.apply(part, media.max_video_tokens)]
