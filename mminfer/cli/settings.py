"""The settings that options name: presets, files and V2PE steps."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mminfer.errors import ConfigError, InputError

if TYPE_CHECKING:
    from mminfer.config import InferenceConfig

DEFAULT_PRESET = "regions"  # holds on a real model, and every family takes it
_LARGEST_CONFIG = 2**20  # characters
ROWS_OF_OTHERS = {"host", "blind"}  # names of rows that are no setting


def load_technique_file(path: Path) -> None:
    """Runs a Python file that defines techniques, so that settings and presets may name them.

    Raises:
        InputError: there is no such file, it fails, or it defines no technique.
    """
    from mminfer.config import TECHNIQUES

    spec = importlib.util.spec_from_file_location(f"technique_file_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"--technique-file {path}: no such Python file: pass the path of one")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's code raises anything
        raise InputError(f"--technique-file {path}: it raised {type(error).__name__}: {error}") from error
    if not any(technique.__module__ == spec.name for technique in TECHNIQUES.values()):
        raise InputError(f"--technique-file {path}: it defines no technique: wanted a class such as CacheTechnique's")


def request_settings(preset: str | None, config: Path | None, delta: str | None) -> InferenceConfig:
    """The settings of one request: a preset or a file, with a V2PE step put in.

    Raises:
        InputError: both were passed, or one cannot be read.
        ConfigError: there is no such preset, or the file holds no settings.
    """
    from mminfer.config import InferenceConfig

    if config is not None and preset is not None:
        raise InputError(f"--preset {preset} and --config {config}: pass one of them")
    settings = read_config(config) if config is not None else InferenceConfig.from_preset(preset or DEFAULT_PRESET)
    return settings if delta is None else with_delta(settings, delta)


def compared_settings(
    presets: Sequence[str], configs: Sequence[Path], deltas: Sequence[str] = ()
) -> dict[str, InferenceConfig]:
    """Every preset and file, as it is or with every V2PE step, by name.

    Raises:
        InputError: a file cannot be read, a step is none, or a setting comes twice.
        ConfigError: there is no such preset, or a file holds no settings.
    """
    from mminfer.config import InferenceConfig

    named = [(name, InferenceConfig.from_preset(name)) for name in presets]
    named += [(str(path), read_config(path)) for path in configs]
    if deltas:
        named = [
            (f"{name}, delta {delta}", with_delta(setting, delta))
            for name, setting in named
            for delta in dict.fromkeys(deltas)
        ]
    settings = dict(named)
    for name in ROWS_OF_OTHERS & settings.keys():
        raise InputError(f"--config {name}: rows of that name are something else's: rename the file")
    if len(settings) < len(named):
        raise InputError(f"{', '.join(name for name, _ in named)}: a setting was passed twice: pass it once")
    return settings


def read_config(path: Path) -> InferenceConfig:
    """The settings in a file that `InferenceConfig.to_json()` or `mminfer calibrate` wrote.

    Raises:
        InputError: the file cannot be read.
        ConfigError: it holds no settings.
    """
    from mminfer.config import InferenceConfig
    from mminfer.settings_file import settings_in

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_LARGEST_CONFIG + 1)
        if len(text) > _LARGEST_CONFIG:
            raise InputError(f"--config {path}: more than {_LARGEST_CONFIG:,} characters: wanted the settings alone")
        found = settings_in(text)
        return dataclasses.replace(InferenceConfig.from_dict(found.config), calibrated_on=found.model)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from error
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
        raise InputError(f"--config {path}: {error}") from error


def with_delta(settings: InferenceConfig, delta: str) -> InferenceConfig:
    """The settings with visual positions by V2PE at this step.

    Raises:
        InputError: the text is no step.
        ConfigError: the step is out of range.
    """
    from mminfer.positions.v2pe import V2PE

    return dataclasses.replace(settings, positions=V2PE(_parsed_delta(delta)))


def _parsed_delta(text: str) -> float | str:
    """A V2PE step such as "1/16", "0.0625" or "auto"."""
    if text == "auto":
        return text
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"--delta {text}: wanted a number such as 1/16 or 0.0625, or auto") from error
