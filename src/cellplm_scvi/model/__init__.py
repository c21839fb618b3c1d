"""Models that users import."""

from ._cellplm import CellPLM

__all__ = ["CellPLM"]
