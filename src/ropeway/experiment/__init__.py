"""Which of two is better: sticky splits, sums for each arm, and intervals that hold however often one looks."""

from ropeway.experiment.analysis import Analysis, Errors, Measure
from ropeway.experiment.arms import Arm, Sample, Sums, Trial
from ropeway.experiment.compare import Guard, alpha_of, analyze, verdict
from ropeway.experiment.split import pick

__all__ = [
    "Analysis",
    "Arm",
    "Errors",
    "Guard",
    "Measure",
    "Sample",
    "Sums",
    "Trial",
    "alpha_of",
    "analyze",
    "pick",
    "verdict",
]
