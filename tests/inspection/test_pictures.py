"""Which picture lies under the tokens of an image."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mminfer import AIMMerge, Engine, InferenceConfig
from mminfer.inspection import inspect_chat
from mminfer.inspection.pictures import frame_pictures, image_pictures
from tests.tiny_models import llava_onevision_engine

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.2, 0.4]


def processor(**settings):
    return SimpleNamespace(image_processor=SimpleNamespace(image_mean=MEAN, image_std=STD, **settings))


def solid(colour, size=(8, 4)):
    return Image.new("RGB", size, colour)


def pixels(*colours):
    """What the processor makes of pictures of one colour each."""
    values = (torch.tensor(colours) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return values[:, :, None, None].expand(-1, 3, 6, 6)


RED, BLUE = (255, 0, 0), (0, 0, 200)


def test_a_picture_for_each_image_is_taken_as_it_is():
    given = [solid(RED), solid(BLUE)]
    inputs = {"pixel_values": pixels(BLUE, RED)}
    assert image_pictures(processor(), inputs, given, 2) == given
    assert image_pictures(processor(do_pad=True), inputs | {"image_sizes": 0}, given, 2) == given


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (1, 2, 3, 6, 6)])
def test_tiles_and_cut_pictures_come_from_the_pixels(shape):
    inputs = {"pixel_values": pixels(BLUE, RED).reshape(shape)}
    for settings, given in (({}, [solid(RED)]), ({"do_center_crop": True}, [solid(RED), solid(RED)])):
        found = image_pictures(processor(**settings), inputs, given, 2)
        assert [picture.getpixel((0, 0)) for picture in found] == [BLUE, RED] and found[0].size == (6, 6)


def test_where_nobody_knows_there_is_no_picture():
    assert image_pictures(processor(), {}, [solid(RED)], 3) == [None] * 3
    assert image_pictures(SimpleNamespace(), {"pixel_values": torch.zeros(40, 12)}, [], 2) == [None] * 2


def test_frames_that_are_joined_show_the_first():
    video = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
    assert [frame.getpixel((0, 0))[0] for frame in frame_pictures([video], 2)] == [0, 2]
    assert len(frame_pictures([video, video], 8)) == 8
    assert frame_pictures([video], 3) == [None] * 3 and frame_pictures([], 0) == []


def test_pictures_come_along_with_a_request():
    """LLaVA-OneVision cuts an image that comes alone into tiles, others not; a video is one run of frames."""
    engine = Engine(*llava_onevision_engine(), InferenceConfig(merge=AIMMerge(0.5)))
    wide, video = solid(RED, (240, 120)), np.zeros((4, 32, 32, 3), np.uint8)
    question = {"type": "text", "text": "Which image shows a blue 1?"}
    alone = inspect_chat(engine, [{"type": "image", "image": wide}, question], 2)
    assert [[grid.shape for grid in image.grids] for image in alone.images] == [[(4, 4), (4, 8)]]
    parts = [{"type": "image", "image": wide}, {"type": "video", "video": video}, {"type": "image", "image": wide}]
    several = inspect_chat(engine, [*parts, question], 2)
    assert [image.kind for image in several.images] == ["image", *["frame"] * 4, "image"]
    assert [image.picture.size for image in several.images] == [(240, 120), *[(32, 32)] * 4, (240, 120)]
    assert "".join(several.texts).replace("<|user|>", "").startswith("Which image shows")
