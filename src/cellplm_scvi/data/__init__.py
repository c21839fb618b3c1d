"""From AnnData to minibatches of whole samples."""

from ._datasets import pbmc

__all__ = ["pbmc"]
