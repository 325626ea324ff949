"""Presets: what they set, what a real model kept under them, and which to take.

The figures are those of `mminfer.measured`, whose file is written here from the yardstick's rows.
"""

import csv
from io import StringIO

from benchmarks.quality.smol_settings import preset_settings
from benchmarks.tables import smol
from benchmarks.tables.markdown import markdown
from mminfer.bench.protocols import Protocol
from mminfer.config import PRESETS
from mminfer.measured import ENOUGH, MODEL, NOT_MEASURED, measured_presets

COLUMNS = ("preset", "stayed", "of", "entries", "commit")
FILES = ("smol", "smol_regions")  # of the yardstick's rows
REAL = "a real model kept"
CHOICES: dict[str, tuple[str, ...]] = {  # who you are -> the presets to take, the first one above all
    "chat, stream, or keep documents for later questions": ("replay-30", "replay-50", "replay-20"),
    "ask one question about many pages or images": ("regions",),
    "read what memory would not hold, with `prefill_chunk_size`": ("replay-8k",),
    "have simple pictures like the bundled model's, and measure first": ("balanced", "fast", "digest-50"),
    "leave the window of a model that was trained with V2PE": ("v2pe-16", "v2pe-auto"),
    "compare with the papers' settings": ("aim", "lookm-20", "lookm-5", "skip-ffn"),
}


def measured() -> str:
    """The text of `mminfer/measured.csv`: by pixels, asked after the context was read, all seeds together.

    Where several files of rows know a preset, the one counts that asked the most.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, setting in preset_settings().items():
        found = (smol.cell_of(setting.name, Protocol.NEXT_TURN, file=file) for file in FILES)
        cell = max((c for c in found if c is not None), key=lambda c: c.total("questions"), default=None)
        if cell is not None and cell.kept:
            commits = " ".join(dict.fromkeys(row["commit"] for row in cell.rows))
            counts = cell.total("stayed"), cell.total("full_right"), f"{cell.mean('cache_kept'):.1f}"
            writer.writerow([name, *counts, commits])
    return text.getvalue()


def presets() -> str:
    """The presets, what they set and what the real model kept."""
    rows = []
    for name, config in PRESETS.items():
        parts = [repr(technique) for technique in config.techniques]
        told = _told(name) if parts else ""
        rows.append([f"`{name}`", "<br>".join(f"`{part}`" for part in parts) or "everything off", told])
    return f"{markdown(['preset', 'sets', REAL], rows).replace('---:', '---')}\n\n{_note()}"


def choices() -> str:
    """Which presets to take, and what the real model kept under each."""
    rows = []
    for who, names in CHOICES.items():
        rows.append([who, ", ".join(f"`{name}` ({_in_short(name)})" for name in names)])
    return f"{markdown(['you', f'take ({REAL})'], rows).replace('---:', '---')}\n\n{_note()}"


def _told(name: str) -> str:
    row = measured_presets().get(name)
    if row is None:
        return NOT_MEASURED
    return f"**fails there**: {row.told()}" if row.fails else row.told()


def _in_short(name: str) -> str:
    row = measured_presets().get(name)
    return "not measured" if row is None else f"{row.kept:.0f} %"


def _note() -> str:
    """What the column counts, and the commits of its rows."""
    commits = " ".join(dict.fromkeys(row.commit for row in measured_presets().values())).split()
    told = f"{REAL.capitalize()}: {MODEL} reads pages as pixels; of the answers that are right uncompressed, how many "
    told += f"stay right when the questions come after the pages were read. Less than {ENOUGH} % is a failure. Commit "
    return told + ", ".join(f"`{commit}`" for commit in dict.fromkeys(commits)) + "."
