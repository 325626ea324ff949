"""Which technique goes with which family, asked of the techniques' own checks."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from mminfer.cache.digest import Digest
from mminfer.cache.lookm import LookM
from mminfer.errors import ConfigError
from mminfer.models.base import ModelSpec
from mminfer.models.registry import ADAPTERS, supported_families
from mminfer.operators.skip import OperatorSkip
from mminfer.positions.scaling import DynamicNTK, LinearScaling
from mminfer.positions.v2pe import V2PE
from mminfer.technique import Technique
from mminfer.tokens.merge import AIMMerge
from mminfer.tokens.prune import AIMPrune

YES = "yes"

TECHNIQUES: dict[str, Technique] = {
    "V2PE": V2PE(),
    "LinearScaling": LinearScaling(),
    "DynamicNTK": DynamicNTK(),
    "AIMMerge": AIMMerge(),
    "AIMPrune": AIMPrune(),
    "OperatorSkip ffn": OperatorSkip(ffn=[0]),
    "OperatorSkip attention": OperatorSkip(attention=[0]),
    "OperatorSkip block": OperatorSkip(block=[0]),
    "LookM": LookM(),
    "Digest": Digest(),
}


def support_table() -> dict[str, dict[str, str]]:
    """For each family and technique `YES`, or the reason for which the technique refuses it.

    Asked of the host's default configuration of each family, no weights needed. A checkpoint that differs in what the
    checks look at, such as a language model with sliding windows, can be refused more.
    """
    return {family: _support(default_spec(family)) for family in supported_families()}


def default_spec(family: str) -> ModelSpec:
    """The geometry of a family's default configuration."""
    return ADAPTERS[family].spec_of(family, CONFIG_MAPPING[family]().get_text_config())


def _support(spec: ModelSpec) -> dict[str, str]:
    return {name: _answer(technique, spec) for name, technique in TECHNIQUES.items()}


def _answer(technique: Technique, spec: ModelSpec) -> str:
    try:
        technique.check(spec)
    except ConfigError as error:
        return str(error)
    return YES
