"""What was measured so far, by settings and sample; in a file, so that an interrupted calibration goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mminfer.calibration.judging import Outcome
from mminfer.chat_files.writing import checked_path, write_whole
from mminfer.config import InferenceConfig
from mminfer.errors import InputError, shown

EVERY_S = 5.0
_KIND = "state of an mminfer calibration"


class Store:
    """Outcomes and other numbers that were measured; each is measured once.

    Args:
        path: of the file that keeps them; None: they live as long as the store.
        identity: of the model, the samples and what else outcomes depend on.

    Raises:
        InputError: the file is of another calibration, or none.
    """

    def __init__(self, path: str | Path | None, identity: Mapping[str, Any]) -> None:
        self._path = None if path is None else checked_path(path)
        self._identity = json.loads(json.dumps(identity))
        self._outcomes: dict[str, dict[str, Any]] = {}
        self._numbers: dict[str, list[float]] = {}
        self._written = time.monotonic()
        if self._path is not None and Path(self._path).exists():
            self._take_up(self._path)

    def outcome(self, config: InferenceConfig, where: str, make: Callable[[], Outcome]) -> Outcome:
        """Settings on one prompt; where: by which sample and protocol it is told."""
        key = f"{_digest(config)} {where}"
        if key not in self._outcomes:
            self._outcomes[key] = make().to_dict()
            self._write_sometimes()
        return Outcome.from_dict(self._outcomes[key])

    def note(self, config: InferenceConfig, where: str, outcome: Outcome) -> None:
        """Takes an outcome that somebody has anyway, unless there is one already."""
        self.outcome(config, where, lambda: outcome)

    def numbers(self, key: str, make: Callable[[], list[float]]) -> list[float]:
        """Numbers of any kind, by a key."""
        if key not in self._numbers:
            self._numbers[key] = make()
            self._write_sometimes()
        return self._numbers[key]

    def write(self) -> None:
        """Writes the file whole, or leaves there what was there.

        Raises:
            InputError: it cannot be written.
        """
        if self._path is None:
            return
        measured = {"outcomes": self._outcomes, "numbers": self._numbers, "sha256": self._checksum}
        found = {"kind": _KIND, "identity": self._identity, **measured}
        try:
            write_whole(self._path, json.dumps(found).encode())
        except OSError as error:
            raise InputError(f"{shown(self._path)}: {error}: wanted a file that can be written") from error
        self._written = time.monotonic()

    @property
    def _checksum(self) -> str:
        return _checksum(self._outcomes, self._numbers)

    def remove(self) -> None:
        """The calibration is through: nobody goes on from here."""
        if self._path is not None:
            with suppress(OSError):
                Path(self._path).unlink()

    def _write_sometimes(self) -> None:
        if self._path is not None and time.monotonic() - self._written > EVERY_S:
            self.write()

    def _take_up(self, path: str) -> None:
        try:
            found = json.loads(Path(path).read_text("utf-8"))
            if found["kind"] != _KIND:
                raise ValueError("it is of another kind")
            identity = found["identity"]
            outcomes, numbers = dict(found["outcomes"]), dict(found["numbers"])
            for outcome in outcomes.values():
                Outcome.from_dict(outcome)
            if found["sha256"] != _checksum(outcomes, numbers):
                raise ValueError("it was changed since it was written")
            if not isinstance(identity, dict):
                raise TypeError("its identity is none")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(f"{shown(path)}: no state of a calibration ({error!s:.200}): remove it") from error
        if identity != self._identity:
            names = [name for name in self._identity if identity.get(name) != self._identity[name]]
            raise InputError(
                f"{shown(path)}: the state of a calibration with another {', '.join(names) or 'identity'}: remove it, "
                "or go on with what began it"
            )
        self._outcomes, self._numbers = outcomes, numbers


def _checksum(outcomes: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """Of what was measured: a promise is by these numbers."""
    return hashlib.sha256(json.dumps([outcomes, numbers], sort_keys=True).encode()).hexdigest()[:24]


def _digest(config: InferenceConfig) -> str:
    return hashlib.sha256(config.to_json().encode()).hexdigest()[:24]
