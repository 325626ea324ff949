"""A row for every family: its tiny model, and prompts for it.

A prompt is a list: an int n is n text tokens, IMAGE is one image, VIDEO one video of two frames.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch

from mminfer import ConfigError, InferenceConfig
from mminfer.models.registry import adapter_for
from tests import tiny_models
from tests.device import on_device
from tests.tiny_models import BREAK_ID, END_ID, EOS_ID, IMAGE_ID, LAYERS, PAD_ID, START_ID, VIDEO_ID

__all__ = ["FAMILIES", "IMAGE", "LAYERS", "MARKED_FAMILIES", "VIDEO"]

IMAGE, VIDEO = "image", "video"
TEXT_IDS = (10, 400)
TIME_ID = 401
Inputs = dict[str, torch.Tensor]
Pixels = Callable[[int, torch.Generator], Inputs]


@dataclass(frozen=True)
class Family:
    """How to make a family's tiny model and its inputs.

    Args:
        make: the model.
        image: token ids of one image, separators included.
        pixels: model inputs of n images.
        video: token ids of one video.
        video_pixels: model inputs of n videos.
        newlines: placeholders of an image that stand for no patch.
        tiles: parts of an image that the model sees as images of their own.
        types: the name under which the model takes token types.
        padded: whether pixels are padded to the most images a prompt.
    """

    make: Callable[[], Any]
    image: tuple[int, ...]
    pixels: Pixels
    video: tuple[int, ...] = ()
    video_pixels: Pixels | None = None
    newlines: int = 0
    tiles: int = 1
    types: str | None = None
    padded: bool = False

    @property
    def image_tokens(self) -> int:
        """Placeholders of an image."""
        return self.image.count(IMAGE_ID)

    @property
    def patches(self) -> int:
        """Those of them that stand for patches."""
        return self.image_tokens - self.newlines

    @property
    def video_tokens(self) -> int:
        """Placeholders of a video."""
        return self.video.count(VIDEO_ID)

    @property
    def video_patches(self) -> int:
        """Those of them that stand for patches: of two frames."""
        return self.video_tokens // 2 * 2


def _images(*shape: int, **sizes: list[int]) -> Pixels:
    def pixels(images: int, generator: torch.Generator) -> Inputs:
        made = {"pixel_values": torch.randn(images, *shape, generator=generator)}
        return made | {name: torch.tensor([size] * images) for name, size in sizes.items()}

    return pixels


def _patches(suffix: str, kind: str, grid: list[int]) -> Pixels:
    def pixels(count: int, generator: torch.Generator) -> Inputs:
        t, h, w = grid
        values = torch.randn(count * t * h * w, 3 * 2 * 16, generator=generator)
        return {f"pixel_values{suffix}": values, f"{kind}_grid_thw": torch.tensor([grid] * count)}

    return pixels


def _videos(videos: int, generator: torch.Generator) -> Inputs:
    return {"pixel_values_videos": torch.randn(videos, 2, 3, 16, 16, generator=generator)}


def _tiles(images: int, generator: torch.Generator) -> Inputs:
    """Two tiles an image."""
    pixels = torch.randn(1, 2 * images, 3, 32, 32, generator=generator)
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(1, 2 * images, 32, 32, dtype=torch.int64)}


# base 4 x 4 patches, then a row of two tiles: 4 rows of 8 patches and a newline
ANYRES: dict[str, Any] = {
    "image": (IMAGE_ID,) * (16 + 4 * 9), "newlines": 4, "pixels": _images(3, 3, 16, 16, image_sizes=[16, 32])
}  # fmt: skip
QWEN: dict[str, Any] = {
    "image": (START_ID, *[IMAGE_ID] * 24, END_ID), "pixels": _patches("", "image", [1, 8, 12]),
    "video": (START_ID, *[VIDEO_ID] * 16, END_ID), "video_pixels": _patches("_videos", "video", [2, 4, 8]),
    "types": "mm_token_type_ids",
}  # fmt: skip
TILED: dict[str, Any] = {
    "image": (START_ID, *[IMAGE_ID] * 16, START_ID, *[IMAGE_ID] * 16, START_ID), "pixels": _tiles, "tiles": 2,
    "padded": True,
}  # fmt: skip

# four rows of four tokens, each closed by a break, the last one by the end
ROWS = (*[IMAGE_ID] * 4, BREAK_ID) * 3 + (*[IMAGE_ID] * 4, END_ID)

FAMILIES = {
    "internvl": Family(tiny_models.internvl, (START_ID, *[IMAGE_ID] * 16, END_ID), _images(3, 32, 32)),
    "llava": Family(tiny_models.llava, (IMAGE_ID,) * 16, _images(3, 16, 16)),
    "llava_next": Family(tiny_models.llava_next, **ANYRES),
    "llava_onevision": Family(
        tiny_models.llava_onevision, **ANYRES, video=(VIDEO_ID,) * (2 * 4 + 1), video_pixels=_videos
    ),
    "mistral3": Family(tiny_models.mistral3, ROWS, _images(3, 32, 32, image_sizes=[32, 32])),
    "idefics3": Family(tiny_models.idefics3, **TILED),
    "smolvlm": Family(tiny_models.smolvlm, **TILED),
    "gemma3": Family(
        tiny_models.gemma3, (START_ID, *[IMAGE_ID] * 16, END_ID), _images(3, 32, 32), types="token_type_ids"
    ),
    "qwen2_vl": Family(tiny_models.qwen2_vl, **QWEN),
    "qwen2_5_vl": Family(tiny_models.qwen2_5_vl, **QWEN),
    "qwen3_vl": Family(tiny_models.qwen3_vl, **QWEN | {"video": (TIME_ID, START_ID, *[VIDEO_ID] * 8, END_ID) * 2}),
}

# For tests of many settings a family, as parameters: each family, of which `pytest -m "not slow"` takes three.
MARKED_FAMILIES = [
    family if family in ("llava", "gemma3", "qwen2_5_vl") else pytest.param(family, marks=pytest.mark.slow)
    for family in FAMILIES
]


@cache
def tiny_model(family: str) -> Any:
    """The family's model, weights drawn so that layers matter."""
    torch.manual_seed(1)
    model = FAMILIES[family].make().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.normal_(0.0, 0.08)
    model.generation_config.pad_token_id = PAD_ID
    model.generation_config.eos_token_id = EOS_ID
    model.set_attn_implementation("sdpa")
    return on_device(model)


