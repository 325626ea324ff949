"""Encoded pictures, kept by what they show: one that comes again costs its vision tower nothing."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from mminfer.errors import ConfigError, shown
from mminfer.models.spec import VisualUnit

if TYPE_CHECKING:
    from mminfer.models.adapter import ModelAdapter
    from mminfer.technique import TowerTechnique

SETTINGS = ("vision_feature_layer", "vision_feature_select_strategy")
MOST_BYTES = 2**62


class EncoderCache:
    """What a vision tower and its projector gave for pictures, least recently used ones dropped beyond a bound.

    A picture is known by the values of its pixels as the tower is given them, by the tower's settings, and by what it
    computes in under autocast. What is kept is dropped when a weight of the tower or projector is replaced or changed
    in place, or when they go into training mode. Changes that leave no trace on a weight (in place through `.data` or
    in inference mode, by adapters switched on or off, by hooks) need a call of `clear`.

    Threads may share it.

    Attributes:
        capacity_bytes: what is kept at most.
        held_bytes: what is kept now.
        hits: pictures that were found so far.
        misses: pictures that were not.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes, self.held_bytes = capacity_bytes, 0
        self.hits = self.misses = 0
        self._kept: OrderedDict[bytes, tuple[list[VisualUnit], int]] = OrderedDict()
        self._stamp: object = None
        self._lock = Lock()

    def __len__(self) -> int:
        """Pictures that are kept."""
        return len(self._kept)

    def clear(self) -> None:
        """Drops all that is kept."""
        with self._lock:
            self._kept.clear()
            self.held_bytes = 0

    def find(self, keys: Sequence[bytes], stamp: object) -> dict[bytes, list[VisualUnit]]:
        """What is kept of these pictures; stamp: `tower_stamp` of now."""
        with self._lock:
            if stamp != self._stamp:
                self._kept.clear()
                self._stamp, self.held_bytes = stamp, 0
            found = {key: self._kept[key][0] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            hits = len(keys) - len(set(keys) - set(found))  # one that comes twice in a call is encoded once
            self.hits, self.misses = self.hits + hits, self.misses + len(keys) - hits
            return found

    def keep(self, key: bytes, units: Sequence[VisualUnit], stamp: object) -> None:
        """Keeps a copy of a picture, unless it is larger than all that may be kept."""
        size = sum(_bytes_of(unit) for unit in units)
        if size > self.capacity_bytes:
            return
        copies = [_copied(unit) for unit in units]
        with self._lock:
            if stamp != self._stamp:  # another call has seen other weights meanwhile
                return
            self.held_bytes += size - self._kept.pop(key, ([], 0))[1]
            self._kept[key] = copies, size
            while self.held_bytes > self.capacity_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.held_bytes -= freed


def encoder_cache_of(capacity_bytes: int) -> EncoderCache | None:
    """A cache of so many bytes; None for 0.

    Raises:
        ConfigError: it is no number of bytes.
    """
    whole = isinstance(capacity_bytes, int) and not isinstance(capacity_bytes, bool)
    if not whole or not 0 <= capacity_bytes <= MOST_BYTES:
        raise ConfigError(f"encoder_cache_bytes={shown(capacity_bytes)}, wanted a whole number of bytes, 0 for none")
    return EncoderCache(capacity_bytes) if capacity_bytes else None


def picture_key(picture: Mapping[str, Any], technique: TowerTechnique | None, kind: str) -> bytes:
    """By what a picture is known.

    Args:
        picture: what its encoding depends on, by name.
        technique: ahead of the tower.
        kind: image or video.
    """
    digest = hashlib.sha256(f"{kind} {technique!r}".encode())
    for device in {x.device.type for x in picture.values() if isinstance(x, Tensor)}:
        if torch.is_autocast_enabled(device):
            digest.update(f"{torch.get_autocast_dtype(device)} ".encode())
    for name, value in sorted(picture.items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(f"{name} {value!r} ".encode())
    return digest.digest()


def tower_stamp(adapter: ModelAdapter) -> object:
    """Another one whenever a weight ahead of the language model was replaced or changed, a setting of the tower, or
    whether it is in training.
    """
    modules = [child for child in adapter.base.children() if child is not adapter.language_model]
    held = [x for child in modules for x in (*child.parameters(), *child.buffers())]
    held += [x for x in (*adapter.base._parameters.values(), *adapter.base._buffers.values()) if x is not None]
    config = adapter.model.config
    settings = [getattr(config, name, None) for name in SETTINGS]
    vision = getattr(getattr(config, "vision_config", None), "_attn_implementation", None)
    training = tuple(child.training for child in modules)
    return tuple(_trace(x) for x in held), repr(settings), vision, training


def _trace(weight: Tensor) -> tuple[object, int, torch.dtype]:
    """Where a weight lies, how often it was changed in place, and its dtype.

    An address alone may be another weight's by now, as after `half()` and `float()`: of memory that is referred to
    weakly there is no second one.
    """
    try:
        version = weight._version
    except RuntimeError:  # made in inference mode
        version = 0
    if weight.is_meta:  # its place is held for one that lies elsewhere, by another tensor each time
        return None, version, weight.dtype
    try:
        place = StorageWeakRef(weight.untyped_storage()), weight.storage_offset()
    except RuntimeError:  # of a kind that lies nowhere
        return id(weight), version, weight.dtype
    return place, version, weight.dtype


def _bytes_of(unit: VisualUnit) -> int:
    tensors = (unit.features, unit.size, unit.companions, unit.back)
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _copied(unit: VisualUnit) -> VisualUnit:
    """With memory of its own: what the host gives are parts of a whole call's."""
    companions = None if unit.companions is None else unit.companions.clone()
    back = None if unit.back is None else unit.back.clone()
    return replace(unit, features=unit.features.clone(), companions=companions, back=back)
