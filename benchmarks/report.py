"""Writes benchmarks/REPORT.md and its plots from the stored rows alone: python -m benchmarks.report

Every figure comes from a row in benchmarks/results, which says what made it: commit, machine, versions, seed. With
--check nothing is written: it fails where a table mixes commits, where the canaries of rows come to something else than
when these were made, and where the report is not what the rows say.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import audit
from benchmarks.canaries import stored
from benchmarks.common import RESULTS
from benchmarks.quality.smol_cells import MODELS
from benchmarks.tables import (
    calibrated,
    cost,
    kernels,
    lost,
    needle,
    paper,
    peers,
    quality,
    regions,
    serving,
    smol,
    tower,
)
from mminfer.bench.protocols import Protocol

REPORT = Path(__file__).with_name("REPORT.md")
Section = tuple[str, str, list[Callable[[], str]]]  # heading, what to know, tables

THREE = """Fidelity is asked by three protocols, and no table mixes them. In-prompt: the question stands in the prompt,
so scores know it, and the first token never sees the compressed cache. Next-turn: the context is read and compressed,
then the question comes. Streamed: the same in chunks. The bundled model answers with one token, so in-prompt its right
answers say nothing of eviction; there the KL over long continuations counts: 32 tokens that the uncompressed model
says, forced upon each setting.

`random` spends the same budget by lot. Rules that put text first keep all of it, about an eighth of the entries here,
whatever the budget. The last table takes `Digest` apart: without budgets by layer, without the farthest-first choice,
without joining, and with all text kept."""

REAL = """SmolLM2-135M-Instruct reads books of four pages, 64 tokens each, and goes on with sentences about them; by
pixels through a trained tower, and by the embeddings of what the pages show. [The yardstick](../docs/yardstick.md) says
how. Kept: of the questions that it answers right uncompressed, the percentage that stay right, with its 95 % interval.
Elsewhere in this report its column stands beside the bundled model's."""

KERNELS = """Every op beside its reference in plain PyTorch, torch.compile of that, and the roofline of the machine's
measured product and copy rates. The reference of `prompt_attention` is PyTorch's own fused attention; *with exact
scores* and *with strided scores* are the native attention with LOOK-M's scores beside it. Extra memory is the rise of
resident memory during a call, its result included. Where compiling took too long or broke the graph, the row says so.

Behind the kernels: what sampled scores (`LookM(queries="strided")` or `"last"`) keep of what exact scores keep, for
backends whose attention cannot share its product with the scores."""

CALIBRATED = """What `mminfer.calibrate` finds, promises and keeps, on samples that it never saw, beside the presets on
the same samples. [Calibrating](../docs/calibrating.md) says what is promised. Work and time are asked in-prompt,
entries in the next turn. Times are of one prompt on a machine with other work, each in turn with the uncompressed
model's. Random: the bundled model's family in other geometry, weights random, embeddings four times as large."""

