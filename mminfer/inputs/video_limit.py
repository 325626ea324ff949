"""A limit to the visual tokens of a video: frames are left out, evenly, until it holds."""

from __future__ import annotations

from mminfer.errors import InputError
from mminfer.inputs.model_inputs import InputBuilder
from mminfer.inputs.parts import Message, TextPart, VideoPart
from mminfer.inputs.videos import frame_indices


class VideoLimit:
    """Knows what a frame takes. The processor is asked once for each size of frames.

    Args:
        builder: makes model inputs.
    """

    def __init__(self, builder: InputBuilder) -> None:
        self._builder = builder
        self._tokens: dict[tuple[int, ...], float] = {}

    def apply(self, part: VideoPart, max_tokens: int) -> VideoPart:
        """A video of no more frames than so many tokens hold, evenly spread over those it has.

        Raises:
            InputError: not even one frame fits.
        """
        per_frame = self._tokens_per_frame(part)
        count = int(max_tokens / max(per_frame, 1))
        if count < 1:
            raise InputError(
                f"max_video_tokens={max_tokens}: one frame takes {per_frame:.0f} tokens: allow at least so many"
            )
        return _chosen(part, frame_indices(min(count, len(part.frames)), len(part.frames)))

    def _tokens_per_frame(self, part: VideoPart) -> float:
        """Of two frames, as some models take frames in pairs."""
        size = part.frames.shape[1:3]
        if size not in self._tokens:
            pair = VideoPart(part.frames[[0, 0]], {**part.metadata, "frames_indices": [0, 1]})
            chat = [Message("user", (pair, TextPart("?")))]
            ids = self._builder.batch([chat])["input_ids"]
            self._tokens[size] = sum(int((ids == token).sum()) for token in self._builder.markers.visual_ids) / 2
        return self._tokens[size]


def _chosen(part: VideoPart, indices: list[int]) -> VideoPart:
    """Some frames of a video, which know where they stand in it."""
    if len(indices) == len(part.frames):
        return part
    places = [part.metadata["frames_indices"][i] for i in indices]
    return VideoPart(part.frames[indices], {**part.metadata, "frames_indices": places})
