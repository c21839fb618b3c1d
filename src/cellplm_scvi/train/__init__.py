"""Training: plan and callbacks."""

from ._callbacks import PlaceMixtureComponents
from ._plan import CellPLMTrainingPlan

__all__ = ["CellPLMTrainingPlan", "PlaceMixtureComponents"]