def refusal(family: str, config: InferenceConfig) -> str | None:
    """Why the family's model cannot take these settings."""
    try:
        config.check(adapter_for(tiny_model(family)).spec)
    except ConfigError as error:
        return str(error)
    return None


def skip_if_refused(family: str, config: InferenceConfig) -> None:
    if reason := refusal(family, config):
        pytest.skip(reason)


def fitting(family: str, config: InferenceConfig) -> InferenceConfig:
    """These settings without the techniques that the family's model cannot take."""
    alone = {t.stage.value: InferenceConfig(**{t.stage.value: t}) for t in config.techniques}
    return replace(config, **{stage: None for stage, one in alone.items() if refusal(family, one)})


def tiny_rows(family: str, prompts: list[list[int | str]], seed: int = 0) -> list[Inputs]:
    """Each prompt as a batch of its own, with pixels."""
    generator = torch.Generator().manual_seed(seed)
    return [_row(FAMILIES[family], prompt, generator) for prompt in prompts]


def tiny_inputs(family: str, prompts: list[list[int | str]], seed: int = 0) -> Inputs:
    """The same prompts as one left-padded batch."""
    rows = tiny_rows(family, prompts, seed)
    longest = max(row["input_ids"].shape[1] for row in rows)
    batch: Inputs = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        if name.startswith(("pixel", "image", "video")):
            parts = [row[name] for row in rows if name in row]
            batch[name] = _padded(rows, name) if FAMILIES[family].padded else torch.cat(parts)
        else:
            tokens = [torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0)) for row in rows]
            batch[name] = torch.cat(tokens)
    return batch


def _padded(rows: list[Inputs], name: str) -> torch.Tensor:
    """[B, most images a row, ...]: rows with fewer images end in zeros."""
    parts = [row[name][0] if name in row else None for row in rows]
    like = next(part for part in parts if part is not None)
    filled = [like[:0] if part is None else part for part in parts]
    return torch.nn.utils.rnn.pad_sequence(filled, batch_first=True)


def _row(family: Family, prompt: list[int | str], generator: torch.Generator) -> Inputs:
    ids: list[int] = []
    for part in prompt:
        if isinstance(part, int):
            ids += torch.randint(*TEXT_IDS, (part,), generator=generator).tolist()
        else:
            ids += family.image if part == IMAGE else family.video
    row = {"input_ids": torch.tensor([ids])}
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    for kind, pixels in ((IMAGE, family.pixels), (VIDEO, family.video_pixels)):
        if prompt.count(kind) and pixels is not None:
            row |= pixels(prompt.count(kind), generator)
    if family.types:
        row[family.types] = (row["input_ids"] == IMAGE_ID).int() + 2 * (row["input_ids"] == VIDEO_ID).int()
    return row
