"""What settings are made of: ranges of layers, and the checks that techniques share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mminfer.errors import ConfigError, shown

# Percent that stays at each step of a sweep: of a cache's entries, of an image's tokens.
CACHE_SHARES = (50, 20, 10, 5)
MERGE_SHARES = (50, 25, 12.5)

# What no setting passes, whatever it means: a sound bound of a field is far below.
MOST_COUNT = 2**31 - 1  # of tokens, entries or positions
MOST_SEED = 2**32 - 1
MOST_LAYERS = 10_000
MOST_FACTOR = 1e6
UNQUOTED = 2**256  # a number that no message shows in full
MOST_CHARACTERS = 200

if TYPE_CHECKING:
    from mminfer.models.spec import ModelSpec


@dataclass(frozen=True)
class LayerRange:
    """Layers `start <= i < end` with `i % interval == 0`; a float start or end is a fraction of the depth."""

    start: int | float = 0
    end: int | float = 1.0
    interval: int = 1

    def __post_init__(self) -> None:
        check_values("LayerRange", vars(self), UNQUOTED)
        bounds = [is_number(x, above=-MOST_LAYERS, most=MOST_LAYERS) for x in (self.start, self.end)]
        if not all(bounds) or not is_whole(self.interval, least=1, most=MOST_LAYERS):
            raise ConfigError(
                f"{self}: wanted layers as numbers and a whole interval of 1 or more, {MOST_LAYERS} at most"
            )

    def layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers' indices."""
        start, end = (layer_index(x, num_layers) for x in (self.start, self.end))
        return tuple(i for i in range(start, end) if i % self.interval == 0)


def is_number(value: Any, *, above: float = -math.inf, most: float = MOST_COUNT) -> bool:
    """Whether this is a finite number, no bool, above a bound and not beyond another."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and above < value <= most


def is_whole(value: Any, *, least: int, most: int = MOST_COUNT) -> bool:
    """Whether this is an int, no bool, within bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_values(owner: str, values: Mapping[str, Any], largest: int) -> None:
    """Raises `ConfigError` if a setting is a number that is not finite or beyond any sense, too long to be one, or such
    that two of them cannot be told apart, as arrays are.

    Args:
        owner: of the settings, for messages.
        values: by the fields' names; of sequences every element counts.
        largest: number; from `UNQUOTED` on, numbers that are not finite pass.
    """
    for name, value in values.items():
        if not _is_comparable(value):
            raise ConfigError(
                f"{owner}.{name} is of type {type(value).__name__}, whose values cannot be compared: wanted a number, "
                "a word, or a tuple of them"
            )
        if isinstance(value, float) and not math.isfinite(value) and largest < UNQUOTED:
            raise ConfigError(f"{owner}.{name}={shown(value)}, wanted a finite number")
        if isinstance(value, (int, float)) and abs(value) > largest and (isinstance(value, int) or largest < UNQUOTED):
            found = repr(value) if abs(value) < UNQUOTED else "a number of more than 256 bits"
            raise ConfigError(f"{owner}.{name}={found}, wanted a number of at most {MOST_COUNT}")
        if isinstance(value, str) and len(value) > MOST_CHARACTERS:
            raise ConfigError(f"{owner}.{name} has {len(value)} characters, wanted {MOST_CHARACTERS} at most")
        if isinstance(value, (list, tuple)):
            if len(value) > MOST_LAYERS:
                raise ConfigError(f"{owner}.{name} has {len(value)} values, wanted {MOST_LAYERS} at most")
            check_values(owner, {f"{name}[{i}]": x for i, x in enumerate(value)}, largest)


def _is_comparable(value: Any) -> bool:
    try:
        return isinstance(bool(value == value), bool)
    except Exception:  # arrays and tensors compare element by element
        return False


def check_seed(name: str, value: Any) -> None:
    """Raises `ConfigError` unless a lot can be drawn from this seed."""
    if not is_whole(value, least=0, most=MOST_SEED):
        raise ConfigError(f"{name}={shown(value)}, wanted a whole number from 0 to {MOST_SEED}")


def layer_index(layer: int | float, num_layers: int) -> int:
    """A layer given by its index (int) or as a fraction of the depth (float), as an index."""
    return layer if isinstance(layer, int) else round(layer * num_layers)


def check_layer(name: str, layer: Any, num_layers: int, *, last: int | None = None) -> None:
    """Raises `ConfigError` unless the layer lies in 0..last (default: the last layer of the model)."""
    last = num_layers - 1 if last is None else last
    if not is_number(layer) or not 0 <= layer_index(layer, num_layers) <= last:
        raise ConfigError(
            f"{name}={shown(layer)} does not fit a model of {num_layers} layers: give an index from 0 to {last}, "
            f"or a float from 0.0 to 1.0 as a fraction of the depth"
        )


def check_fraction(name: str, value: Any, *, zero: bool = False) -> None:
    """Raises `ConfigError` unless value is a number in (0, 1], or in [0, 1] with `zero`."""
    if not is_number(value) or not 0 <= value <= 1 or (value == 0 and not zero):
        interval = "[0, 1]" if zero else "(0, 1]"
        raise ConfigError(f"{name}={shown(value)}: a kept fraction must be a number in {interval}; 1 keeps all")


def check_full_attention(name: str, spec: ModelSpec) -> None:
    """Raises `ConfigError` if some of the model's layers attend within a window."""
    if spec.sliding_layers:
        raise ConfigError(
            f"{name}: {len(spec.sliding_layers)} of {spec.num_layers} layers attend within a sliding window, which "
            "eviction would stretch; leave cache=None for this model"
        )
