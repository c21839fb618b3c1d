"""From AnnData to minibatches of whole samples."""

from ._datasets import pbmc
from ._panels import concat_panels
from ._synthetic import synthetic_tissues, true_shares

__all__ = ["concat_panels", "pbmc", "synthetic_tissues", "true_shares"]
