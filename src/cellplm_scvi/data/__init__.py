"""From AnnData to minibatches of whole samples."""

from ._datasets import pbmc
from ._synthetic import synthetic_tissues, true_shares

__all__ = ["pbmc", "synthetic_tissues", "true_shares"]
