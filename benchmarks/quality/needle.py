"""Needle accuracy and fidelity of the bundled model under every setting, over pictures of unseen handwriting.

    python -m benchmarks.quality.needle --groups cache --protocols next-turn streamed --images 4 8 16 32 64

The three protocols (`mminfer.bench.protocols`) are kept apart. nano's answers are one token, which in-prompt never sees
a compressed cache: judge eviction by the other two, or by the long continuations. Those are the uncompressed model's,
32 tokens each, one a context.
"""

import argparse
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.common import show_rows
from benchmarks.quality.settings import GROUPS, OFF, Settings
from mminfer import Engine
from mminfer.bench.fidelity import Continuation, Fidelity, continuation, fidelity, forced, logits_of
from mminfer.bench.protocols import Ask, Protocol, reader
from mminfer.nano import data
from mminfer.output import GenerationOutput
from training.nano.evaluate import TASKS, question_plan

CHUNK = 512  # tokens, seven pictures
LONG = 32
KEY = ("setting", "protocol", "images", "seed")


@dataclass
class Reference:
    """What the uncompressed model says about one context."""

    first: list[torch.Tensor]  # logits of each answer's first token, [1, vocabulary]
    long: Continuation  # of the first question


@dataclass
class Cell:
    """One setting at one length, by one protocol."""

    hits: dict[str, list[bool]] = field(default_factory=dict)
    answers: list[Fidelity] = field(default_factory=list)
    long: list[Fidelity] = field(default_factory=list)
    cache: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        every = [hit for hits in self.hits.values() for hit in hits]
        row: dict[str, Any] = {"questions": len(every), "accuracy": _percent(every)}
        for task, kinds in TASKS.items():
            row[task] = _percent([hit for kind in kinds for hit in self.hits.get(kind, [])])
        for name, found in (("answer", self.answers), ("long", self.long)):
            row[f"kl_{name}"] = round(mean(f.kl for f in found), 4)
            row[f"top1_{name}"] = _percent([f.top1 for f in found])
        row["cache_kept"] = round(100 * mean(self.cache), 2)
        row["flops_kept"] = round(100 * mean(self.flops), 2) if self.flops else ""
        return row


def _percent(hits: list[Any]) -> float:
    return round(100 * sum(hits) / max(1, len(hits)), 1)


def contexts(num_images: int, questions: int, seed: int) -> Iterator[tuple[list[dict], list[data.Question]]]:
    """Contexts as content lists, each with its questions, until there are enough of these."""
    num_facts = data.default_num_facts(num_images)
    plan = question_plan(num_images, num_facts)
    for n in range(-(-questions // len(plan))):
        context_seed = (seed * 1000 + num_images) * 100_000 + n
        context = data.sample_context(random.Random(context_seed), num_images, num_facts, plan)
        yield data.to_content(context, data.draw_images(context, "test", context_seed)), context.questions


def refer(ask: Ask, questions: list[data.Question]) -> Reference:
    """Asks the uncompressed model."""
    first = [ask(question.text, max_new_tokens=1, output_logits=True).logits for question in questions]
    return Reference(first, continuation(ask, questions[0].text, LONG))


def judge(ask: Ask, questions: list[data.Question], reference: Reference, end_id: int, cell: Cell) -> None:
    """Asks under some setting, all questions of a context."""
    for question, first in zip(questions, reference.first, strict=True):
        output = ask(question.text, max_new_tokens=2, output_logits=True)
        right = output.text == question.answer and output.token_ids[1:] == [end_id]
        cell.hits.setdefault(question.task, []).append(right)
        cell.answers.append(fidelity(first, output.logits[:1]))
    told = forced(ask, questions[0].text, reference.long.token_ids)
    cell.long.append(fidelity(reference.long.logits, logits_of(told)))
    _note_costs(output, cell)


def _note_costs(output: GenerationOutput, cell: Cell) -> None:
    """Of the context's last question; what a turn's own prompt saves says nothing of the context's."""
    stats = output.stats
    cell.cache.append(stats.cache_bytes / stats.full_cache_bytes)
    if stats.visual_tokens:
        cell.flops.append(stats.prompt_flops / stats.full_prompt_flops)


def measure(settings: Settings, images: int, questions: int, seed: int, protocol: Protocol) -> Iterator[dict[str, Any]]:
    """One row for each setting; all see the same contexts."""
    plain = Engine.from_pretrained("nano")
    engines = {config: Engine(plain.model, plain.processor, config) for config in settings.values()}
    cells = {config: Cell() for config in engines}  # settings of several names run once
    end_id = plain.model.generation_config.eos_token_id
    for content, asked in tqdm(list(contexts(images, questions, seed)), f"{images} images, {protocol}"):
        reference = refer(reader(plain, content, protocol, CHUNK), asked)
        for config, engine in engines.items():
            judge(reader(engine, content, protocol, CHUNK), asked, reference, end_id, cells[config])
    for name, config in settings.items():
        cell = cells[config]
        chunk = CHUNK if protocol is Protocol.STREAMED else ""
        yield {"setting": name, "protocol": str(protocol), "images": images, "seed": seed, "chunk": chunk, **cell.row()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--questions", type=int, default=300, help="least number in a cell")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--settings", nargs="+", help="of these groups only these")
    parser.add_argument("--protocols", nargs="+", default=list(Protocol), choices=list(Protocol))
    parser.add_argument("--out", default="needle", help="name of the CSV file in benchmarks/results; '-' for none")
    args = parser.parse_args()
    torch.manual_seed(0)
    settings = dict(OFF)
    for group in args.groups:
        settings |= {name: s for name, s in GROUPS[group].items() if args.settings is None or name in args.settings}
    for images in args.images:
        for protocol in args.protocols:
            rows = list(measure(settings, images, args.questions, args.seed, Protocol(protocol)))
            show_rows(args.out, rows, KEY)


if __name__ == "__main__":
    main()
