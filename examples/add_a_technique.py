"""A cache technique of one's own, in a file of one's own: it works everywhere the library's techniques do.

    python examples/add_a_technique.py

`KeyNorm` keeps the entries whose keys are short, which attention tends to look at (Devoto et al., arXiv 2406.11430),
and recent ones. Defining the class is all there is to do: it can stand in a configuration, at both doors, in a saved
configuration, in `mminfer bench` and in `mminfer inspect`. The commands load this file when they are told so:

    mminfer --technique-file examples/add_a_technique.py bench --preset key-norm-20 --preset lookm-20
    mminfer --technique-file examples/add_a_technique.py inspect --preset key-norm-20
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Self

import torch

import mminfer
from mminfer.inspection import inspect_chat
from mminfer.inspection.words import sentences
from mminfer.nano import sample_messages
from mminfer.technique import CacheEntries, CacheTechnique, LayerView, check_fraction


@dataclass(frozen=True)
class KeyNorm(CacheTechnique):
    """Keeps recent entries and those whose keys are short.

    Args:
        ratio: kept fraction of the tokens that a layer took in, in (0, 1].
        recent_share: of these, the part that is kept at the end whatever the keys say, in [0, 1].
    """

    ratio: float = 0.2
    recent_share: float = 0.5

    def __post_init__(self) -> None:
        check_fraction("KeyNorm.ratio", self.ratio)
        check_fraction("KeyNorm.recent_share", self.recent_share, zero=True)

    def apply(self, view: LayerView) -> CacheEntries:
        entries = view.entries
        budget = max(1, int(view.tokens_seen * self.ratio))
        if len(entries) <= budget:
            return entries
        recent = int(budget * self.recent_share)
        older = len(entries) - recent
        best = self.score(view)[:, :, :older].topk(budget - recent, -1).indices.sort(-1).values
        last = torch.arange(older, len(entries), device=best.device).expand(*best.shape[:2], recent)
        return entries.select(torch.cat([best, last], -1))

    def score(self, view: LayerView) -> torch.Tensor:
        """[1, G, N]; inspection shades pictures by it."""
        return -view.keys.float().norm(dim=-1)

    def describe(self) -> str:
        return f"Keeps {100 * self.ratio:g} % of the entries: recent ones and those whose keys are short."

    @classmethod
    def presets(cls) -> dict[str, Self]:
        return {"key-norm-50": cls(0.5), "key-norm-20": cls(0.2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="checkpoint folder or hub name")
    engine = mminfer.Engine.from_pretrained(parser.parse_args().model, mminfer.InferenceConfig(cache=KeyNorm(0.5)))

    output = engine.generate(sample_messages())
    print(output.text, "-", f"{output.stats.cache_bytes / output.stats.full_cache_bytes:.0%} of the cache")

    chat = engine.chat()  # read and compressed before the question is known, which is harder
    chat.read(sample_messages()[0]["content"][:-1])
    print("asked later:", chat.send("Which image shows a blue 1?").text)

    with mminfer.patched(engine.model, mminfer.InferenceConfig.from_preset("key-norm-20")) as handle:
        engine.model.generate(**engine.prepare([sample_messages()]), max_new_tokens=4)
    print("entries a layer:", [layer.entries[0] for layer in handle.records[-1].layers])

    print("\n".join(sentences(inspect_chat(engine, sample_messages(), 4))))


if __name__ == "__main__":
    main()
