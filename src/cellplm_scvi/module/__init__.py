"""The scvi-tools modules."""

from ._module import CellPLMModule
from ._published import PublishedModule

__all__ = ["CellPLMModule", "PublishedModule"]
