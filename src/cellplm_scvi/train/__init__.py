"""Training: plan and callbacks."""

from ._callbacks import PlaceMixtureComponents, TakeAlignmentAway
from ._checkpoints import SaveTrainingState, StepLog
from ._freeze import Freeze, frozen
from ._plan import CellPLMTrainingPlan
from ._sharding import ShardedStrategy, strategy_of, whole_afterwards

__all__ = [
    "CellPLMTrainingPlan",
    "Freeze",
    "PlaceMixtureComponents",
    "SaveTrainingState",
    "ShardedStrategy",
    "StepLog",
    "TakeAlignmentAway",
    "frozen",
    "strategy_of",
    "whole_afterwards",
]
