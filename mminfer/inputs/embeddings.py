"""Ready-made embeddings as parts of a message: what they may be, and which rows of a prompt they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mminfer.errors import InputError
from mminfer.layout import Modality, ReadyRows

MODALITIES = {"visual": Modality.IMAGE, "text": Modality.TEXT}
# Special tokens of these roles belong to media or to the template, so they cannot stand for anything else.
_ROLES = (
    "image boi eoi video audio vision_start vision_end start_image end_image context_image fake_image global_image "
    "image_break image_end end_of_utterance bos eos"
)


def checked_embedding(part: dict[str, Any], hidden_size: int | None) -> Tensor:
    """The part's embedding, [n, C].

    Args:
        part: {"type": "embedding", "embedding": [n, C] tensor or array, "modality": "visual" (default) or "text"}.
        hidden_size: C of the model; None: not known yet.

    Raises:
        InputError: wrong type, shape, width, modality, or values that are not finite.
    """
    modality = part.get("modality", "visual")
    if not isinstance(modality, str) or modality not in MODALITIES:
        raise InputError(f'"modality" is {modality!r}: wanted "visual" or "text"')
    found = part.get("embedding")
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(found))
    if not isinstance(found, Tensor) or not found.is_floating_point():
        what = f"{found.dtype} values" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(f'"embedding" is {what}: wanted a floating-point tensor [n, C]')
    if found.dim() != 2 or not found.numel():
        raise InputError(f'"embedding" has shape {list(found.shape)}: wanted [n, C] with n of 1 or more')
    if hidden_size is not None and found.shape[1] != hidden_size:
        raise InputError(
            f'"embedding" has shape {list(found.shape)}: this model\'s rows are {hidden_size} wide, wanted '
            f"[n, {hidden_size}]"
        )
    if not bool(found.isfinite().all()):
        raise InputError('"embedding" holds values that are not finite: wanted numbers only')
    return found.detach()


def filler_token(processor: Any) -> str | None:
    """A special token that stands for a ready-made row in rendered text; None where the tokenizer has none to spare."""
    tokenizer = processor.tokenizer
    owners = (processor, tokenizer)
    taken = {getattr(owner, f"{role}_token", None) for owner in owners for role in _ROLES.split()}
    try:
        probe = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": "a"}]}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # templates raise anything; the request itself will tell
        probe = ""
    first = [getattr(tokenizer, "pad_token", None), getattr(tokenizer, "unk_token", None)]
    others = [t for t in getattr(tokenizer, "all_special_tokens", []) if t not in first]
    for token in [*first, *others]:
        if token and token not in taken and token not in probe:
            return str(token)
    return None


def as_text(part: dict[str, Any], processor: Any) -> dict[str, Any]:
    """An embedding as a text part of one filler a row.

    Raises:
        InputError: the tokenizer has no token to spare.
    """
    filler = filler_token(processor)
    if filler is None:
        raise InputError("this model's tokenizer has no special token to spare for embeddings: this model takes none")
    return {"type": "text", "text": filler * len(part["embedding"])}


def check_fillers(processor: Any, parts: Iterable[dict[str, Any]]) -> None:
    """Refuses texts that hold what stands for a row: embeddings would go there.

    Raises:
        InputError: one does.
    """
    filler = filler_token(processor)
    for part in parts:
        if filler and part["type"] == "text" and filler in part["text"]:
            raise InputError(
                f"the text {part['text'][:40]!r} holds {filler!r}, which stands for rows of embeddings: take it out"
            )


def filler_id(processor: Any) -> int:
    """The token id of the filler."""
    return int(processor.tokenizer.convert_tokens_to_ids(filler_token(processor)))


def ready_rows(input_ids: Tensor, mask: Tensor | None, filler: int, parts: Iterable[dict[str, Any]]) -> ReadyRows:
    """Where the embeddings of these parts, in order, stand in the prompt.

    Args:
        input_ids: [B, N].
        mask: [B, N], 0 at padding; None: no padding.
        filler: the token id that stands for a row.
        parts: embedding parts.

    Raises:
        InputError: the template dropped some.
    """
    places = input_ids == filler if mask is None else (input_ids == filler) & mask.bool()
    given = list(parts)
    lengths = [len(part["embedding"]) for part in given]
    if int(places.sum()) != sum(lengths):
        raise InputError(
            f"the model's chat template shows {int(places.sum())} of {sum(lengths)} rows of the embeddings: this model "
            "takes none"
        )
    modality = torch.tensor([int(MODALITIES[part.get("modality", "visual")]) for part in given], dtype=torch.int8)
    repeats = torch.tensor(lengths)
    return ReadyRows(
        places,
        torch.cat([part["embedding"].to(input_ids.device) for part in given]),
        modality.repeat_interleave(repeats).to(input_ids.device),
        torch.repeat_interleave(repeats).to(input_ids.device),
    )
