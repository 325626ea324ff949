"""Compression of the key/value cache after the prompt pass."""

from mminfer.cache.lookm import LookM, lookm_compress, lookm_keep, lookm_merge

__all__ = ["LookM", "lookm_compress", "lookm_keep", "lookm_merge"]
