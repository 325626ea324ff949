"""The techniques in a few lines, for the front page."""

from benchmarks.common import RESULTS, read_rows
from benchmarks.tables.markdown import commits, markdown
from benchmarks.tables.needle import LENGTH, REAL, Row, cells
from benchmarks.tables.smol import beside
from mminfer.bench.protocols import Protocol

AIM, LOOKM = "[AIM](https://arxiv.org/abs/2412.03248)", "[LOOK-M](https://arxiv.org/abs/2406.18139)"
SKIP, V2PE = "[operator skipping](https://arxiv.org/abs/2405.16700)", "[V2PE](https://arxiv.org/abs/2412.09616)"
LINES = {  # by the settings' names among the needle rows
    "off": ("nothing", "the host's own tokens"),
    "V2PE": (V2PE, "visual tokens advance the rotary position by 1/16"),
    "AIM": (AIM, "visual tokens that are alike merge, unimportant ones leave inside the model"),
    "skip": (SKIP, "visual tokens skip every other FFN"),
    "LOOK-M": (LOOKM, "the cache keeps text and what is looked at, and averages the rest into it"),
    "Digest 50 %": ("Digest, ours", "every picture keeps half of its entries, spread out, and joins the rest to them"),
    "Digest 20 %": ("", "the same with a fifth"),
}
REPLAYED = {  # by their names among the rows of Replay, which count no FLOPs
    "Replay 30 %": ("Replay, ours", "a second pass over the context finds what it needs of itself; 30 % stay"),
    "Replay 20 %": ("", "the same with a fifth"),
}


def techniques() -> str:
    """What each technique does, and what it kept on nano."""
    found, table = cells(), []
    for setting, (name, told) in LINES.items():
        row = found[setting, Protocol.NEXT_TURN, LENGTH]
        flops = found[setting, Protocol.IN_PROMPT, LENGTH]["flops_kept"]
        table.append([name, told, f"{float(flops):.0f} %", f"{float(row['cache_kept']):.0f} %", row["accuracy"]])
    lines, of_replay = _replayed()
    header = ["technique", "what it does", "prompt FLOPs", "cache", "right, %"]
    settings = [*LINES, *lines]
    header, table, beside_it = beside(header, [*table, *lines.values()], {REAL: settings}, Protocol.NEXT_TURN)
    asked = found["off", Protocol.NEXT_TURN, LENGTH]["questions"]
    return (
        f"{markdown(header, table).replace('| --- | ---: |', '| --- | --- |')}\n\n"
        f"The bundled model, {asked} questions over {LENGTH} pictures, asked after the context was read and "
        f"compressed{of_replay}. {beside_it}"
    )


def _replayed() -> tuple[dict[str, list[str]], str]:
    """The lines of Replay by setting, all seeds together, and what else they were asked; nothing without rows."""
    rows = read_rows("replay") if (RESULTS / "replay.csv").exists() else []
    rows = [r for r in rows if r["protocol"] == Protocol.NEXT_TURN and int(r["images"]) == LENGTH]
    of = {setting: [r for r in rows if r["setting"] == setting] for setting in ("off", *REPLAYED)}
    if not all(of.values()):
        return {}, ""
    lines = {
        setting: [*words, "", f"{_mean(of[setting], 'cache_kept'):.0f} %", f"{_mean(of[setting], 'accuracy'):.1f}"]
        for setting, words in REPLAYED.items()
    }
    asked, off = sum(int(r["questions"]) for r in of["off"]), _mean(of["off"], "accuracy")
    told = f" (Replay: {asked} questions, of which the host's own tokens get {off:.1f} %, "
    return lines, told + f"{commits([r for own in of.values() for r in own])})"


def _mean(rows: list[Row], column: str) -> float:
    """By the number of questions."""
    return sum(float(r[column]) * int(r["questions"]) for r in rows) / sum(int(r["questions"]) for r in rows)


HOSTS = {  # the host's ways to decode, by their names among the rows
    "host": "its growing cache",
    "host, static cache": "its static cache",
    "host, static cache, compiled": "that under `torch.compile`",
}


def decoding() -> str:
    """How many times as fast as the host a token is decoded with everything off, in each of its ways."""
    rows = read_rows("decode")
    times = {(r["model"], r["setting"]): float(r["median_ms"]) for r in rows if r["median_ms"]}
    told = []
    for model, name in (("nano", "the bundled model"), ("llava-onevision-0.5b", "a 0.5B geometry")):
        hosts = [(how, times[model, way]) for way, how in HOSTS.items() if (model, way) in times]
        ratios = ", ".join(f"{ms / times[model, 'off']:.1f} ({how})" for how, ms in hosts)
        told.append(f"on {name} {ratios}")
    whole = [r for r in read_rows("answers") if r["setting"] == "off"]
    low, *_, high = sorted(float(r["tpot_speedup"]) for r in whole)
    fewest, *_, most = sorted(int(r["images"]) for r in whole)
    return (
        "With nothing compressed a token is decoded so many times as fast as by the host with its cache of each kind: "
        f"{'; '.join(told)} ({commits(rows)}). In whole answers to "
        f"{fewest} to {most} pictures it is {low:.1f} to {high:.1f} times as fast as with the growing cache "
        f"({commits(whole)}). The smaller the model, the more the host's own overhead weighs, which varies from run to "
        "run."
    )
