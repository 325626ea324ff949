"""Operators of the language model that visual tokens may skip."""

from mminfer.operators.skip import OperatorSkip

__all__ = ["OperatorSkip"]
