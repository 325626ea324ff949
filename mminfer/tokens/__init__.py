"""Fewer tokens: merging them before the language model, pruning them inside it."""

from mminfer.tokens.merge import aim_merge, merge_round
from mminfer.tokens.prune import aim_importance, aim_keep, aim_schedule

__all__ = ["aim_importance", "aim_keep", "aim_merge", "aim_schedule", "merge_round"]
