"""Ask a question about several pictures, and see what the answer took.

python examples/quick_start.py
python examples/quick_start.py --model PATH --image a.png --image b.png --prompt "What changed?"
"""

import argparse

import mminfer
from mminfer.nano import sample_messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a hub name or a folder; 'nano' is the bundled model")
    parser.add_argument("--preset", default="regions", help="what is done to the request")
    parser.add_argument("--image", action="append", help="an image file; default: the bundled pictures")
    parser.add_argument("--prompt", default="What is in these pictures?", help="the question about them")
    args = parser.parse_args()

    if args.image:
        pictures = [{"type": "image", "image": path} for path in args.image]
        messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": args.prompt}]}]
    else:
        messages = sample_messages()  # eight labelled pictures, two facts and a question

    engine = mminfer.Engine.from_pretrained(args.model, mminfer.InferenceConfig.from_preset(args.preset))
    out = engine.generate(messages, max_new_tokens=64)
    stats = out.stats
    print(out.text)
    print(f"{stats.prompt_tokens} tokens, {stats.visual_tokens} of them visual; rows in each layer: {stats.layer_rows}")
    print(f"prompt FLOPs: {stats.prompt_flops / stats.full_prompt_flops:.0%} of the uncompressed model's")
    print(f"cache: {stats.cache_bytes / stats.full_cache_bytes:.0%}; first token after {stats.ttft_ms:.0f} ms")


if __name__ == "__main__":
    main()
