"""Writes the README's tables from the stored rows, so that no figure in it is typed by hand.

python -m benchmarks.readme
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import read_rows
from mminfer.config import PRESETS
from mminfer.models.registry import supported_families
from mminfer.support import YES, support_table

README = Path(__file__).parents[1] / "README.md"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    align = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, align, *rows])


def needle() -> str:
    """Accuracy by setting, protocol and length."""
    rows = read_rows("needle")
    cells = {(r["setting"], r["protocol"], r["images"]): r for r in rows}
    lengths = sorted({r["images"] for r in rows}, key=int)
    header = ["setting", "prompt FLOPs kept", "cache kept"]
    header += [f"in-prompt, {n}" for n in lengths] + [f"next-turn, {n}" for n in lengths]
    table = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        first = cells[setting, "in-prompt", lengths[0]]
        line = [f"`{setting}`", f"{float(first['flops_kept']):.0f} %", f"{float(first['cache_kept']):.0f} %"]
        for protocol in ("in-prompt", "next-turn"):
            line += [cells[setting, protocol, n]["accuracy"] for n in lengths]
        table.append(line)
    questions = {n: cells["off", "next-turn", n]["questions"] for n in lengths}
    origin = rows[0]
    told = ", ".join(f"{questions[n]} questions over {n} pictures" for n in lengths)
    return (
        f"{_markdown(header, table)}\n\nPercent of right answers; {told}, the same for every setting, handwriting "
        f"never seen in training, seed {origin['seed']}. Commit `{origin['commit']}`, torch {origin['torch']}, "
        f"transformers {origin['transformers']}, float32 on the CPU."
    )


def length() -> str:
    """Accuracy by positions, cache and number of pictures."""
    rows = read_rows("length")
    cells = {(r["cache"], r["positions"], int(r["images"])): r for r in rows}
    lengths = sorted({n for *_, n in cells})
    table = []
    for cache in dict.fromkeys(r["cache"] for r in rows):
        names = {r["positions"] for r in rows if r["cache"] == cache}
        for positions in [p for p in dict.fromkeys(r["positions"] for r in rows) if p in names]:
            found = [cells.get((cache, positions, n)) for n in lengths]
            table.append([cache, positions, *("" if r is None else r["accuracy"] for r in found)])
    asked = {n: max(int(r["questions"]) for r in rows if int(r["images"]) == n) for n in lengths}
    told = ", ".join(f"{asked[n]} over {n:,}" for n in lengths)
    return (
        f"{_markdown(['cache', 'positions', *(f'{n:,}' for n in lengths)], table)}\n\nPercent of right answers by "
        f"number of pictures; questions: {told} pictures. {_origin(rows)}."
    )


def streamed() -> str:
    """What chunks cost over compressing once."""
    rows = read_rows("streamed")
    header = ["cache kept", "chunk", "right answers", "KL to the whole cache", "KL to compressing once", "same token"]
    table = [
        [f"{100 * float(r['share']):.0f} %", r["chunk"], r["accuracy"], r["kl_full"], r["kl_once"], r["agreement_once"]]
        for r in rows
    ]
    asked = rows[0]
    return (
        f"{_markdown(header, table)}\n\nnano, {asked['images']} pictures ({int(asked['tokens']):,} tokens), "
        f"{asked['questions']} questions; KL in nats of the answer's first token; right answers and agreement in "
        f"percent. {_origin(rows)}."
    )


def long_context() -> str:
    """Time and memory of long prompts."""
    rows = read_rows("long_context")
    header = ["model", "visual tokens", "budget", "chunk", "minutes", "tokens/s", "peak memory", "cache", "whole cache"]
    table = []
    for r in rows:
        line = [r["model"], *(f"{int(r[name]):,}" for name in ("visual_tokens", "budget", "chunk"))]
        line += [f"{float(r['seconds']) / 60:.1f}", f"{float(r['tokens_per_s']):,.0f}"]
        line += [f"{float(r[name]):,.0f} MiB" for name in ("peak_rss_mib", "cache_mib", "full_cache_mib")]
        table.append(line)
    return f"{_markdown(header, table)}\n\n{_origin(rows)}; resident memory of the whole process, weights included."


def prompt_pass() -> str:
    """FLOPs and time of the prompt pass."""
    rows = read_rows("prompt_pass")
    header = ["model", "tokens", "setting", "GFLOP", "ms (p20 to p80)", "FLOPs ratio", "speed-up", "techniques' share"]
    table = []
    for r in rows:
        span = f"{float(r['median_ms']):,.0f} ({float(r['p20_ms']):,.0f} to {float(r['p80_ms']):,.0f})"
        ratios = [f"{float(r[name]):.2f}" for name in ("flops_ratio", "speedup")]
        ratios.append(f"{100 * float(r['techniques_share']):.1f} %")
        tokens = f"{int(r['tokens']):,}"
        table.append([r["model"], tokens, f"`{r['setting']}`", f"{float(r['gflops']):,.1f}", span, *ratios])
    return f"{_markdown(header, table)}\n\n{_origin(rows)}; medians of runs interleaved in one process."


def kernels() -> str:
    """Every op's native kernel beside what it is compared with."""
    rows = read_rows("kernels")
    measured = "of_peak" in rows[0]  # rows of before have no peak
    header = ["op", "run", "ms (p20 to p80)", "of the first", "GFLOP/s", "GB/s", *(["of peak"] if measured else [])]
    table, before = [], ""
    for r in rows:
        name, before = "" if r["op"] == before else r["op"], r["op"]
        line = [name, _run_of(r), *_times_of(r), r["gflops_a_s"], r["gb_a_s"]]
        if measured:
            line.append(f"{100 * float(r['of_peak']):.0f} %, {r['bound']}" if r["of_peak"] else "")
        table.append([*line, r["extra_mib"]])
    told = f"{_markdown([*header, 'extra MiB'], table)}\n\n{_origin(rows)}; medians of runs interleaved in one process."
    return told + _peaks(rows) if measured else told


