"""Time and memory of whole answers, stage by stage: the unpatched host and settings of ours, in turn in one process.

    python -m benchmarks.models.answers --models nano --images 16 64
    python -m benchmarks.models.answers --models 0.5b --images 4 --repeats 3

The rows of `mminfer bench`, on nano and on LLaVA-OneVision-0.5B's geometry with its vision tower
(random weights).
"""

import argparse

from benchmarks.common import write_rows
from benchmarks.models.geometries import llava_onevision_05b_engine
from mminfer import Engine, InferenceConfig
from mminfer.bench.contexts import made_contexts
from mminfer.bench.speed import measure

PRESETS = ("off", "aim-merge", "aim", "lookm-20", "balanced", "fast", "downsample", "fastv")
MODELS = {
    "nano": lambda: Engine.from_pretrained("nano"),
    "0.5b": lambda: llava_onevision_05b_engine(InferenceConfig()),
}
SIZES = {"nano": None, "0.5b": 384}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["nano"], choices=list(MODELS))
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--settings", nargs="+", default=list(PRESETS))
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="answers", help="name of the CSV in benchmarks/results; '-' for none")
    args = parser.parse_args()
    settings = {name: InferenceConfig.from_preset(name) for name in args.settings}
    for model in args.models:
        engine = MODELS[model]()
        for images in args.images:
            (context,) = made_contexts(images, 1, 1, 0, SIZES[model])
            chats = [context.chat(context.questions[0])]
            found = measure(engine, settings, chats, args.new_tokens, args.repeats)
            rows = [{"model": model, "images": images, **row.to_dict()} for row in found]
            for row in rows:
                print({k: row[k] for k in ("model", "images", "setting", "ttft_ms_p50", "tpot_ms_p50")}, flush=True)
            if args.out != "-":
                print(write_rows(args.out, rows, key=("model", "images", "setting")), flush=True)


if __name__ == "__main__":
    main()
