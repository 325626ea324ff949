"""Running requests on a model: one call at a time, patched for its duration, measured."""

from mminfer.running.options import RunOptions, check_length
from mminfer.running.prompt_reader import ReadingCancelled
from mminfer.running.runner import Runner

__all__ = ["ReadingCancelled", "RunOptions", "Runner", "check_length"]
