"""How much of LOOK-M's kept set sampled scores find: the bundled model, exact scores against strided and last queries.

    python -m benchmarks.quality.scores --images 8 16 --contexts 6

Overlap: entries that both keep over entries kept, over all layers and heads; once of everything that stays and once of
what the scores choose (text, where it stays anyway, and the recent window left out).
"""

import argparse
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.common import write_rows
from benchmarks.quality.needle import contexts
from mminfer import Engine, InferenceConfig, LookM
from mminfer.cache import lookm_keep
from mminfer.technique import LayerView

SAMPLED = {
    "strided 4": LookM(queries="strided", stride=4),
    "strided 8": LookM(queries="strided", stride=8),
    "strided 16": LookM(queries="strided", stride=16),
    "last 64": LookM(queries="last", window=64),
}


class Overlap:
    """Entries kept by exact scores, and those of them that sampled scores keep too."""

    def __init__(self) -> None:
        self.kept = {name: [0, 0] for name in SAMPLED}
        self.chosen = {name: [0, 0] for name in SAMPLED}

    def add(self, technique: LookM, view: LayerView) -> None:
        entries = view.entries
        important, recent = technique.quota(view.tokens_seen, view.layer_idx)
        exact = technique.score(replace(view, attention_mass=None))
        certain = torch.zeros_like(entries.is_visual)
        certain[..., len(entries) - recent :] = True
        if technique.text_prior:
            certain |= ~entries.is_visual
        masks = []
        for scores in (exact, *(s.score(replace(view, attention_mass=None)) for s in SAMPLED.values())):
            kept = lookm_keep(scores, entries.is_visual, important, recent, technique.text_prior)
            masks.append(torch.zeros_like(certain).scatter_(-1, kept, True))
        for name, mask in zip(SAMPLED, masks[1:], strict=True):
            _count(self.kept[name], masks[0], mask)
            _count(self.chosen[name], masks[0] & ~certain, mask)


def _count(into: list[int], exact: torch.Tensor, sampled: torch.Tensor) -> None:
    into[0] += int((exact & sampled).sum())
    into[1] += int(exact.sum())


def measure(images: int, count: int, text_prior: bool, kept: float) -> list[dict[str, Any]]:
    """One row a way to sample."""
    plain = Engine.from_pretrained("nano")
    technique = LookM(kept / 2, kept / 2, text_prior=text_prior)
    engine = Engine(plain.model, plain.processor, InferenceConfig(cache=technique))
    overlap, apply = Overlap(), LookM.apply

    def watched(self: LookM, view: LayerView) -> Any:
        overlap.add(self, view)
        return apply(self, view)

    with mock.patch.object(LookM, "apply", watched):
        for n, (content, _) in enumerate(contexts(images, 10_000, 7)):
            if n == count:
                break
            engine.chat().read(content)
    rows = []
    for name in SAMPLED:
        both, total = overlap.kept[name]
        chosen, choices = overlap.chosen[name]
        rows.append({
            "queries": name, "images": images, "contexts": count, "budget": kept, "text_prior": text_prior,
            "overlap": round(both / total, 4), "overlap_of_chosen": round(chosen / choices, 4) if choices else "",
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--contexts", type=int, default=6)
    parser.add_argument("--out", default="scores", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    rows = []
    for images in args.images:
        for kept in (0.2, 0.5):
            for text_prior in (True, False):
                rows += measure(images, args.contexts, text_prior, kept)
                print(*rows[-len(SAMPLED) :], sep="\n", flush=True)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("queries", "images", "budget", "text_prior")))


if __name__ == "__main__":
    main()
