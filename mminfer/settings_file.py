"""Files of settings: the bare settings of a config, or those that a calibration chose for one model."""

from __future__ import annotations

import dataclasses
import json
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from mminfer.errors import ConfigError, InputError, shown
from mminfer.models.fingerprint import Fingerprint
from mminfer.technique import LayerRange

FORMAT = 1
LARGEST = 2**24  # characters
_LAYER_RANGE = {field.name for field in dataclasses.fields(LayerRange)}
_DEEPEST, _LONGEST, _LARGEST = 4, 200, 2**63  # of what a setting may be made of


class FoundSettings(NamedTuple):
    """What a file of settings says.

    Attributes:
        config: every stage's technique, as plain data.
        model: for which model alone; None: the file is bare.
        calibration: all that the calibration noted; empty where there was none.
    """

    config: Any
    model: Fingerprint | None
    calibration: dict[str, Any]


def read_settings(path: str | PathLike[str]) -> FoundSettings:
    """The settings in a file.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it holds no settings, or those of another version.
    """
    if not isinstance(path, (str, PathLike)):
        raise InputError(f"path {shown(path)}: wanted the path of a file of settings")
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
        raise InputError(f"{shown(str(path))}: {error}") from error
    if len(text) > LARGEST:
        raise InputError(f"{shown(str(path))}: more than {LARGEST:,} characters: wanted the settings alone")
    try:
        return settings_in(text)
    except ConfigError as error:
        raise ConfigError(f"{shown(str(path))}: {error}") from error


def settings_in(text: str) -> FoundSettings:
    """The settings in a text, bare or calibrated.

    Raises:
        ConfigError: there are none.
    """
    data = parsed(text)
    if not isinstance(data, dict) or "calibration" not in data:
        return FoundSettings(data, None, {})
    if data.get("format") != FORMAT:
        raise ConfigError(
            f"calibrated settings of format {shown(data.get('format'))}, this version reads {FORMAT}: run "
            "`mminfer calibrate` once more"
        )
    if not isinstance(data["calibration"], dict) or "config" not in data:
        raise ConfigError(f"calibrated settings {shown(data)}: wanted a file that `mminfer calibrate` wrote")
    return FoundSettings(data["config"], Fingerprint.from_dict(data.get("model")), data["calibration"])


def parsed(text: str | bytes | bytearray) -> Any:
    """JSON of which every field is told once.

    Raises:
        ConfigError: it is no JSON, or a field is told twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config is not JSON ({error!s:.200}); write it with InferenceConfig.to_json()") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"config: {shown(twice)} stands there twice: leave one of them out")
    return found


def field_from_data(name: str, value: Any, depth: int = 0) -> Any:
    """A setting as its technique takes it.

    Raises:
        ConfigError: it is too large, too long or too deep to be one.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{name}: nested more than {_DEEPEST} deep: wanted numbers, words or lists of them")
    if isinstance(value, str) and len(value) > _LONGEST:
        raise ConfigError(f"{name}={value[:20]!r}... of {len(value)} characters: wanted {_LONGEST} at most")
    if isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
        raise ConfigError(f"{name}: a whole number of {value.bit_length()} bits: wanted 63 at most")
    if isinstance(value, dict) and value.keys() == _LAYER_RANGE:
        return LayerRange(**{key: field_from_data(name, own, depth + 1) for key, own in value.items()})
    if isinstance(value, list):
        return tuple(field_from_data(name, own, depth + 1) for own in value)
    return value
