"""Measure the nano model: accuracy per task, number of images and V2PE increment delta.

Run as `python -m training.nano.evaluate`. An answer counts as right when greedy decoding gives exactly the
expected token and then ends the turn. Questions of one context share its prefill: the context is run once,
then every question continues, on its own, from a copy of that KV cache. `--generate` runs the plain
`model.generate` on every chat instead (slower, same numbers). With `--labelled`, so many of the `--images`
pictures have a label and are asked about, the rest are frames; such contexts may be long, so mminfer's engine
reads them.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    DynamicCache,
    InternVLForConditionalGeneration,
    InternVLProcessor,
)

from mminfer import V2PE, Engine, InferenceConfig
from mminfer.forward.kv_cache import CACHE_NAME
from mminfer.nano import checkpoint_path, data
from training.nano import build
from training.nano.batches import v2pe_positions

TASKS = {"Q1": ("q1", "q1_none"), "Q2": ("q2_digit", "q2_colour"), "Q3": ("q3",)}
Content = list[dict[str, Any]]
Row = dict[str, Any]


def question_plan(num_images: int, num_facts: int, most: int = 12) -> list[str]:
    """Up to `most` questions of a task per context; about 15% of the Q1 ones are negatives."""
    per_task = min(most, num_images)
    negatives = max(1, round(per_task * 0.15 / 0.85))
    return ["q1"] * per_task + ["q1_none"] * negatives + ["q2"] * per_task + ["q3"] * min(most, num_facts)


def chat_inputs(processor: Any, content: Content, generation_prompt: bool) -> BatchFeature:
    """One user message as model inputs."""
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=generation_prompt,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@torch.no_grad()
def answer_shared_prefill(
    model: Any,
    processor: InternVLProcessor,
    content: Content,
    questions: list[data.Question],
    delta: float,
) -> list[str]:
    """Answers after one pass over the context; " ..." is added to those that do not end the turn."""
    inputs = chat_inputs(processor, content, generation_prompt=False)
    prefix = inputs["input_ids"][:, :-1]  # without the end of the turn: the question follows
    is_visual = prefix == model.config.image_token_id
    positions = v2pe_positions(is_visual, delta)
    cache = DynamicCache(config=model.config.text_config)
    model(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        pixel_values=inputs["pixel_values"],
        position_ids=positions,
        **{CACHE_NAME: cache},
        logits_to_keep=1,
    )
    next_position = positions[0, -1] + (delta if is_visual[0, -1] else 1.0)
    cache.batch_repeat_interleave(len(questions))

    suffix = build.END + build.ASSISTANT
    ids = torch.tensor([processor.tokenizer(q.text + suffix).input_ids for q in questions])
    position = next_position + torch.arange(ids.shape[1], dtype=torch.float).expand(len(ids), -1)
    tokens = []
    for _ in range(2):  # the answer, then the end of the turn
        length = cache.get_seq_length() + ids.shape[1]
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones(len(ids), length, dtype=torch.long),
            position_ids=position,
            **{CACHE_NAME: cache},
            logits_to_keep=1,
        ).logits
        ids = logits[:, -1:].argmax(-1)
        position = position[:, -1:] + 1
        tokens.append(ids)
    ended = tokens[1][:, 0] == model.generation_config.eos_token_id
    answers = [processor.decode(row).strip() for row in tokens[0]]
    return [a if e else a + " ..." for a, e in zip(answers, ended, strict=True)]


@torch.no_grad()
def answer_generate(
    model: Any,
    processor: InternVLProcessor,
    content: Content,
    question: data.Question,
    delta: float,
) -> str:
    """The answer of plain `generate` to one chat."""
    content = [*content, {"type": "text", "text": question.text}]
    inputs = chat_inputs(processor, content, generation_prompt=True)
    ids = inputs["input_ids"]
    if delta != 1:  # generate() goes on from the last position in steps of 1
        inputs["position_ids"] = v2pe_positions(ids == model.config.image_token_id, delta)
    out = model.generate(**inputs)
    return processor.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def answer_engine(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    content: Content,
    questions: list[data.Question],
    delta: float,
) -> list[str]:
    """Answers of mminfer's engine, which reads the context once; " ..." is added to those that do not end the turn."""
    engine = Engine(model, processor, InferenceConfig(positions=V2PE(delta=delta)))
    chat = engine.chat()
    chat.read(content)
    outputs = [chat.fork().send(question.text, max_new_tokens=2) for question in questions]
    end = model.generation_config.eos_token_id
    return [o.text if o.token_ids[1:] == [end] else o.text + " ..." for o in outputs]


