"""The nano model's eye in training: pictures to visual tokens, and heads that tell what those tokens hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import InternVLForConditionalGeneration, InternVLProcessor, PreTrainedTokenizerBase

from mminfer.nano import data
from training.nano import build


def normalise(pixels: torch.Tensor, processor: InternVLProcessor) -> torch.Tensor:
    """What the image processor does to a 32x32 picture: uint8 [B, 32, 32, 3] -> float [B, 3, 32, 32]."""
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_processor.image_std)[:, None, None]
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def vision_features(model: InternVLForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Vision tower + pixel shuffle, before the projector: [B, 64, 96]."""
    inner = model.model
    hidden = inner.vision_tower(pixel_values=pixel_values).last_hidden_state[:, 1:]
    side = int(hidden.shape[1] ** 0.5)
    hidden = inner.pixel_shuffle(hidden.reshape(len(hidden), side, side, -1), build.DOWNSAMPLE)
    return hidden.reshape(len(hidden), build.TOKENS_PER_IMAGE, -1)


class Classifier(nn.Module):
    """Reads digit and colour from the visual tokens of pictures; a subclass gives the logits."""

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Visual tokens [B, 64, C] -> logits of 10 digits and 6 colours [B, 16]."""
        raise NotImplementedError

    def forward(
        self, tokens: torch.Tensor, digits: torch.Tensor, colours: torch.Tensor
    ) -> tuple[torch.Tensor, float, float]:
        """Loss, accuracy on digits, accuracy on colours."""
        logits = self.logits(tokens)
        loss = F.cross_entropy(logits[:, :10], digits) + F.cross_entropy(logits[:, 10:], colours)
        digit_hit = (logits[:, :10].argmax(1) == digits).float().mean().item()
        colour_hit = (logits[:, 10:].argmax(1) == colours).float().mean().item()
        return loss, digit_hit, colour_hit


class Probe(Classifier):
    """Digit and colour heads on the mean visual token; used in training only, not shipped."""

    def __init__(self, hidden: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, 16)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Classifier.logits`."""
        return self.head(self.norm(tokens.mean(1)))


class Alignment(Classifier):
    """Joint-stage auxiliary loss: visual tokens should point to the words that name what they show.

    The mean (normalised) visual token is compared with the embeddings of the words for digits and colours.
    """

    def __init__(self, model: InternVLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        self.embedding = model.model.language_model.embed_tokens  # shared, not a copy
        words = data.DIGIT_NAMES + data.COLOUR_NAMES
        self.ids = torch.tensor([tokenizer(word).input_ids[0] for word in words])
        self.scale = nn.Parameter(torch.tensor(3.0))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """See `Classifier.logits`."""
        mean = F.rms_norm(tokens, tokens.shape[-1:]).mean(1)
        return self.scale * mean @ F.normalize(self.embedding.weight[self.ids], dim=1).T


def random_pictures(n: int, split: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures uint8 [n, 32, 32, 3], their digits and their colours."""
    digits = torch.randint(10, (n,), generator=generator)
    colours = torch.randint(6, (n,), generator=generator)
    return data.render(digits, colours, split, generator), digits, colours


@torch.no_grad()
def reading_accuracy(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    classifier: Classifier,
    n: int = 1000,
) -> tuple[float, float]:
    """Share of unseen digits and of colours that the classifier reads right."""
    pictures = random_pictures(n, "test", torch.Generator().manual_seed(12345))
    hits = []
    for pixels, digits, colours in zip(*(x.split(250) for x in pictures), strict=True):
        tokens = model.model.multi_modal_projector(vision_features(model, normalise(pixels, processor)))
        hits.append(classifier(tokens, digits, colours)[1:])
    digit_hits, colour_hits = zip(*hits, strict=True)
    return sum(digit_hits) / len(hits), sum(colour_hits) / len(hits)
