"""Promises of calibrated settings, held against samples that the calibration did not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mminfer.cli.calibrate import DRAWN, drawn_chats
from mminfer.cli.console import OUT

if TYPE_CHECKING:
    from mminfer.calibration import Calibration, Promise
    from mminfer.engine import Engine

OTHER_SEED = 1_000_003  # so that nobody checks a promise with the contexts that it was made by


def calibrations_in(files: Sequence[Path]) -> dict[str, Calibration]:
    """What `mminfer calibrate` wrote, by the files' names; read before anything is measured.

    Raises:
        InputError: a file cannot be read.
        ConfigError: a file holds no calibration.
    """
    if not files:
        return {}
    from mminfer.calibration import Calibration

    return {str(path): Calibration.load(path) for path in files}


def rechecked(
    engine: Engine,
    model: str,
    calibrations: Mapping[str, Calibration],
    samples: Path | None,
    images: int,
    seed: int,
) -> dict[str, Promise]:
    """What other samples say of promises, by the names of their files.

    Args:
        engine: of the model.
        model: its name.
        calibrations: by name.
        samples: file of JSON lines; None: contexts of nano's own.
        images: pictures in such a context.
        seed: of such contexts.

    Raises:
        InputError: there are no samples.
        ConfigError: a calibration is of another model.
    """
    from mminfer.calibration import recheck
    from mminfer.calibration.samples import read_samples

    chats = read_samples(samples) if samples is not None else drawn_chats(model, images, DRAWN, seed + OTHER_SEED)
    return {name: recheck(engine, calibration, chats) for name, calibration in calibrations.items()}


def print_promises(found: Mapping[str, Promise]) -> None:
    """A line for each: whether it holds here, and how surely."""
    for name, promise in found.items():
        kept = promise.held_out_kl <= promise.kl
        sure = " surely" if promise.bound <= promise.kl else ""
        OUT.print(
            f"{name}: promised KL {promise.kl:g}, found {promise.held_out_kl:.3g} (below {promise.bound:.3g} with "
            f"{100 * promise.confidence:g} % confidence) on {promise.held_out} other samples: "
            f"{f'kept{sure}' if kept else 'not kept: calibrate anew, on samples like these'}",
            style=None if kept else "yellow",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def promises_as_data(found: Mapping[str, Promise]) -> dict[str, Any]:
    """The same for JSON."""
    return {name: asdict(promise) | {"kept": promise.held_out_kl <= promise.kl} for name, promise in found.items()}
