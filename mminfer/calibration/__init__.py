"""Calibration: from a loss that is allowed to settings, by a few samples of a user's."""

from mminfer.calibration.calibrating import Plan, calibrate, checked_request, recheck
from mminfer.calibration.result import Calibration, CurvePoint, Promise

__all__ = ["Calibration", "CurvePoint", "Plan", "Promise", "calibrate", "checked_request", "recheck"]
