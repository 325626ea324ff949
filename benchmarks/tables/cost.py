"""What answers take: work, time, memory."""

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import markdown, origin

MIB = 2**20


def answers() -> str:
    """Stages of whole answers, beside the host's."""
    rows = read_rows("answers")
    header = ["model", "pictures", "setting", "processor", "vision", "prompt pass", "TTFT", "TPOT", "tokens/s"]
    header += ["FLOPs, times less", "prompt pass, x", "TTFT, x", "TPOT, x", "cache MiB", "peak MiB"]
    table = []
    for r in rows:
        stages = [_span(r, stage) for stage in ("prepare", "vision", "prompt", "ttft", "tpot")]
        host = next(h for h in rows if h["setting"] == "host" and _same(h, r))
        ratios = [float(host["prompt_gflop"]) / float(r["prompt_gflop"])]
        ratios += [float(r[f"{stage}_speedup"]) for stage in ("prompt", "ttft", "tpot")]
        memory = [f"{int(r['cache_bytes']) / MIB:,.2f}", f"{int(r['peak_bytes']) / MIB:,.0f}"]
        times = [*stages, f"{float(r['tokens_per_s']):,.0f}", *(f"{ratio:.2f}" for ratio in ratios)]
        table.append([r["model"], r["images"], f"`{r['setting']}`", *times, *memory])
    told = "Milliseconds: the median (20th to 80th percentile); then how many times less (x) than the host. `0.5b` is "
    told += "LLaVA-OneVision-0.5B's geometry with its vision tower, weights random."
    calls = " or ".join(dict.fromkeys(r["repeats"] for r in rows))
    runs = f"{calls} calls of each, interleaved, after a warm-up; resident memory of the whole process"
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}; {runs}."


def _same(a: dict[str, str], b: dict[str, str]) -> bool:
    return (a["model"], a["images"]) == (b["model"], b["images"])


def _span(row: dict[str, str], stage: str) -> str:
    low, middle, high = (float(row[f"{stage}_ms_{label}"]) for label in ("p20", "p50", "p80"))
    digits = 2 if middle < 10 else 1 if middle < 100 else 0
    return f"{middle:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


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
    return f"{markdown(header, table)}\n\n{origin(rows)}; medians of runs interleaved in one process."


def replay_cost() -> str:
    """What reading with a replay takes beyond the plain pass, or a sentence that nobody has measured it."""
    if not (RESULTS / "replay_cost.csv").exists():
        return "No rows of what replaying costs yet: `python -m benchmarks.models.replay_cost` makes them."
    rows = read_rows("replay_cost")
    header = ["model", "tokens", "setting", "CPU, s", "at least", "clock, s", "beyond the plain pass", "of the fastest"]
    table = []
    for r in rows:
        seconds = [f"{float(r[name]):,.3f}" for name in ("cpu_s_median", "cpu_s_min", "wall_s_median")]
        shares = [f"{float(r[name]):.2f}" if r["setting"] != "off" else "" for name in ("extra_median", "extra_of_min")]
        table.append([r["model"], f"{int(r['tokens']):,}", f"`{r['setting']}`", *seconds, *shares])
    told = "Beyond the plain pass over the same rows, as a share of it: median over rounds, and fastest by fastest."
    rounds = " or ".join(dict.fromkeys(r["repeats"] for r in rows))
    return f"{markdown(header, table)}\n\n{told} {origin(rows)}; {rounds} rounds, interleaved in one process."


def decode() -> str:
    """What a decoded token takes."""
    rows = read_rows("decode")
    header = ["model", "prompt tokens", "setting", "ms a token (p20 to p80)", "tokens/s", "speed-up"]
    table = []
    for r in rows:
        facts = [r["model"], f"{int(r['prompt_tokens']):,}"]
        if not r["median_ms"]:
            table.append([*facts, f"{r['setting']}: {r['status']}", "", "", ""])
            continue
        span = f"{float(r['median_ms']):,.2f} ({float(r['p20_ms']):,.2f} to {float(r['p80_ms']):,.2f})"
        table.append([*facts, r["setting"], span, r["tokens_per_s"], f"{float(r['speedup']):.2f}"])
    ran = "medians of runs interleaved in one process"
    return f"{markdown(header, table)}\n\n{origin(rows)}; {ran}.{_compiling(rows)}"


def batch_decode() -> str:
    """Tokens per second of a batch against one by one."""
    rows = read_rows("batch_decode")
    header = ["setting", "tokens/s in one batch", "one by one", "times as many"]
    table = []
    for r in rows:
        told = ": ".join(filter(None, [_way(r), r.get("status", "")]))
        table.append([told, r["batched_tokens_per_s"], r["single_tokens_per_s"], r["ratio"]])
    chats, tokens, repeats = (rows[0][name] for name in ("batch", "new_tokens", "repeats"))
    return (
        f"{markdown(header, table)}\n\nOn the language model of LLaVA-OneVision-0.5B's geometry (random weights): "
        f"{chats} chats of different lengths, {tokens} tokens each, prompts not counted. {origin(rows)}; medians of "
        f"{repeats} runs, interleaved in one process.{_compiling(rows)}"
    )


def _way(row: dict[str, str]) -> str:
    return row.get("setting", "off")  # the only one, in rows of before there was the column


def _compiling(rows: list[dict[str, str]]) -> str:
    """What compiling took; "" where nothing was compiled."""
    took = {r["compile_ms"]: r for r in rows if r.get("compile_ms", "0") != "0"}
    told = (f"{_way(r)}, {r['model']}, {float(ms) / 1e3:.0f} s" for ms, r in took.items())
    return f" First use of what is compiled, apart from these times: {'; '.join(told)}." if took else ""


def turns() -> str:
    """What the cache of a long chat holds."""
    rows = read_rows("turns")
    chosen = ("1", "10", "25", "50")
    table = []
    for setting in dict.fromkeys(r["setting"] for r in rows):
        own = {r["turn"]: r for r in rows if r["setting"] == setting}
        table.append([f"`{setting}`", *(f"{int(own[t]['cache_bytes']) / 1024:,.0f}" for t in chosen)])
    return f"{markdown(['KiB of cache after', *(f'turn {t}' for t in chosen)], table)}\n\n{origin(rows)}."


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
    return f"{markdown(header, table)}\n\n{origin(rows)}; resident memory of the whole process, weights included."
