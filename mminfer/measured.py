"""What presets were measured to keep on a real model: `measured.csv`, which `python -m benchmarks.docs` writes.

Presets are chosen on the bundled model, which is small and sees simple pictures, so that each says what is left of it
elsewhere: of the questions about pages that SmolLM2-135M answers right uncompressed, how many stay right when they are
asked after the pages were read.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from mminfer.config import PRESETS, InferenceConfig, checked_config

MODEL = "SmolLM2-135M"
ENOUGH = 80  # percent of the right answers: a preset that kept less fails on the real model
NOT_MEASURED = "not measured on a real model"


@dataclass(frozen=True)
class Measured:
    """What the real model kept under a preset.

    Args:
        preset: its name.
        stayed: right answers that stayed right.
        of: right answers of the uncompressed model.
        entries: percent of the cache entries that were left.
        commit: of the code that was measured.
    """

    preset: str
    stayed: int
    of: int
    entries: float
    commit: str

    @property
    def kept(self) -> float:
        """Percent of the right answers."""
        return 100 * self.stayed / self.of

    @property
    def fails(self) -> bool:
        return self.kept < ENOUGH

    def told(self) -> str:
        """Such as "95 % of 305 answers, with 30 % of the entries"."""
        return f"{self.kept:.0f} % of {self.of} answers, with {self.entries:.0f} % of the entries"


@lru_cache(maxsize=1)
def measured_presets() -> dict[str, Measured]:
    """Every preset that was measured, by name."""
    with (files("mminfer") / "measured.csv").open(encoding="utf-8") as file:
        rows = [
            Measured(row["preset"], int(row["stayed"]), int(row["of"]), float(row["entries"]), row["commit"])
            for row in csv.DictReader(file)
        ]
    return {row.preset: row for row in rows}


def measured_of(config: InferenceConfig) -> Measured | None:
    """What is known of these settings: the preset that they are, or one that failed and is a part of them.

    Args:
        config: the settings, named as a preset or not.

    Returns:
        The row of the preset; of several that failed, that of the one that kept least. None: nothing was measured.

    Raises:
        ConfigError: it is no config.

    Example:
        >>> row = measured_of(InferenceConfig.from_preset("replay-30"))
        >>> assert row is not None and not row.fails
    """
    own = checked_config(config).techniques
    presets = dict(PRESETS.items())
    within = [
        row
        for name, row in measured_presets().items()
        if name in presets and all(technique in own for technique in presets[name].techniques)
    ]
    whole = next((row for row in within if presets[row.preset] == config), None)
    return whole or min((row for row in within if row.fails), key=lambda row: row.kept, default=None)


def sentence(config: InferenceConfig) -> str | None:
    """What is known of these settings in one line, and how to know more; None: they change nothing.

    Raises:
        ConfigError: it is no config.
    """
    if not checked_config(config).techniques:
        return None
    name, row = next((name for name, preset in PRESETS.items() if preset == config), None), measured_of(config)
    if row is None:
        told = f"{name or 'this setting'} was {NOT_MEASURED}"
    else:
        part = "" if row.preset == name else ", a part of this setting,"
        told = f"{row.preset}{part} kept {row.kept:.0f} % of the right answers of a real model that reads pages "
        told += f"({MODEL}, {row.of} answers)"
    passed = "--config FILE" if name is None else f"--preset {name}"
    return f"{told}; measure it on yours: mminfer bench --model PATH {passed}"
