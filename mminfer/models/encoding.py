"""From pixels to what the language model sees of pictures: by the host's encoders, as far as nobody knows it yet."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mminfer.errors import InputError, UnsupportedModelError
from mminfer.layout import Modality
from mminfer.models.encoder_cache import EncoderCache, picture_key, tower_stamp
from mminfer.models.spec import VisualUnit
from mminfer.models.vision import PIXEL_INPUTS, VisionWork

if TYPE_CHECKING:
    from mminfer.models.adapter import ModelAdapter
    from mminfer.technique import TowerTechnique


@dataclass(frozen=True)
class EncoderCall:
    """One call of a host's encoder.

    Args:
        modality: of the pixels.
        inputs: the model's inputs that it read.
        ragged: what it took, where not all patches went through the tower; None: whole pictures.
    """

    modality: Modality
    inputs: Mapping[str, Any]
    ragged: VisionWork | None = None


@dataclass(frozen=True)
class Encoded:
    """The pictures of a request, encoded.

    Args:
        units: images and frames by modality, in prompt order.
        calls: what that took.
        hits: images and videos that were kept from earlier, or came twice.
        pixels: the model's inputs from which they are; none where features came ready made.
        copies: sequences in a row that share their pictures.
    """

    units: dict[Modality, list[VisualUnit]]
    calls: tuple[EncoderCall, ...] = ()
    hits: int = 0
    pixels: Mapping[str, Any] = field(default_factory=dict)
    copies: int = 1

    def repeated(self, tokens: Mapping[Modality, Sequence[int]], copies: int) -> Encoded:
        """Every sequence so many times in a row, as beams repeat a batch; tokens: placeholders of each sequence."""
        if copies == 1:
            return self
        units = {}
        for modality, of_kind in self.units.items():
            rest, units[modality] = list(of_kind), list[VisualUnit]()
            for count in tokens[modality]:
                own: list[VisualUnit] = []
                while rest and sum(len(unit.features) for unit in own) < count:
                    own.append(rest.pop(0))
                units[modality] += own * copies
            units[modality] += rest
        return replace(self, units=units, copies=copies)


class HostEncoder:
    """Calls a host's encoders.

    Args:
        adapter: how the model is read.
        technique: what leaves pictures ahead of the tower; None: nothing.
        cache: of pictures that were encoded before; None: none are kept.
    """

    def __init__(
        self, adapter: ModelAdapter, technique: TowerTechnique | None = None, cache: EncoderCache | None = None
    ) -> None:
        self._adapter, self._technique, self._cache = adapter, technique, cache

    @property
    def is_plain(self) -> bool:
        """Whether pictures go through the host's tower as they come, all of them."""
        return self._technique is None and self._cache is None

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Images and frames of a request in prompt order.

        Features that `generate` has encoded already (`mm_encoder_outputs`) are taken as they are.

        Raises:
            InputError: they are there, but something should leave ahead of the tower.
        """
        ready = {kind: (inputs.get("mm_encoder_outputs") or {}).get(kind.name.lower()) for kind in PIXEL_INPUTS}
        if self._technique is not None and any(output is not None for output in ready.values()):
            raise InputError(
                f"mm_encoder_outputs: these pictures went through the tower already, from which "
                f"{type(self._technique).__name__} should have kept patches: pass their pixels, or leave tower=None"
            )
        units, calls, hits = dict[Modality, list[VisualUnit]](), list[EncoderCall](), 0
        read: dict[str, Any] = {}
        for modality, pixels in PIXEL_INPUTS.items():
            encode = getattr(self._adapter.base, f"get_{modality.name.lower()}_features", None)
            if ready[modality] is not None:
                units[modality] = self._adapter.split_units(modality, ready[modality])
            elif inputs.get(pixels) is not None and encode is not None:
                found = self._of_kind(modality, inputs, encode)
                units |= found.units
                calls += found.calls
                hits += found.hits
                read |= found.pixels
        return Encoded(units, tuple(calls), hits, read)

    def _of_kind(self, modality: Modality, inputs: Mapping[str, Any], encode: Any) -> Encoded:
        # The pixels come first; some host versions call those of a video `pixel_values` too.
        _, *others = inspect.signature(encode).parameters
        given = {k: v for k, v in inputs.items() if k in others and k not in PIXEL_INPUTS.values() and v is not None}
        given[PIXEL_INPUTS[modality]] = inputs[PIXEL_INPUTS[modality]]
        found = None if self._cache is None else self._through_cache(modality, given, self._cache)
        if found is None:
            units, call = self._call(modality, given)
            found = Encoded({modality: units}, (call,))
        return replace(found, pixels=given)

    def _through_cache(self, modality: Modality, given: dict[str, Any], cache: EncoderCache) -> Encoded | None:
        """Encodes what is not kept yet, each picture once; None where pictures cannot be told apart."""
        tower = self._adapter.tower
        pictures = tower.pictures(modality, given)
        if not pictures:
            return None
        keys = [picture_key(picture, self._technique, modality.name) for picture in pictures]
        stamp = tower_stamp(self._adapter)
        known = cache.find(keys, stamp)
        missing = [i for i, key in enumerate(keys) if key not in known and keys.index(key) == i]
        hits, calls = len(keys) - len(missing), list[EncoderCall]()
        if missing:
            part = given if len(missing) == len(keys) else tower.chosen(modality, given, missing)
            if part is None:
                part, missing, hits = given, list(range(len(keys))), 0
            units, call = self._call(modality, part)
            calls.append(call)
            if len(units) % len(missing):
                return None if part is not given else Encoded({modality: units}, (call,))
            each = len(units) // len(missing)
            for place, i in enumerate(missing):
                known[keys[i]] = units[place * each : (place + 1) * each]
                cache.keep(keys[i], known[keys[i]], stamp)
        return Encoded({modality: [unit for key in keys for unit in known[key]]}, tuple(calls), hits)

    def _call(self, modality: Modality, given: Mapping[str, Any]) -> tuple[list[VisualUnit], EncoderCall]:
        """Runs the host's encoder on what it is to be given, by name."""
        adapter, name = self._adapter, PIXEL_INPUTS[modality]
        rest = {k: v for k, v in given.items() if k != name}
        method = f"get_{modality.name.lower()}_features"
        if self._technique is None:
            output = getattr(adapter.base, method)(given[name], **rest, return_dict=True)
            return adapter.split_units(modality, output), EncoderCall(modality, given)
        tower = adapter.tower
        ragged = tower.ragged(tower, self._technique, tower.work(modality, given), tower.frames(modality, given))
        base = copy.copy(adapter.base)  # same modules; only this one's tower is another
        vars(base)[tower.module] = ragged
        output = getattr(base, method)(given[name], **rest, return_dict=True)
        if ragged.work is None:
            raise UnsupportedModelError(
                f"{method} of this {type(adapter.base).__name__} never calls its {tower.module}, so that "
                f"{type(self._technique).__name__} could not work: leave tower=None for this model"
            )
        units = adapter.split_units(modality, output)
        if ragged.owner is not None and tower.cells_are_tokens:
            units = _with_owners(units, ragged.owner)
        return units, EncoderCall(modality, given, ragged.work)


def _with_owners(units: list[VisualUnit], owner: Tensor) -> list[VisualUnit]:
    """Units whose tokens are told which ones stand for them; as they are where tokens are something else than cells.

    Args:
        units: of a call.
        owner: [N] int64, the cell that stands for each of the call's.
    """
    lengths = [len(unit.features) for unit in units]
    if sum(lengths) != len(owner):
        return units
    back = (torch.arange(len(owner)) - owner).split(lengths)
    return [replace(unit, back=own) for unit, own in zip(units, back, strict=True)]
