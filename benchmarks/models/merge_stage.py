"""What the merging stage alone takes a picture: regions beside AIM's and down-sampling, by tokens of a picture.

    python -m benchmarks.models.merge_stage --repeats 15

Pictures are square grids of random features, drawn once: of text, whose tokens are all unlike, and half blank, where
those of the lower half differ by a little noise. All settings merge in turn, back and forth, in one process.
"""

import argparse
import time
from statistics import median
from typing import Any

import mminfer_kernels
import torch
from torch import Tensor

from benchmarks.common import SEED, show_rows
from mminfer import AIMMerge, RegionMerge
from mminfer.layout import Modality, TokenLayout
from mminfer.technique import MergeTechnique
from mminfer.tokens.downsample import Downsample

WIDTH = 896
TEXT, HALF = KINDS = ("text", "half blank")
SETTINGS: dict[str, MergeTechnique] = {
    "AIM merge, 50 %": AIMMerge(0.5),
    "regions": RegionMerge(),
    "regions, 50 %": RegionMerge(threshold=None, largest=None, ratio=0.5),
    "down-sampling, 50 %": Downsample(0.5),
}
KEY = ("pictures_are", "tokens", "pictures", "setting")


def batch_of(tokens: int, pictures: int, kind: str) -> tuple[Tensor, TokenLayout]:
    """Pictures of one chat, each between two tokens of text: [T, 896] and its layout."""
    own = torch.arange(pictures).repeat_interleave(tokens + 2)
    place = torch.arange(tokens + 2).repeat(pictures)
    is_patch = (place > 0) & (place <= tokens)
    generator = torch.Generator().manual_seed(SEED)
    features = torch.randn(len(own), WIDTH, generator=generator)
    if kind == HALF:
        blank = (is_patch & (place > tokens // 2)).nonzero()[:, 0]
        features[blank] = torch.ones(WIDTH) + 0.01 * features[blank]
    rows = torch.arange(len(own))
    layout = TokenLayout(
        sequence=torch.zeros_like(rows),
        modality=(is_patch * int(Modality.IMAGE)).to(torch.int8),
        image_id=own.where(is_patch, -1),
        size=torch.ones(len(rows)),
        source=rows,
        position=rows.double()[None],
        next_position=torch.tensor([float(len(rows))], dtype=torch.float64),
    )
    return features, layout


def measure(tokens: int, pictures: int, kind: str, repeats: int) -> list[dict[str, Any]]:
    """One row a setting; the first round counts not."""
    features, layout = batch_of(tokens, pictures, kind)
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    left: dict[str, float] = {}
    for turn in range(repeats + 1):
        for name, merge in list(SETTINGS.items())[:: -1 if turn % 2 else 1]:
            start = time.process_time()
            _, merged = merge.apply(features, layout)
            spent = time.process_time() - start
            left[name] = 100 * (len(merged) - 2 * pictures) / (tokens * pictures)
            if turn:
                seconds[name].append(1e3 * spent / pictures)
    first = next(iter(SETTINGS))
    rows = []
    for name, own in seconds.items():
        times_aim = median(a / b for a, b in zip(own, seconds[first], strict=True))
        facts = {"pictures_are": kind, "tokens": tokens, "pictures": pictures, "setting": name}
        figures = {"cpu_ms_median": round(median(own), 4), "cpu_ms_min": round(min(own), 4)}
        rows.append(facts | {"left": round(left[name], 1)} | figures | {"of_aim": round(times_aim, 3)})
        rows[-1]["repeats"] = repeats
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 576, 1024, 2304], help="of a picture")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="merge_stage", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    mminfer_kernels.prepare("cpu")
    for kind in args.kinds:
        for tokens in args.tokens:
            for pictures in args.pictures:
                rows = measure(tokens, pictures, kind, args.repeats)
                show_rows(args.out, rows, KEY)


if __name__ == "__main__":
    main()
