"""Patch a Hugging Face model that is loaded already, and give it back as it was.

python examples/patch_a_model.py
python examples/patch_a_model.py --model PATH --preset replay-30
"""

import argparse

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import mminfer
from mminfer import nano


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano", help="a hub name or a folder; 'nano' is the bundled model")
    parser.add_argument("--preset", default="regions", help="what is done to the request")
    args = parser.parse_args()

    path = nano.checkpoint_path() if args.model == "nano" else args.model
    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    inputs = processor.apply_chat_template(
        nano.sample_messages(), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )

    def answer() -> str:
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
        return processor.decode(tokens, skip_special_tokens=True)

    print("before: ", answer())
    with mminfer.patched(model, mminfer.InferenceConfig.from_preset(args.preset)) as handle:
        print("patched:", answer(), "- rows in each layer:", [layer.rows[0] for layer in handle.records[-1].layers])
    print("after:  ", answer())


if __name__ == "__main__":
    main()
