"""The techniques in a few lines, for the front page."""

from benchmarks.tables.markdown import markdown
from benchmarks.tables.needle import LENGTH, REAL, cells
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


def techniques() -> str:
    """What each technique does, and what it kept on nano."""
    found, table = cells(), []
    for setting, (name, told) in LINES.items():
        row = found[setting, Protocol.NEXT_TURN, LENGTH]
        flops = found[setting, Protocol.IN_PROMPT, LENGTH]["flops_kept"]
        table.append([name, told, f"{float(flops):.0f} %", f"{float(row['cache_kept']):.0f} %", row["accuracy"]])
    header = ["technique", "what it does", "prompt FLOPs", "cache", "right, %"]
    header, table, beside_it = beside(header, table, {REAL: list(LINES)}, Protocol.NEXT_TURN)
    asked = found["off", Protocol.NEXT_TURN, LENGTH]["questions"]
    return (
        f"{markdown(header, table).replace('| --- | ---: |', '| --- | --- |')}\n\n"
        f"The bundled model, {asked} questions over {LENGTH} pictures, asked after the context was read and "
        f"compressed. {beside_it}"
    )