SECTIONS: list[Section] = [
    ("Published counts", "FLOPs and bytes that papers print, from geometry by our counter.", [paper.paper]),
    (
        "Whole answers, stage by stage",
        "Host and settings answer in turn in one process. `prompt pass` is the time to the first token less processor "
        "and vision tower.",
        [cost.answers],
    ),
    ("The prompt pass", "The language model alone, visual features ready made.", [cost.prompt_pass]),
    (
        "The vision tower",
        "Pages drawn clean: text, slides and forms, and one of which nothing repeats. Real widths, random weights, "
        "towers cut to a few layers; search for repeats and projector included.",
        [tower.tower],
    ),
    (
        "What replaying costs",
        "A context read with `Replay`, with values fitted and without (`fit=0`), beside the plain pass: what it may "
        "take beyond that is 1.1 of it, and 0.5 in the fast form.",
        [cost.replay_cost],
    ),
    (
        "A server under load",
        "`mminfer serve` beside `transformers serve` on the same weights, and beside `engine.generate` one by one.",
        [serving.load, serving.documents],
    ),
    ("Decoding, batches, turns", "", [cost.decode, cost.batch_decode, cost.turns]),
    (
        "A real language model",
        REAL,
        [
            smol.abilities,
            *(partial(smol.rules, protocol) for protocol in Protocol),
            *(partial(smol.by_kind, Protocol.NEXT_TURN, model) for model in MODELS),
        ],
    ),
    (
        "What the cache forgets",
        THREE,
        [
            partial(needle.budgets, Protocol.NEXT_TURN),
            partial(needle.budgets, Protocol.STREAMED),
            partial(needle.budgets, Protocol.IN_PROMPT),
            needle.at_equal_entries,
            needle.parts,
        ],
    ),
    (
        "What Replay is made of",
        "Its budgets, the other rules at a fifth, and itself without a part: shares of attention alone "
        "(whatever entries write), nothing fitted, every head alike (an even budget), heads sure of nothing, text not "
        "replayed, rows like the one before them left out.",
        [needle.replayed_by_seed, needle.replayed, lost.lost],
    ),
    (
        "What fewer tokens lose",
        "Merging before the model, pruning inside it, beside plain down-sampling, FastV and chance.",
        [
            partial(needle.by_length, "tokens", Protocol.NEXT_TURN),
            partial(needle.by_length, "tokens", Protocol.IN_PROMPT),
        ],
    ),
    (
        "Regions",
        "`RegionMerge` beside AIM's merging, down-sampling and a lot, at as many tokens: on the real model's pages, on "
        "the bundled model's pictures, on films of them, and what the stage takes.",
        [regions.reader, regions.nano, regions.film, regions.stage],
    ),
    (
        "How techniques get along",
        "Each alone, every pair, all four: V2PE with a step of 1/16, AIM's paper setting, LOOK-M to a fifth with "
        "averaging, FFNs skipped in every other layer.",
        [partial(needle.by_length, "composition", protocol) for protocol in Protocol],
    ),
    (
        "Positions",
        "V2PE beside plain positions (`off`).",
        [partial(needle.by_length, "positions", Protocol.NEXT_TURN), quality.length, quality.streamed],
    ),
    ("Presets", "", [partial(needle.by_length, "presets", Protocol.NEXT_TURN)]),
    (
        "Calibrations",
        CALIBRATED,
        [
            calibrated.promises,
            calibrated.verdicts,
            *(partial(calibrated.beside, name) for name in calibrated.BY_TARGET),
        ],
    ),
    ("Prompts that memory would not hold", "", [cost.long_context]),
    (
        "Peers",
        "Each in its own environment, on the same weights and prompts.",
        [peers.quality, peers.kept, peers.times],
    ),
    ("Kernels", KERNELS, [kernels.kernels, quality.scores]),
    ("Every setting, task by task", "", [partial(needle.by_task, protocol) for protocol in Protocol]),
]

PLOTS = {
    "What fewer tokens lose": ("pareto.png", "Fidelity against FLOPs and cache bytes"),
    "Positions": ("length.png", "Accuracy by number of pictures"),
    "A server under load": ("serving.png", "Requests a second by requests in flight"),
}


def render() -> str:
    """The report."""
    parts = [
        "# Report",
        "Made by `python -m benchmarks.report` from the rows in `benchmarks/results`, each of which names its commit, "
        "machine, versions and seed. The scripts that make the rows are listed at the end of `docs/results.md`.",
    ]
    for heading, told, tables in SECTIONS:
        parts += [f"## {heading}", *filter(None, [told]), *(table() for table in tables)]
        if heading in PLOTS and (RESULTS / PLOTS[heading][0]).exists():
            file, alt = PLOTS[heading]
            parts.append(f"![{alt}](results/{file})")
    return "\n\n".join(parts) + "\n"


def mixed() -> list[str]:
    """Which tables' rows do not come from one commit."""
    return [
        finding
        for heading, _, tables in SECTIONS
        for number, table in enumerate(tables, 1)
        for finding in audit.mixed(f"{heading}, table {number}", table())
    ]


def check() -> bool:
    """Prints what is wrong with the report, and notes on it; whether nothing is wrong."""
    of_no_commit, notes = audit.stale()
    findings = [*mixed(), *of_no_commit, *stored.all_stale()]
    if render() != REPORT.read_text("utf-8"):
        findings.append(f"{REPORT.name} is not what the rows say: run python -m benchmarks.report")
    for line in [*findings, *(f"note: {note}" for note in notes)]:
        print(line)
    print(f"{len(findings)} findings" if findings else "every table is of one commit, and as its rows say")
    return not findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="Look at the report instead of writing it.")
    if parser.parse_args().check:
        sys.exit(not check())
    from benchmarks.quality import plots
    from benchmarks.serving import plot

    plots.main()
    plot.throughput()
    REPORT.write_text(render())


if __name__ == "__main__":
    main()
