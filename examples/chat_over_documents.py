"""Read documents once, ask about them often, and go on another day.

The pages are compressed as they are read, before any question is known, so a cache for the questions to come is what to
take. Each question goes to a fork, so that none sees the others' answers.

python examples/chat_over_documents.py
python examples/chat_over_documents.py --model PATH --page 1.png --page 2.png --question "What is the total?"
"""

import argparse
from pathlib import Path

import mminfer
from mminfer.nano import sample_messages

QUESTIONS = ["Which image shows a blue 1?", "What digit is in image MK?", "What is the code of nest?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a hub name or a folder; 'nano' is the bundled model")
    parser.add_argument("--preset", default="replay-30", help="what is done to the cache")
    parser.add_argument("--page", action="append", help="an image of a page; default: the bundled pictures")
    parser.add_argument("--question", action="append", help="repeat for more")
    parser.add_argument("--file", type=Path, default=Path("documents.safetensors"), help="where the reading is kept")
    args = parser.parse_args()

    if args.page:
        documents = [{"type": "image", "image": path} for path in args.page]
    else:
        documents = sample_messages()[0]["content"][:-1]  # all but the question

    engine = mminfer.Engine.from_pretrained(args.model, mminfer.InferenceConfig.from_preset(args.preset))
    reading = engine.chat()
    reading.read(documents)
    reading.save(args.file)  # the compressed cache and the turns, no pixels

    again = engine.load_chat(args.file)  # another day: nothing is read a second time
    for question in args.question or QUESTIONS:
        print(question, again.fork().send(question).text)


if __name__ == "__main__":
    main()
