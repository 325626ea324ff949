"""Ask about a video that memory would not hold as a prompt.

Frames come from an iterator and are decoded as they are needed. The prompt goes through the model in chunks, and behind
each chunk the cache is brought back to its budget: memory follows from chunk and budget, not from the video's length.

python examples/long_video.py
python examples/long_video.py --model PATH --video lecture.mp4 --fps 1 --question "When is the proof finished?"
"""

import argparse

import mminfer
from mminfer.media import frames
from mminfer.nano import samples_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a hub name or a folder; 'nano' is the bundled model")
    parser.add_argument("--video", default=str(samples_path() / "clip.mp4"), help="a video file")
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second that are looked at")
    parser.add_argument("--budget", type=int, default=256, help="cache entries a head, of the average layer")
    parser.add_argument("--chunk", type=int, default=512, help="tokens that go through the model at a time")
    parser.add_argument("--question", default="Which image shows a red 7?")
    args = parser.parse_args()

    content = [
        {"type": "images", "images": frames(args.video, fps=args.fps)},
        {"type": "text", "text": args.question},
    ]
    config = mminfer.InferenceConfig(cache=mminfer.Replay(budget=args.budget))
    engine = mminfer.Engine.from_pretrained(args.model, config)
    out = engine.generate([{"role": "user", "content": content}], prefill_chunk_size=args.chunk, progress=True)
    print(out.text)
    print(f"{out.stats.prompt_tokens} tokens read; the layers' caches hold {out.stats.layer_entries} entries a head")


if __name__ == "__main__":
    main()
