"""Compression of the key/value cache after the prompt pass."""

from mminfer.cache.digest import Digest
from mminfer.cache.lookm import LookM
from mminfer.cache.lookm_rules import lookm_compress, lookm_keep, lookm_merge

__all__ = ["Digest", "LookM", "lookm_compress", "lookm_keep", "lookm_merge"]