def evaluate(
    model: InternVLForConditionalGeneration,
    processor: InternVLProcessor,
    num_images: int,
    deltas: Sequence[float],
    questions: int,
    split: str = "test",
    seed: int = 0,
    generate: bool = False,
    labelled: int | None = None,
) -> list[Row]:
    """One result row per delta; the contexts and questions are the same for all deltas.

    Args:
        model: the nano model.
        processor: its processor.
        num_images: pictures in a context.
        deltas: V2PE increments.
        questions: least number of questions of each task.
        split: "test" for handwriting that training never saw.
        seed: of the contexts.
        generate: use `model.generate` on every chat instead of a shared prefill.
        labelled: pictures that have a label, the rest are frames; the engine reads them. None: all have one.

    Returns:
        Accuracy in [0, 1] and number of questions by task and by kind of question, one row per delta.
    """
    num_labelled = min(labelled or num_images, num_images)
    num_facts = data.default_num_facts(num_labelled)
    plan = question_plan(num_labelled, num_facts, 12 if labelled is None else 24)
    shared = answer_shared_prefill if labelled is None else answer_engine
    least = min(sum(t.startswith(task.lower()) for t in plan) for task in TASKS)
    num_contexts = -(-questions // least)
    hits: dict[float, dict[str, list[bool]]] = {delta: {} for delta in deltas}
    seconds = dict.fromkeys(deltas, 0.0)
    for n in range(num_contexts):
        context_seed = (seed * 1000 + num_images) * 100_000 + n
        rng = random.Random(context_seed)
        context = data.sample_context(rng, num_labelled, num_facts, plan, num_images - num_labelled)
        content = data.to_content(context, data.draw_images(context, split, context_seed))
        for delta in deltas:
            start = time.time()
            if generate:
                answers = [answer_generate(model, processor, content, q, delta) for q in context.questions]
            else:
                answers = shared(model, processor, content, context.questions, delta)
            seconds[delta] += time.time() - start
            for question, answer in zip(context.questions, answers, strict=True):
                hits[delta].setdefault(question.task, []).append(answer == question.answer)
    rows = []
    for delta in deltas:
        row = {"images": num_images, "delta": delta, "contexts": num_contexts}
        row |= {} if labelled is None else {"labelled": num_labelled}
        rows.append(row | {"seconds": round(seconds[delta], 1)} | _accuracies(hits[delta]))
    return rows


def _accuracies(hits: dict[str, list[bool]]) -> dict[str, float]:
    """Accuracy and count of each task, then of each kind of question."""
    groups = {task: [h for kind in kinds for h in hits.get(kind, [])] for task, kinds in TASKS.items()} | hits
    row: dict[str, float] = {}
    for name, flat in groups.items():
        row[name], row[name + "_n"] = sum(flat) / len(flat), len(flat)
    return row


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table of percentages."""
    deltas = sorted({r["delta"] for r in rows}, reverse=True)
    names = ["1" if d == 1 else f"1/{round(1 / d)}" for d in deltas]
    lines = ["| task | images | " + " | ".join(f"delta {n}" for n in names) + " | questions |"]
    lines.append("|---|---:|" + "---:|" * (len(deltas) + 1))
    for task in TASKS:
        for images in sorted({r["images"] for r in rows}):
            cells = {r["delta"]: r for r in rows if r["images"] == images}
            values = " | ".join(f"{100 * cells[d][task]:.1f}" for d in deltas)
            lines.append(f"| {task} | {images} | {values} | {cells[deltas[0]][task + '_n']} |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--images", type=int, nargs="+", default=[2, 4, 8, 12, 24, 48])
    parser.add_argument("--deltas", type=float, nargs="+", default=[1, 1 / 4, 1 / 16, 1 / 64])
    parser.add_argument("--questions", type=int, default=200, help="least number per task and cell")
    parser.add_argument("--split", default="test", choices=["train", "test"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generate", action="store_true", help="use model.generate on every chat")
    parser.add_argument("--labelled", type=int, help="so many of the pictures have a label, the rest are frames")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    return parser.parse_args()


def main() -> None:
    """Evaluate a checkpoint and print the table."""
    args = parse_args()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    rows: list[Row] = []
    for num_images in args.images:
        new = evaluate(
            model,
            processor,
            num_images,
            args.deltas,
            args.questions,
            args.split,
            args.seed,
            args.generate,
            args.labelled,
        )
        rows += new
        for row in new:
            print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
