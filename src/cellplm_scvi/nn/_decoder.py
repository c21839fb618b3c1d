"""Batch-aware decoder: latent code and covariates to the mean and dispersion of every gene."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._dropout import Dropout
from ._growth import add_codes, with_rows
from ._nb import GeneOutput


class CovariateCodes(nn.Module):
    """Learned contribution of each category of one covariate (batch, platform, data set).

    A code outside the table (an unseen category, or -1 for an absent one) gets the mean of the learned contributions.
    """

    def __init__(self, n_categories: int, n_hidden: int):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(n_categories, n_hidden))

    @property
    def n_categories(self) -> int:
        """Number of categories."""
        return self.weight.shape[0]

    def mean(self) -> Tensor:
        """Mean contribution of the categories, (1, n_hidden)."""
        return self.weight.mean(0, keepdim=True)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (n_cells,), or shares of the categories (n_categories,), -> (n_cells, n_hidden) or (n_hidden,)."""
        if codes.is_floating_point():
            return codes @ self.weight
        known = (codes >= 0) & (codes < self.weight.shape[0])
        table = torch.cat([self.weight, self.mean()])
        return table.index_select(0, torch.where(known, codes, self.weight.shape[0]))


class BatchAwareDecoder(nn.Module):
    """Decodes z and covariates to a hidden state, and that to genes.

    Covariates enter before the non-linearity and once more right before the genes, where they can shift single genes.

    Parameters
    ----------
    n_latent, n_hidden, n_layers, n_genes
        Sizes; ``n_layers`` counts hidden layers.
    covariates
        Number of categories of each covariate.
    gene_shares
        Share of each gene in all counts, (n_genes,), where the output starts.
    rest
        Whether the library size also counts genes that are not modelled.
    """

    def __init__(
        self,
        n_latent: int,
        n_hidden: int,
        n_layers: int,
        n_genes: int,
        covariates: Mapping[str, int],
        dropout_rate: float = 0.0,
        gene_shares: Tensor | None = None,
        rest: bool = False,
    ):
        super().__init__()
        self.input = nn.Linear(n_latent, n_hidden)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(n_hidden), nn.GELU(), Dropout(dropout_rate), nn.Linear(n_hidden, n_hidden))
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(n_hidden)
        self.codes = nn.ModuleDict({name: CovariateCodes(n, n_hidden) for name, n in covariates.items()})
        self.output_codes = nn.ModuleDict({name: CovariateCodes(n, n_hidden) for name, n in covariates.items()})
        self.weight = nn.Parameter(torch.randn(n_genes, n_hidden) / n_hidden**0.5)
        shares = torch.full((n_genes,), 1.0 / n_genes) if gene_shares is None else gene_shares.float()
        if rest:  # whose logit is 0
            shares = shares / (1 - shares.sum()).clamp_min(0.01)
        self.bias = nn.Parameter(shares.clamp_min(1e-8).log())
        self.log_theta = nn.Parameter(torch.zeros(n_genes))
        self.rest = rest

    @torch.no_grad()
    def start_codes(self, covariate: str, fold_changes: Tensor) -> None:
        """Let the codes of a covariate start at what its categories change in the counts of genes.

        Then z does not have to explain them first and forget them later. The fold changes are factorised into codes and
        output weights, with as many of the hidden dimensions as there are categories, up to a quarter.

        Parameters
        ----------
        covariate
            Its name.
        fold_changes
            Log fold change of each gene in each category, (n_categories, n_genes).
        """
        u, s, v = torch.linalg.svd(fold_changes, full_matrices=False)
        rank = min(s.shape[0], self.weight.shape[1] // 4)
        codes = self.output_codes[covariate].get_parameter("weight")
        codes.zero_()
        # The scale of the existing output weights is kept, the rest goes to the codes.
        scale = self.weight.square().mean().sqrt() * v.shape[1] ** 0.5
        self.weight[:, :rank] = v[:rank].T * scale
        codes[:, :rank] = u[:, :rank] * s[:rank] / scale

    def add_categories(self, covariate: str, n_known: int, n_added: int) -> None:
        """Give a covariate of ``n_known`` categories ``n_added`` more."""
        for tables in (self.codes, self.output_codes):
            add_codes(tables, covariate, n_known, n_added, self.weight.shape[1])

    def tables(self, covariate: str) -> list[nn.Module]:
        """The tables of a covariate."""
        return [self.codes[covariate], self.output_codes[covariate]]

    def surface(self) -> list[nn.Parameter]:
        """What belongs to single categories and single genes."""
        return [*self.codes.parameters(), *self.output_codes.parameters(), self.weight, self.bias, self.log_theta]

    @torch.no_grad()
    def add_genes(self, bias: Tensor) -> None:
        """Add genes whose logit is ``bias``, (n_added,), whatever z is; their dispersion is that of the mean gene."""
        self.weight = with_rows(self.weight, self.weight.new_zeros(len(bias), self.weight.shape[1]))
        self.bias = with_rows(self.bias, bias)
        self.log_theta = with_rows(self.log_theta, self.log_theta.mean().expand(len(bias)))

    def output(self, measured: Tensor | None = None) -> GeneOutput:
        """The last layer, as the likelihood takes it; ``measured`` (n_panels, n_genes) are the genes of each panel."""
        return GeneOutput(self.weight, self.bias, self.log_theta, measured, self.rest)

    def forward(self, z: Tensor, covariates: Mapping[str, Tensor]) -> Tensor:
        """Hidden states before the last layer.

        Parameters
        ----------
        z
            (..., n_cells, n_latent).
        covariates
            Codes of each covariate, (n_cells,), or shares of its categories, (n_categories,), the same for all cells.

        Returns
        -------
        (..., n_cells, n_hidden)
        """
        h = self.input(z)
        for name, table in self.codes.items():
            h = h + table(covariates[name])
        first, *rest = self.layers
        h = first(h)
        for layer in rest:
            h = h + layer(h)
        h = torch.nn.functional.gelu(self.norm(h))
        for name, table in self.output_codes.items():
            h = h + table(covariates[name])
        return h
