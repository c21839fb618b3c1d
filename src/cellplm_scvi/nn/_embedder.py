"""Gene-expression embedder: a bag of genes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ._dropout import Dropout
from ._growth import with_rows
from ._sparse import SparseCounts

Mark = Callable[[SparseCounts, Tensor], Tensor]


class GeneEmbedder(nn.Module):
    r"""Sum of gene embeddings weighted by expression, :math:`e_i = \sum_j f(x_{ij}) E_j`.

    Parameters
    ----------
    n_genes
        Size of the gene vocabulary G.
    n_hidden
        Width d of the embedding.
    target_sum
        Library size to which counts are normalised before ``log1p``; ``None`` leaves them raw.
    dropout_rate
        Dropout after the projection.
    """

    target_sum: Tensor

    def __init__(self, n_genes: int, n_hidden: int, target_sum: float | None, dropout_rate: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_genes, n_hidden) / n_hidden**0.5)
        self.project = nn.Sequential(
            nn.LayerNorm(n_hidden), nn.Linear(n_hidden, n_hidden), nn.GELU(), Dropout(dropout_rate)
        )
        self.normalises = target_sum is not None
        self.register_buffer("target_sum", torch.tensor(1.0 if target_sum is None else float(target_sum)))

    def add_genes(self, n_genes: int) -> None:
        """Add genes that say nothing at first: their embeddings start at zero, and their gradient is not."""
        self.weight = with_rows(self.weight, self.weight.new_zeros(n_genes, self.weight.shape[1]))

    def expression(self, counts: SparseCounts, library: Tensor) -> SparseCounts:
        """Feature f(x): log1p of (library-size-normalised) counts, at the non-zero entries.

        Parameters
        ----------
        counts
            Counts, (n_cells, n_genes).
        library
            Library size of each cell, (n_cells,), in counts.
        """
        values = counts.values
        if self.normalises:
            scale = self.target_sum / library.clamp_min(1e-8)
            values = values * scale.index_select(0, counts.rows)
        return counts.with_values(torch.log1p(values))

    def forward(self, counts: SparseCounts, library: Tensor, mark: Mark | None = None) -> Tensor:
        """Embed cells: counts (n_cells, n_genes), library (n_cells,) -> (n_cells, n_hidden).

        ``mark`` gives what to add to the bag of each cell, (n_cells, n_hidden), from its expression and the embeddings.
        """
        expression = self.expression(counts, library)
        bag = expression.matmul(self.weight)
        if mark is not None:
            bag = bag + mark(expression, self.weight)
        return self.project(bag)
