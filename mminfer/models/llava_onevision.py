"""LLaVA-OneVision: LLaVA-NeXT's images, and videos that come as one run of frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mminfer.layout import Modality
from mminfer.models.llava_next import LlavaNextAdapter, LlavaNextTower
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import PIXEL_INPUTS, VisionTower


class LlavaOnevisionTower(LlavaNextTower):
    """Only an image that comes alone is cut into tiles; a frame is one."""

    def images(self, modality: Modality, inputs: Mapping[str, Any]) -> tuple[int, int, int]:
        if modality is Modality.VIDEO:
            return VisionTower.images(self, modality, inputs)
        return super().images(modality, inputs)

    def pictures(self, modality: Modality, inputs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        of_sample = inputs.get("batch_num_images")
        if of_sample is None or modality is Modality.VIDEO:
            return super().pictures(modality, inputs)
        alone = _alone(of_sample)
        if len(alone) != len(inputs[PIXEL_INPUTS[modality]]):
            return None
        found = super().pictures(modality, {k: v for k, v in inputs.items() if k != "batch_num_images"})
        return found and [{**one, "alone": single} for one, single in zip(found, alone, strict=True)]

    def chosen(self, modality: Modality, inputs: Mapping[str, Any], some: list[int]) -> dict[str, Any] | None:
        of_sample = inputs.get("batch_num_images")
        if of_sample is None or modality is Modality.VIDEO:
            return super().chosen(modality, inputs, some)
        rest = super().chosen(modality, {k: v for k, v in inputs.items() if k != "batch_num_images"}, some)
        runs = [(alone, len(list(run))) for alone, run in groupby(some, _alone(of_sample).__getitem__)]
        if rest is None or (False, 1) in runs:  # a prompt of one image would be one that comes alone
            return None
        counts = [n for alone, length in runs for n in ([1] * length if alone else [length])]
        return {**rest, "batch_num_images": of_sample.new_tensor(counts)}

    def tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        tiles, of_sample = super().tiles(inputs), inputs.get("batch_num_images")
        if of_sample is None:
            return tiles
        return [count if single else 1 for count, single in zip(tiles, _alone(of_sample), strict=False)]


def _alone(of_sample: Tensor) -> list[bool]:
    """Of each image, whether it is the only one of its prompt; of_sample: [B] int64, images of each prompt."""
    return [count == 1 for count in of_sample.tolist() for _ in range(count)]


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """Cuts a video into its frames."""

    tower_kind = LlavaOnevisionTower
    least_images_in_a_call = 2  # an image that comes alone is cut into tiles

    def split_units(self, modality: Modality, output: Any) -> list[VisualUnit]:
        if modality is Modality.IMAGE:
            return super().split_units(modality, output)
        vision = self.model.config.vision_config
        per_frame = math.ceil(vision.image_size // vision.patch_size / 2) ** 2
        units = []
        for video in output.pooler_output:  # [frames * per_frame, C], and a newline that older hosts add later
            newline = self.base.image_newline.to(video)[None]
            whole = len(video) - len(video) % per_frame
            odd = len(video) - whole > 1 or per_frame == 1  # not so many frames: then it is looked at
            ended = torch.equal(video[-1:], newline) if odd else len(video) > whole
            frames = list((video[:-1] if ended else video).split(per_frame))
            frames[-1] = torch.cat([frames[-1], newline])
            units += [VisualUnit.of_patches(x) for x in frames]
            units[-1].size[-1] = 0
        return units
