"""Training: plan and callbacks."""

from ._callbacks import PlaceMixtureComponents
from ._checkpoints import SaveTrainingState, StepLog
from ._freeze import Freeze, frozen
from ._plan import CellPLMTrainingPlan

__all__ = ["CellPLMTrainingPlan", "Freeze", "PlaceMixtureComponents", "SaveTrainingState", "StepLog", "frozen"]
