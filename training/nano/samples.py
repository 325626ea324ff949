"""Make the bundled sample context again: `python -m training.nano.samples`.

The same seed gives the same pictures and the same text; the pictures show handwriting never seen in training.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from PIL import Image

from mminfer.nano import data, samples_path

SEED = 1
NUM_IMAGES = 8
NUM_FACTS = 2
CLIP_SIDE = 128
CLIP_FPS = 4


def build_samples() -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """What `context.json` holds, and the pictures by file name."""
    context = data.sample_context(random.Random(SEED), NUM_IMAGES, NUM_FACTS, ["q1"])
    pixels = iter(data.draw_images(context, "test", SEED))
    items: list[dict[str, Any]] = []
    pictures = {}
    for item in context.items:
        if isinstance(item, data.ImageItem):
            name = f"{item.label}.png"
            pictures[name] = Image.fromarray(next(pixels).numpy())
            shows = {"digit": item.digit, "colour": item.colour_name}
            items.append({"text": item.text, "image": name, "label": item.label, **shows})
        elif isinstance(item, data.FactItem):
            items.append({"text": item.text, "word": item.word, "code": item.code})
    (question,) = context.questions
    return {"seed": SEED, "items": items, "question": question.text, "answer": question.answer}, pictures


def write_clip(path: Path, pictures: list[Image.Image]) -> None:
    """Write a video that shows each picture for a second, as large as encoders like it.

    Args:
        path: of the file; its ending chooses the container.
        pictures: all of one size.
    """
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4" if path.suffix == ".mp4" else "libvpx", rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = CLIP_SIDE, CLIP_SIDE, "yuv420p"
        stream.bit_rate = 400_000
        for picture in pictures:
            frame = av.VideoFrame.from_image(picture.resize((CLIP_SIDE, CLIP_SIDE), Image.Resampling.NEAREST))
            for _ in range(CLIP_FPS):
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_samples(folder: Path) -> None:
    """Write `context.json`, its pictures and a clip of them into a folder."""
    context, pictures = build_samples()
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / name)
    write_clip(folder / "clip.mp4", list(pictures.values()))
    (folder / "context.json").write_text(json.dumps(context, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=samples_path(), help="folder to write to")
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
