"""A chat of fifty turns, a picture each: what the cache holds after every turn, with and without a budget.

python -m benchmarks.models.turns
"""

import argparse
from typing import Any

from benchmarks.common import write_rows
from mminfer import V2PE, Engine, InferenceConfig, LookM, nano

PICTURE = {"type": "image", "image": str(nano.samples_path() / "WB.png")}
TURN = [{"type": "text", "text": "Image BD:"}, PICTURE, {"type": "text", "text": "What digit is in image BD?"}]
SETTINGS = {
    "v2pe-16": InferenceConfig(V2PE(1 / 16)),
    "v2pe-16, budget 600": InferenceConfig(V2PE(1 / 16), cache=LookM(budget=600)),
    "v2pe-16, budget 600, text may pass it": InferenceConfig(
        V2PE(1 / 16), cache=LookM(budget=600, text_overflow="keep")
    ),
    "v2pe-16, budget 600, no text prior": InferenceConfig(V2PE(1 / 16), cache=LookM(budget=600, text_prior=False)),
}


def held(engine: Engine, turns: int) -> list[dict[str, Any]]:
    """Tokens, entries and bytes behind every turn."""
    chat, rows = engine.chat(), []
    for turn in range(1, turns + 1):
        chat.send(TURN, max_new_tokens=2)
        entries = max(max(lengths) for lengths in chat.cache.lengths)
        row = {"turn": turn, "tokens": chat.cache.tokens[0], "entries": entries, "cache_bytes": chat.cache.nbytes}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--out", default="turns", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    plain, rows = Engine.from_pretrained("nano"), []
    for name, config in SETTINGS.items():
        rows += [{"setting": name, **row} for row in held(Engine(plain.model, plain.processor, config), args.turns)]
        print(rows[-1])
    if args.out != "-":
        print(write_rows(args.out, rows))


if __name__ == "__main__":
    main()
