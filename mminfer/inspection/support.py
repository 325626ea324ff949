"""Which technique goes with which family, asked of the techniques' own checks."""

from __future__ import annotations

from transformers import CONFIG_MAPPING

from mminfer.config import TECHNIQUES
from mminfer.errors import ConfigError
from mminfer.models.registry import ADAPTERS, supported_families
from mminfer.models.spec import ModelSpec
from mminfer.technique import Technique

YES = "yes"


def technique_variants() -> dict[str, Technique]:
    """What a family may take or refuse; baselines are left out."""
    own = (technique for technique in TECHNIQUES.values() if not technique.baseline)
    return {name: variant for technique in own for name, variant in technique.variants().items()}


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
    return {name: _answer(technique, spec) for name, technique in technique_variants().items()}


def _answer(technique: Technique, spec: ModelSpec) -> str:
    try:
        technique.check(spec)
    except ConfigError as error:
        return str(error)
    return YES
