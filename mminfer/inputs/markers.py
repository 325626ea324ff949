"""The marks of a processor: what stands for media in rendered text, and what may stand for rows of embeddings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mminfer.errors import InputError
from mminfer.inputs.content import PendingPart
from mminfer.inputs.parts import EmbeddingPart, Part, TextPart

# Special tokens of these roles belong to media or to the template, so they cannot stand for anything else.
_ROLES = (
    "image boi eoi video audio vision_start vision_end start_image end_image context_image fake_image global_image "
    "image_break image_end end_of_utterance bos eos"
)


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor.

    Raises:
        InputError: it has none, or it is no processor.
    """
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise _no_processor(processor)
    return tokenizer


def _no_processor(processor: Any) -> InputError:
    return InputError(
        f"the processor is {type(processor).__name__}: wanted the model's own, with a tokenizer and a chat template: "
        "transformers.AutoProcessor.from_pretrained(...)"
    )


class Markers:
    """Placeholders of media, and the filler of embeddings; each is found once.

    A filler is a special token that the tokenizer has to spare; a text of one filler a row holds the rows' places.

    Args:
        processor: the host's, with a chat template.

    Raises:
        InputError: it is no processor of a vision-language model.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer: Any = tokenizer_of(processor)
        if not hasattr(processor, "apply_chat_template"):
            raise _no_processor(processor)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """ "image" and "video" by their placeholders."""
        found = {kind: getattr(self._processor, f"{kind}_token", None) for kind in ("image", "video")}
        return {mark: kind for kind, mark in found.items() if mark}

    @cached_property
    def placeholders(self) -> set[str]:
        """All that may stand for a medium, also of kinds that are not taken."""
        owners = (self._processor, self._tokenizer)
        found = {getattr(o, f"{kind}_token", None) for o in owners for kind in ("image", "video", "audio", "boi")}
        return {mark for mark in found if mark}

    @cached_property
    def visual_ids(self) -> set[int]:
        """Token ids of an image's and a video's rows."""
        found = {getattr(self._processor, f"{kind}_token_id", None) for kind in ("image", "video")}
        return {token for token in found if token is not None}

    @cached_property
    def added_ids(self) -> frozenset[int]:
        """Tokens beside the vocabulary that texts are cut into: placeholders, and all that templates write."""
        return frozenset(self._tokenizer.get_added_vocab().values()) | frozenset(self.visual_ids)

    @cached_property
    def plain_id(self) -> int:
        """A token that stands for no more than text."""
        return next(token for token in range(len(self.added_ids) + 1) if token not in self.added_ids)

    @cached_property
    def medium(self) -> re.Pattern[str]:
        """Matches the placeholder of an image or video, which is its group, with the mark of its beginning."""
        begin = re.escape(getattr(self._processor, "vision_start_token", None) or "")
        nothing = "(?!)"
        return re.compile(f"(?:{begin})?({'|'.join(map(re.escape, self.kinds)) or nothing})")

    def placeholder_in_front(self, text: str) -> str:
        """The placeholder that a text begins with, with the marks of its beginning and end; "" where there is none."""
        found = self.medium.match(text)
        if found is None:
            return ""
        end = getattr(self._processor, "vision_end_token", None) or ""
        return found[0] + (end if text.startswith(end, found.end()) else "")

    @cached_property
    def filler(self) -> str | None:
        """The token that stands for a row of an embedding; None where the tokenizer has none to spare."""
        owners = (self._processor, self._tokenizer)
        taken = {getattr(owner, f"{role}_token", None) for owner in owners for role in _ROLES.split()}
        template = self._rendered_probe()
        first = [getattr(self._tokenizer, "pad_token", None), getattr(self._tokenizer, "unk_token", None)]
        others = [t for t in getattr(self._tokenizer, "all_special_tokens", []) if t not in first]
        for token in [*first, *others]:
            if token and token not in taken and token not in template:
                return str(token)
        return None

    @cached_property
    def filler_id(self) -> int:
        """The token id of the filler."""
        return int(self._tokenizer.convert_tokens_to_ids(self.filler))

    def _rendered_probe(self) -> str:
        """What the chat template writes of its own."""
        chat = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
        try:
            return str(self._processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
        except Exception:  # templates raise anything; the request itself will tell
            return ""

    def template_part(self, part: Part | PendingPart) -> dict[str, Any]:
        """A part as chat templates take it: a medium is its kind alone, an embedding is a text of fillers.

        Raises:
            InputError: an embedding, and the tokenizer has no token to spare.
        """
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if not isinstance(part, EmbeddingPart):
            return {"type": part.kind}
        if self.filler is None:
            raise InputError(
                "this model's tokenizer has no special token to spare for embeddings: this model takes none"
            )
        return {"type": "text", "text": self.filler * len(part)}

    def check_placeholders(self, parts: Iterable[Part | PendingPart]) -> None:
        """Refuses texts that hold a placeholder of media: they would move images to other places.

        Raises:
            InputError: one does.
        """
        for part in parts:
            for mark in self.placeholders:
                if isinstance(part, TextPart) and mark in part.text:
                    raise InputError(
                        f"the text {part.text[:40]!r} holds {mark!r}, which stands for an image or video: "
                        "take it out and pass the medium as a part of its own"
                    )

    def holds_filler(self, part: Part | PendingPart) -> bool:
        """Whether a text of the user's holds what stands for a row: embeddings would go there."""
        return isinstance(part, TextPart) and self.filler is not None and self.filler in part.text

    def check_fillers(self, parts: Iterable[Part | PendingPart]) -> None:
        """Refuses texts that hold the filler, where embeddings come too.

        Raises:
            InputError: one does.
        """
        for part in parts:
            if isinstance(part, TextPart) and self.holds_filler(part):
                raise InputError(
                    f"the text {part.text[:40]!r} holds {self.filler!r}, which stands for rows of embeddings: "
                    "take it out"
                )
