"""Needles in long contexts: datasets made on the spot, and how to ask any model for them."""

from mminfer.needle.labels import Labels
from mminfer.needle.mmneedle import MMNeedle
from mminfer.needle.protocol import NeedleProtocol
from mminfer.needle.temporal import Temporal

PROTOCOLS: dict[str, type[NeedleProtocol]] = {cls.name: cls for cls in (MMNeedle, Temporal, Labels)}

__all__ = ["PROTOCOLS", "Labels", "MMNeedle", "NeedleProtocol", "Temporal"]
