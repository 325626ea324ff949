"""Efficient inference for long-context multimodal LLMs behind one generate()."""

from mminfer.cache.digest import Digest
from mminfer.cache.lookm import LookM
from mminfer.config import InferenceConfig
from mminfer.engine import Engine
from mminfer.errors import ConfigError, InputError, MminferError, UnsupportedModelError
from mminfer.operators.skip import OperatorSkip
from mminfer.patching import patch, patched
from mminfer.positions.v2pe import V2PE
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.prune import AIMPrune

__version__ = "0.1.0"
__all__ = [
    "V2PE",
    "AIMMerge",
    "AIMPrune",
    "ConfigError",
    "Digest",
    "Engine",
    "InferenceConfig",
    "InputError",
    "LookM",
    "MminferError",
    "OperatorSkip",
    "UnsupportedModelError",
    "patch",
    "patched",
]
