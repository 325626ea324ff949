"""Compression of the key/value cache after the prompt pass."""

from mminfer.cache.digest import Digest
from mminfer.cache.lookm import LookM
from mminfer.cache.lookm_rules import lookm_compress, lookm_keep, lookm_merge
from mminfer.cache.replay import Replay

__all__ = ["Digest", "LookM", "Replay", "lookm_compress", "lookm_keep", "lookm_merge"]
