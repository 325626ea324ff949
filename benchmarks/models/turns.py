"""A chat of fifty turns, a picture each: what the cache holds after every turn, with and without a budget.

python -m benchmarks.models.turns
"""

import argparse

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--out", default="turns", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    plain, rows = Engine.from_pretrained("nano"), []
    for name, config in SETTINGS.items():
        chat = Engine(plain.model, plain.processor, config).chat()
        for turn in range(1, args.turns + 1):
            chat.send(TURN, max_new_tokens=2)
            entries = max(max(lengths) for lengths in chat.cache.lengths)
            row = {"setting": name, "turn": turn, "tokens": chat.cache.tokens[0], "entries": entries}
            rows.append({**row, "cache_bytes": chat.cache.nbytes})
        print(rows[-1])
    if args.out != "-":
        print(write_rows(args.out, rows))


if __name__ == "__main__":
    main()
