"""The decoder's distribution of counts, computed when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from scvi.distributions import NegativeBinomial
from torch import Tensor

from cellplm_scvi.nn import GeneOutput


@dataclass(frozen=True)
class ExpressionDistribution:
    """Negative binomial of every gene of every cell.

    Parameters
    ----------
    hidden
        Decoder state before the last layer, (..., n_cells, n_hidden).
    output
        Last layer.
    library
        Library size, (n_cells,), in counts.
    panel
        Row of ``output.measured`` of each cell, (n_cells,), or ``None``.
    """

    hidden: Tensor
    output: GeneOutput
    library: Tensor
    panel: Tensor | None = None

    @cached_property
    def scale(self) -> Tensor:
        """Expected share of each gene in the library, (..., n_cells, n_genes)."""
        return self.output.log_shares(self.hidden, self.panel).exp()

    @property
    def mu(self) -> Tensor:
        """Expected counts, (..., n_cells, n_genes)."""
        return self.scale * self.library[:, None]

    mean = mu

    @property
    def theta(self) -> Tensor:
        """Inverse dispersion, (..., n_cells, n_genes)."""
        return self.output.log_theta.exp().expand_as(self.scale)

    def get_normalized(self, key: Literal["mu", "scale"]) -> Tensor:
        """Expected counts or shares, as scvi-tools' mixins ask for them."""
        return self.mu if key == "mu" else self.scale

    def distribution(self) -> NegativeBinomial:
        """As a torch distribution."""
        return NegativeBinomial(mu=self.mu.clamp_min(1e-12), theta=self.theta, scale=self.scale)

    def sample(self) -> Tensor:
        """Draw counts, (..., n_cells, n_genes)."""
        gamma = torch.distributions.Gamma(self.theta, self.theta / self.mu.clamp_min(1e-12)).sample()
        return torch.poisson(gamma.clamp_max(1e8))