def _run_of(row: dict[str, str]) -> str:
    """A kernel run's name, with what came of compiling where that is not all of it."""
    status = row.get("status", "")
    return row["run"] if status in ("", "1 graph") else f"{row['run']}: {status}"


def _times_of(row: dict[str, str]) -> list[str]:
    """Milliseconds and ratio of a kernel run; empty where it could not be timed."""
    if not row["median_ms"]:
        return ["", ""]
    span = f"{float(row['median_ms']):,.1f} ({float(row['p20_ms']):,.1f} to {float(row['p80_ms']):,.1f})"
    return [span, f"{float(row['of_first']):.2f}"]


def _peaks(rows: list[dict[str, str]]) -> str:
    """What `of peak` is of, and what compiling took."""
    spans = []
    for name in ("peak_gflops_a_s", "peak_gb_a_s", "compile_s"):
        values = [float(r[name]) for r in rows if r[name]] or [0.0]
        least, most = f"{min(values):,.0f}", f"{max(values):,.0f}"
        spans.append(least if least == most else f"{least} to {most}")
    return (
        f" Peak: a float32 matrix product at {spans[0]} GFLOP/s, a copy at {spans[1]} GB/s, measured in the same run; "
        f"above 100 % data came from a cache. Compiling a reference took {spans[2]} s, apart from these times."
    )


def scores() -> str:
    """Overlap of what sampled scores keep with what exact ones keep."""
    rows = read_rows("scores")
    cells = {(r["queries"], r["images"], r["budget"], r["text_prior"]): r["overlap"] for r in rows}
    columns = list(dict.fromkeys(key[1:] for key in cells))
    header = ["queries"]
    header += [f"{n} pictures, {float(b):.0%}{'' if prior == 'True' else ', no text prior'}" for n, b, prior in columns]
    table = [[name, *(cells[name, *c] for c in columns)] for name in dict.fromkeys(key[0] for key in cells)]
    return _markdown(header, table)


def _origin(rows: list[dict[str, str]]) -> str:
    """Where rows come from, for the line below a table; all of one machine, maybe of several commits."""
    r, commits = rows[0], dict.fromkeys(row["commit"] for row in rows)
    told = ", ".join(f"`{commit}`" for commit in commits)
    threads = "1 thread" if r["threads"] == "1" else f"{r['threads']} threads"
    return f"{r['device']}, {threads}, float32, torch {r['torch']}, transformers {r['transformers']}, commit {told}"


