"""Running requests on a model: one call at a time, patched for its duration, measured."""

from mminfer.running.merging import overridden
from mminfer.running.model_lock import lock_of
from mminfer.running.options import RunOptions
from mminfer.running.prompt_reader import ReadingCancelled
from mminfer.running.rehearsal import Made, made_by_host
from mminfer.running.runner import Runner
from mminfer.running.settings import GenerationSettings

__all__ = [
    "GenerationSettings",
    "Made",
    "ReadingCancelled",
    "RunOptions",
    "Runner",
    "lock_of",
    "made_by_host",
    "overridden",
]
