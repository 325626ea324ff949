"""Needle accuracy of the nano model under every setting, over pictures of unseen handwriting.

    python -m benchmarks.quality.needle --images 8 16 --questions 300

in-prompt: the question stands in the prompt. Eviction happens behind the prompt pass and answers are one token, so
this column says nothing about it. next-turn: the context is read and compressed first, then the question comes.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.common import write_rows
from benchmarks.quality.settings import SETTINGS
from mminfer import Engine, InferenceConfig
from mminfer.nano import data
from mminfer.nano.evaluate import TASKS, question_plan


@dataclass
class Cell:
    """One setting at one length, by one protocol."""

    hits: dict[str, list[bool]] = field(default_factory=dict)
    cache: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def add(self, question: data.Question, output, end_id: int) -> None:
        right = output.text == question.answer and output.token_ids[1:] == [end_id]
        self.hits.setdefault(question.task, []).append(right)

    def row(self) -> dict[str, float | int]:
        every = [hit for hits in self.hits.values() for hit in hits]
        row: dict[str, float | int] = {"questions": len(every), "accuracy": _percent(every)}
        for task, kinds in TASKS.items():
            row[task] = _percent([hit for kind in kinds for hit in self.hits.get(kind, [])])
        row["cache_kept"] = round(100 * sum(self.cache) / len(self.cache), 2)
        row["flops_kept"] = round(100 * sum(self.flops) / len(self.flops), 2)
        return row


def _percent(hits: list[bool]) -> float:
    return round(100 * sum(hits) / max(1, len(hits)), 1)


def contexts(num_images: int, questions: int, seed: int) -> Iterator[tuple[list[dict], list[data.Question]]]:
    """Contexts as content lists, each with its questions, until there are enough of these."""
    num_facts = data.default_num_facts(num_images)
    plan = question_plan(num_images, num_facts)
    for n in range(-(-questions // len(plan))):
        context_seed = (seed * 1000 + num_images) * 100_000 + n
        context = data.sample_context(random.Random(context_seed), num_images, num_facts, plan)
        yield data.to_content(context, data.draw_images(context, "test", context_seed)), context.questions


def next_turn(engine: Engine, content: list[dict], questions: list[data.Question], cell: Cell) -> None:
    """The context is read and compressed once; every question goes on from a copy."""
    read = engine.chat()
    read.read(content)
    tokens = read.cache.tokens[0]
    entries = sum(lengths[0] for lengths in read.cache.lengths)
    cell.cache.append(entries / (tokens * len(read.cache.lengths)))
    for question in questions:
        output = read.fork().send(question.text, max_new_tokens=2)
        cell.add(question, output, engine.model.generation_config.eos_token_id)
    cell.flops.append(float("nan"))


def in_prompt(engine: Engine, content: list[dict], questions: list[data.Question], cell: Cell) -> None:
    """Context and question in one prompt; the questions of a context go as a batch."""
    chats = [[{"role": "user", "content": [*content, {"type": "text", "text": q.text}]}] for q in questions]
    for question, output in zip(questions, engine.generate(chats, max_new_tokens=2), strict=True):
        cell.add(question, output, engine.model.generation_config.eos_token_id)
        cell.cache.append(output.stats.cache_bytes / output.stats.full_cache_bytes)
        cell.flops.append(output.stats.prompt_flops / output.stats.full_prompt_flops)


PROTOCOLS = {"in-prompt": in_prompt, "next-turn": next_turn}


def measure(settings: dict[str, InferenceConfig], images: list[int], questions: int, seed: int, protocols: list[str]):
    """One row for each setting, length and protocol; all see the same contexts."""
    plain = Engine.from_pretrained("nano")
    engines = {name: Engine(plain.model, plain.processor, config) for name, config in settings.items()}
    for num_images in images:
        cells = {(name, protocol): Cell() for name in settings for protocol in protocols}
        for content, asked in tqdm(list(contexts(num_images, questions, seed)), desc=f"{num_images} images"):
            for (name, protocol), cell in cells.items():
                PROTOCOLS[protocol](engines[name], content, asked, cell)
        for (name, protocol), cell in cells.items():
            yield {"setting": name, "protocol": protocol, "images": num_images, "seed": seed, **cell.row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--questions", type=int, default=300, help="least number in a cell")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    parser.add_argument("--out", default="needle", help="name of the CSV file in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.manual_seed(0)
    chosen = {name: SETTINGS[name] for name in args.settings}
    rows = list(measure(chosen, args.images, args.questions, args.seed, args.protocols))
    for row in rows:
        print(row)
    if args.out != "-":
        print(write_rows(args.out, rows, key=("setting", "protocol", "images")))


if __name__ == "__main__":
    main()
