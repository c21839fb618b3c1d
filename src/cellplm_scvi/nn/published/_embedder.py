"""The published gene-expression embedder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cellplm_scvi.nn._dropout import Dropout
from cellplm_scvi.nn._growth import with_rows
from cellplm_scvi.nn._sparse import SparseCounts

from ._config import PublishedConfig, published_norm


class PublishedEmbedder(nn.Module):
    r"""Bag of genes of log1p raw counts, then Linear, ReLU, dropout, norm: :math:`e_i = g(\sum_j \log(1 + x_{ij}) E_j)`."""

    def __init__(self, config: PublishedConfig):
        super().__init__()
        self.weight = nn.Parameter(0.005 * torch.randn(config.n_genes, config.n_hidden))
        self.linear = nn.Linear(config.n_hidden, config.n_hidden)
        self.dropout = Dropout(config.dropout_rate)
        self.norm = published_norm(config.norm, config.n_hidden)

    def add_genes(self, n_genes: int) -> None:
        """Add genes that say nothing at first: their embeddings start at zero, and their gradient is not."""
        self.weight = with_rows(self.weight, self.weight.new_zeros(n_genes, self.weight.shape[1]))

    def bag(self, counts: SparseCounts) -> Tensor:
        """Sum of gene embeddings weighted by expression: counts (n_cells, n_genes) -> (n_cells, n_hidden)."""
        return counts.with_values(torch.log1p(counts.values)).matmul(self.weight)

    def project(self, bag: Tensor) -> Tensor:
        """(n_cells, n_hidden) -> (n_cells, n_hidden)."""
        return self.norm(self.dropout(torch.relu(self.linear(bag))))

    def forward(self, counts: SparseCounts, library: Tensor | None = None) -> Tensor:
        """Embed cells; ``library`` is not used: depth stays in the input."""
        return self.project(self.bag(counts))