def decode() -> str:
    """What a decoded token takes."""
    rows = read_rows("decode")
    header = ["model", "prompt tokens", "setting", "ms a token (p20 to p80)", "tokens/s", "speed-up"]
    table = []
    for r in rows:
        span = f"{float(r['median_ms']):,.2f} ({float(r['p20_ms']):,.2f} to {float(r['p80_ms']):,.2f})"
        table.append(
            [
                r["model"],
                f"{int(r['prompt_tokens']):,}",
                r["setting"],
                span,
                r["tokens_per_s"],
                f"{float(r['speedup']):.2f}",
            ]
        )
    compiled = [f"{float(r['compile_ms']) / 1e3:.0f} s" for r in rows if r["compile_ms"] != "0"]
    told = f" First use of the compiled step: {', '.join(compiled)}, apart from these times." if compiled else ""
    return f"{_markdown(header, table)}\n\n{_origin(rows)}; medians of runs interleaved in one process.{told}"


def batch_decode() -> str:
    """Tokens per second of a batch against one by one."""
    (r,) = read_rows("batch_decode")
    return (
        f"On the language model of LLaVA-OneVision-0.5B's geometry (random weights), {r['batch']} chats of different "
        f"lengths decode {r['batched_tokens_per_s']} tokens per second in one batch and {r['single_tokens_per_s']} "
        f"one by one: {r['ratio']} times as many ({r['device']}, {r['threads']} threads, float32, medians of "
        f"{r['repeats']} interleaved runs, commit `{r['commit']}`)."
    )


def turns() -> str:
    """What the cache of a long chat holds."""
    rows = read_rows("turns")
    chosen = ("1", "10", "25", "50")
    table = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        own = {r["turn"]: r for r in rows if r["setting"] == setting}
        table.append([f"`{setting}`", *(f"{int(own[t]['cache_bytes']) / 1024:,.0f}" for t in chosen)])
    return _markdown(["KiB of cache after", *(f"turn {t}" for t in chosen)], table)


def families() -> str:
    """The supported host families."""
    return ", ".join(f"`{name}`" for name in supported_families())


def support() -> str:
    """What each family takes, and why not where it does not."""
    table = support_table()
    reasons = list(dict.fromkeys(cell for row in table.values() for cell in row.values() if cell != YES))
    techniques = list(next(iter(table.values())))
    rows = [
        [f"`{family}`", *(cell if cell == YES else f"no ({reasons.index(cell) + 1})" for cell in row.values())]
        for family, row in table.items()
    ]
    notes = "\n".join(f"{i}. {reason}" for i, reason in enumerate(reasons, 1))
    grid = _markdown(["family", *techniques], rows).replace("---:", "---")
    return (
        f"{grid}\n\n{notes}\n\nAsked of each family's default configuration; a checkpoint whose language model slides "
        "refuses LookM whatever its family."
    )


def presets() -> str:
    """The presets and what they set."""
    rows = []
    for name, config in PRESETS.items():
        parts = [repr(technique) for technique in config.techniques]
        rows.append([f"`{name}`", "<br>".join(f"`{part}`" for part in parts) or "everything off"])
    return _markdown(["preset", "sets"], rows).replace("---:", "---")


SECTIONS: dict[str, Callable[[], str]] = {
    section.__name__: section
    for section in (
        needle,
        length,
        streamed,
        long_context,
        prompt_pass,
        kernels,
        scores,
        decode,
        batch_decode,
        turns,
        families,
        support,
        presets,
    )
}


def render(text: str) -> str:
    """The README with every marked section written anew.

    Raises:
        ValueError: a section's marks are not there, once each.
    """
    for name, section in SECTIONS.items():
        marked = re.compile(f"(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", re.DOTALL)
        if len(marked.findall(text)) != 1:
            raise ValueError(f"the README has no section between <!-- {name} --> and <!-- /{name} -->")
        (start, end), content = marked.search(text).span(), section()
        text = f"{text[:start]}{content}\n{text[end:]}"
    return text


def main() -> None:
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
