"""CellPLM as a scvi-tools model: a transformer whose tokens are cells and whose sentences are tissue samples."""

from importlib.metadata import version

from . import data, genes
from .model import CellPLM

__version__ = version("cellplm-scvi")
__all__ = ["CellPLM", "data", "genes"]
