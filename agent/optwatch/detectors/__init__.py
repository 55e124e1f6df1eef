"""Detectors: numbers in, events out. They know no torch and no Prometheus."""

from __future__ import annotations

from .divergence import Divergence, DivergenceDetector
from .drift import Drift, DriftDetector
from .nonfinite import NonFiniteDetector
from .plateau import Plateau, PlateauDetector
from .recorded import replay
from .schedule import ScheduleDetector
from .spike import Spike, SpikeDetector
from .stall import Stall, StallDetector
from .suite import Detectors
from .surprise import Surprise
from .validation import Regression, ValidationDetector

__all__ = [
    "Detectors",
    "Divergence",
    "DivergenceDetector",
    "Drift",
    "DriftDetector",
    "NonFiniteDetector",
    "Plateau",
    "PlateauDetector",
    "Regression",
    "ScheduleDetector",
    "Spike",
    "SpikeDetector",
    "Stall",
    "StallDetector",
    "Surprise",
    "ValidationDetector",
    "replay",
]
