"""What leaves pictures before the vision tower; one file per method."""

from mminfer.tower.frame_dedup import FrameDedup
from mminfer.tower.patch_dedup import PatchDedup

__all__ = ["FrameDedup", "PatchDedup"]
