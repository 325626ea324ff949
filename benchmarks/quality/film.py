"""Films: labelled pictures that stay for some frames, and what merging leaves of them, within and over frames.

    python -m benchmarks.quality.film --frames 4 --questions 300

Behind each label of the bundled model's contexts stands a film in place of a picture: the frames of one picture, each
with a noise of its own and moved by a pixel at most. The frames of a film stand in a row with nothing between them, as
those of Qwen2-VL and LLaVA-OneVision do. Every question goes on from a copy of the cache (next-turn).
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import InternVLProcessor

from benchmarks.common import show_rows
from benchmarks.quality.lot import DropByLot
from benchmarks.quality.needle import CHUNK, Cell, contexts, judge, refer
from mminfer import AIMMerge, Engine, InferenceConfig, RegionMerge
from mminfer.bench.protocols import Part, Protocol, reader
from mminfer.layout import Modality, TokenLayout
from mminfer.technique import MergeTechnique
from mminfer.tokens.downsample import Downsample

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec

NOISE = 4.0  # of 255, standard deviation
KEY = ("setting", "frames", "images", "seed")
SHARES = (50, 25, 12.5, 6.25)  # percent of the tokens; beside them the settings that find their own share


class FilmProcessor(InternVLProcessor):
    """The bundled model's, but a video's frames stand in a row."""

    def replace_video_token(self, video_inputs: dict[str, Any], video_idx: int, **kwargs: Any) -> str:
        frames = video_inputs["pixel_values_videos"][video_idx].shape[0]
        return f"{self.start_image_token}{self.image_token * self.image_seq_length * frames}{self.end_image_token}"


@dataclass(frozen=True)
class OfFilm(MergeTechnique, register=False):
    """A merging that takes tiles for frames: InternVL's layout has no word for frames in a row.

    Args:
        merge: what merges.
    """

    merge: MergeTechnique

    def check(self, spec: "ModelSpec") -> None:
        self.merge.check(spec)

    def apply(self, inputs_embeds: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        film = layout.modality.where(~layout.is_visual, int(Modality.VIDEO))
        out, merged = self.merge.apply(inputs_embeds, replace(layout, modality=film))
        image = merged.modality.where(~merged.is_visual, int(Modality.IMAGE))
        return out, replace(merged, modality=image)

    def cost(self, spec: "ModelSpec", lengths: Sequence[int]) -> int:
        return self.merge.cost(spec, lengths)


def settings() -> dict[str, MergeTechnique | None]:
    """By name; None: nothing is merged."""
    found: dict[str, MergeTechnique | None] = {"off": None, "regions": RegionMerge()}
    found["regions over time"] = RegionMerge(across_frames=True)
    for share in SHARES:
        ratio = share / 100
        found |= {
            f"regions, {share:g} %": RegionMerge(None, None, ratio),
            f"regions over time, {share:g} %": RegionMerge(None, None, ratio, across_frames=True),
            f"AIM merge, {share:g} %": AIMMerge(ratio),
            f"AIM merge over pairs, {share:g} %": AIMMerge(ratio, across_frames=True),
            f"down-sampling, {share:g} %": Downsample(ratio),
            f"lot, {share:g} %": DropByLot(ratio),
        }
    return found


def film_of(picture: Any, frames: int, generator: torch.Generator) -> np.ndarray:
    """uint8 [frames, 32, 32, 3]: a picture that stays, moves by a pixel at most, and is noisy anew each time."""
    still, made = torch.from_numpy(np.array(picture)).float(), []
    for _ in range(frames):
        moved = torch.roll(still, torch.randint(-1, 2, (2,), generator=generator).tolist(), (0, 1))
        noisy = moved + NOISE * torch.randn(still.shape, generator=generator)
        made.append(noisy.clamp(0, 255).round().to(torch.uint8))
    return torch.stack(made).numpy()


def films(content: Sequence[Part], frames: int, seed: int) -> list[Part]:
    """The content with a film in place of every picture."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"type": "video", "video": film_of(part["image"], frames, generator)} if part["type"] == "image" else part
        for part in content
    ]


def film_engine(plain: Engine, merge: MergeTechnique | None) -> Engine:
    """The bundled model, which reads films, under a merging."""
    own, parts = plain.processor, ("image_processor", "tokenizer", "video_processor", "image_seq_length")
    processor = FilmProcessor(**{name: getattr(own, name) for name in parts}, chat_template=own.chat_template)
    return Engine(plain.model, processor, InferenceConfig(merge=None if merge is None else OfFilm(merge)))


def measure(
    chosen: dict[str, MergeTechnique | None], images: int, frames: int, questions: int, seed: int
) -> Iterator[dict[str, Any]]:
    """One row for each setting; all see the same films."""
    plain = Engine.from_pretrained("nano")
    engines = {name: film_engine(plain, merge) for name, merge in chosen.items()}
    whole, cells = film_engine(plain, None), {name: Cell() for name in chosen}
    end_id = plain.model.generation_config.eos_token_id
    for number, (pictures, asked) in enumerate(tqdm(list(contexts(images, questions, seed)), f"{frames} frames")):
        content = films(pictures, frames, 1000 * seed + number)
        reference = refer(reader(whole, content, Protocol.NEXT_TURN, CHUNK), asked)
        for name, engine in engines.items():
            judge(reader(engine, content, Protocol.NEXT_TURN, CHUNK), asked, reference, end_id, cells[name])
    for name, cell in cells.items():
        yield {"setting": name, "images": images, "frames": frames, "seed": seed} | cell.row()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="labelled films in a context")
    parser.add_argument("--frames", type=int, nargs="+", default=[4], help="of a film")
    parser.add_argument("--questions", type=int, default=300, help="least number in a cell")
    parser.add_argument("--settings", nargs="+", help="only these")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default="film", help="name of the CSV file in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    chosen = {name: merge for name, merge in settings().items() if args.settings is None or name in args.settings}
    for frames in args.frames:
        rows = list(measure(chosen, args.images, frames, args.questions, args.seed))
        show_rows(args.out, rows, KEY)


if __name__ == "__main__":
    main()
