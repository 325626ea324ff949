"""What a technique of anybody's declares and gives back, held to the interface: a mistake names the class."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mminfer.errors import ConfigError, shown
from mminfer.technique.entries import COLUMNS, CacheEntries
from mminfer.technique.registry import is_registered
from mminfer.technique.replayed import ReplayedStretch
from mminfer.technique.views import LayerView

if TYPE_CHECKING:
    from mminfer.technique.stages import CacheTechnique, PruneTechnique, Technique

OPTIONAL_COLUMNS = COLUMNS[2:]  # beside keys and values


def check_declared(technique: Technique) -> None:
    """Raises `ConfigError` unless the class is a frozen dataclass whose settings can be compared and saved."""
    kind = type(technique)
    parameters = getattr(kind, "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise ConfigError(
            f"{kind.__name__} is no frozen dataclass, so its settings cannot be compared or saved: put "
            "@dataclass(frozen=True) above the class"
        )
    fields = {field.name for field in dataclasses.fields(technique)}  # type: ignore[arg-type]
    for parent in kind.__mro__:
        loose = [
            name
            for name, annotation in vars(parent).get("__annotations__", {}).items()
            if dataclasses.is_dataclass(parent) and name not in fields and "ClassVar" not in str(annotation)
        ]
        if loose:
            raise ConfigError(
                f"{parent.__name__}.{loose[0]} is no setting, since the class is no dataclass of its own: put "
                "@dataclass(frozen=True) above the class"
            )
    if "technique" in fields and is_registered(kind):
        raise ConfigError(f"{kind.__name__}.technique: saved settings use that name for the class: rename the field")


def check_columns(technique: CacheTechnique) -> None:
    """Raises `ConfigError` unless the columns that a cache asks for exist."""
    columns: Any = technique.columns
    if isinstance(columns, str) or not set(columns) <= set(OPTIONAL_COLUMNS):
        raise ConfigError(
            f"{type(technique).__name__}.columns={shown(columns)}, wanted a tuple of {', '.join(OPTIONAL_COLUMNS)}"
        )


def kept_rows(technique: PruneTechnique, view: LayerView) -> Tensor:
    """[K] int64: the rows that the technique keeps of a view.

    Raises:
        ConfigError: they are no row numbers in ascending order, or the last row is not among them.
    """
    kept: Any = technique.apply(view)
    name, rows = type(technique).__name__, len(view.is_visual)
    if not isinstance(kept, Tensor) or kept.dtype != torch.int64 or kept.dim() != 1:
        found = f"{kept.dtype} of shape {list(kept.shape)}" if isinstance(kept, Tensor) else type(kept).__name__
        raise ConfigError(f"{name}.apply gave {found}, wanted row numbers, int64 [K]; of a mask: mask.nonzero()[:, 0]")
    if kept.device.type == "cpu" and rows:  # on a GPU this would wait for it in every layer
        ascending = bool((kept.diff() > 0).all()) and len(kept) > 0
        if not ascending or int(kept[0]) < 0 or int(kept[-1]) != rows - 1:
            raise ConfigError(
                f"{name}.apply gave rows {kept[:8].tolist()} ... of {rows}, wanted them ascending, each once, and the "
                "last row among them, which asks for the next token"
            )
    return kept


def checked_entries(technique: CacheTechnique, found: Any, given: CacheEntries) -> CacheEntries:
    """What a cache technique kept of the entries that it was given.

    Raises:
        ConfigError: it is no `CacheEntries` of the same heads, head size and columns.
    """
    name = type(technique).__name__
    if not isinstance(found, CacheEntries):
        raise ConfigError(f"{name} gave {type(found).__name__}, wanted CacheEntries: use view.entries.select(places)")
    if not technique.by_head and (found.is_packed or found.log_mass is not None):
        raise ConfigError(
            f"{name} gave {'heads of different lengths' if found.is_packed else 'log-masses'}, but its class does not "
            "say that it works so: set by_head: ClassVar[bool] = True"
        )
    shapes = {tuple(x.shape) for x in (found.keys, found.values)}
    batch, heads, kept, size = found.keys.shape if found.keys.dim() == 4 else (0, 0, 0, 0)
    groups = 1 if found.is_packed else len(given.lengths)
    if len(shapes) > 1 or (batch, heads, size) != (1, groups, given.keys.shape[3]) or kept == 0:
        wanted = f"[1, {groups}, S, {given.keys.shape[3]}] with S of 1 or more"
        raise ConfigError(f"{name} gave keys and values of {[list(s) for s in shapes]}, wanted {wanted} of both")
    _check_heads(name, found, len(given.lengths))
    theirs = found.columns
    for column, held in given.columns.items():
        other = theirs[column]
        if held is not None and (other is None or other.shape[:3] != found.keys.shape[:3]):
            raise ConfigError(
                f"{name} lost the column {column} of its entries: make what it gives by CacheEntries.select or "
                "CacheEntries.merged"
            )
    return found


def _check_heads(name: str, found: CacheEntries, heads: int) -> None:
    """Raises `ConfigError` unless packed entries are those of so many heads, and log-masses one number for each."""
    lengths: Any = found.head_lengths
    if lengths is not None:
        whole = isinstance(lengths, tuple) and all(type(n) is int and n >= 0 for n in lengths)
        if not whole or len(lengths) != heads or sum(lengths) != len(found):
            raise ConfigError(
                f"{name} gave head_lengths={shown(lengths)}, wanted {heads} whole numbers that add up to its "
                f"{len(found)} entries: use CacheEntries.select_heads"
            )
    mass: Any = found.log_mass
    if mass is not None:
        sound = isinstance(mass, Tensor) and mass.dtype == torch.float32 and mass.shape == found.keys.shape[:3]
        if not sound or (mass.device.type == "cpu" and not bool(mass.isfinite().all())):
            given = f"{mass.dtype} {list(mass.shape)}" if isinstance(mass, Tensor) else type(mass).__name__
            raise ConfigError(f"{name} gave log_mass {given}, wanted finite float32 {list(found.keys.shape[:3])}")


def compressed_layers(
    technique: CacheTechnique,
    layers: Sequence[CacheEntries],
    demands: Sequence[float] | Sequence[Sequence[ReplayedStretch]],
    tokens_seen: Sequence[int],
) -> list[CacheEntries]:
    """What a technique that works across layers keeps in each of them.

    Args:
        technique: which.
        layers: all entries of each layer.
        demands: of each layer, `layer_demand`; or what was asked for, where the technique has rows replayed.
        tokens_seen: tokens that each layer has taken in.

    Raises:
        ConfigError: it gives another number of layers, or what `checked_entries` refuses.
    """
    compress: Any = technique.compress_layers if technique.replay is None else technique.compress_replayed
    found = compress(layers, demands, tokens_seen)
    if len(found) != len(layers):
        raise ConfigError(f"{type(technique).__name__}.{compress.__name__} gave {len(found)} layers of {len(layers)}")
    return [checked_entries(technique, kept, given) for kept, given in zip(found, layers, strict=True)]
