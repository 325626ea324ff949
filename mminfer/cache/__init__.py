"""Compression of the key/value cache after the prompt pass."""

from mminfer.cache.lookm import LookM
from mminfer.cache.lookm_rules import lookm_compress, lookm_keep, lookm_merge

__all__ = ["LookM", "lookm_compress", "lookm_keep", "lookm_merge"]
