"""Efficient inference for long-context multimodal LLMs behind one generate().

Importing the package loads nothing heavy: each public name, and each module below, is loaded when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "V2PE",
    "AIMMerge",
    "AIMPrune",
    "Calibration",
    "ConfigError",
    "Digest",
    "DynamicNTK",
    "EmbeddingPart",
    "Engine",
    "FrameDedup",
    "GenerationOutput",
    "ImagePart",
    "InferenceConfig",
    "InputError",
    "LayerRange",
    "LinearScaling",
    "LookM",
    "MediaOptions",
    "Message",
    "MminferError",
    "OperatorSkip",
    "PatchDedup",
    "RegionMerge",
    "Replay",
    "TextPart",
    "UnsupportedModelError",
    "VideoPart",
    "calibrate",
    "patch",
    "patched",
]

if TYPE_CHECKING:  # what type checkers and editors read; a test holds it to the table below
    from mminfer import cache as cache
    from mminfer import media as media
    from mminfer import nano as nano
    from mminfer import operators as operators
    from mminfer import positions as positions
    from mminfer import technique as technique
    from mminfer import tokens as tokens
    from mminfer import tower as tower
    from mminfer.cache import Digest, LookM, Replay
    from mminfer.calibration import Calibration, calibrate
    from mminfer.config import InferenceConfig
    from mminfer.engine import Engine
    from mminfer.errors import ConfigError, InputError, MminferError, UnsupportedModelError
    from mminfer.inputs.content import MediaOptions
    from mminfer.inputs.parts import EmbeddingPart, ImagePart, Message, TextPart, VideoPart
    from mminfer.operators import OperatorSkip
    from mminfer.output import GenerationOutput
    from mminfer.patching import patch, patched
    from mminfer.positions import V2PE, DynamicNTK, LinearScaling
    from mminfer.technique import LayerRange
    from mminfer.tokens.merge import AIMMerge
    from mminfer.tokens.prune import AIMPrune
    from mminfer.tokens.regions import RegionMerge
    from mminfer.tower import FrameDedup, PatchDedup
else:  # hidden from type checkers, which would take any name for one of ours
    _NAMES = {
        "mminfer.cache": ("Digest", "LookM", "Replay"),
        "mminfer.calibration": ("Calibration", "calibrate"),
        "mminfer.config": ("InferenceConfig",),
        "mminfer.engine": ("Engine",),
        "mminfer.errors": ("ConfigError", "InputError", "MminferError", "UnsupportedModelError"),
        "mminfer.inputs.content": ("MediaOptions",),
        "mminfer.inputs.parts": ("EmbeddingPart", "ImagePart", "Message", "TextPart", "VideoPart"),
        "mminfer.operators": ("OperatorSkip",),
        "mminfer.output": ("GenerationOutput",),
        "mminfer.patching": ("patch", "patched"),
        "mminfer.positions": ("V2PE", "DynamicNTK", "LinearScaling"),
        "mminfer.technique": ("LayerRange",),
        "mminfer.tokens.merge": ("AIMMerge",),
        "mminfer.tokens.prune": ("AIMPrune",),
        "mminfer.tokens.regions": ("RegionMerge",),
        "mminfer.tower": ("FrameDedup", "PatchDedup"),
    }
    _MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

    def __getattr__(name: str) -> Any:
        """Loads a public name, or a module of the package, when it is first asked for."""
        from importlib import import_module

        if name in _MODULE_OF:
            value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
            return value
        if name in _modules():
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_modules()})

    def _modules() -> set[str]:
        """Modules and folders beside this file; none is loaded."""
        from pkgutil import iter_modules

        return {module.name for module in iter_modules(__path__) if not module.name.startswith("_")}
