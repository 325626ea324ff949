"""Drop-in patching: a loaded model's own `forward` and `generate` take our prompt pass until it is undone."""

from mminfer.patching.handle import PatchHandle, patch, patched
from mminfer.patching.model_pass import ModelPass
from mminfer.patching.replacement import check_unpatched, is_patched
from mminfer.patching.stand_in import StandIn

__all__ = ["ModelPass", "PatchHandle", "StandIn", "check_unpatched", "is_patched", "patch", "patched"]
