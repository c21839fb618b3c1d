"""The scvi-tools modules."""

from ._annotator import AnnotatorModule
from ._expression import ExpressionDistribution
from ._module import CellPLMModule
from ._published import PublishedModule

__all__ = ["AnnotatorModule", "CellPLMModule", "ExpressionDistribution", "PublishedModule"]
