"""Masked-gene training: which genes of which cells the encoder does not get to see."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._sparse import SparseCounts


@dataclass(frozen=True)
class GeneMasking:
    r"""Hides a random share of the genes of a random share of the cells.

    The rate of a masked cell is drawn from :math:`\mathrm{Beta}(a, b)`, at most ``max_rate`` (Wen et al. 2024,
    appendix). Hiding a gene that has no count changes nothing, so only non-zero entries are drawn.

    Parameters
    ----------
    cell_rate
        Share of the cells that are masked.
    alpha, beta
        Parameters of the Beta distribution of a cell's rate; 5 and 13 have mean 0.28.
    max_rate
        Upper bound of a cell's rate.
    """

    cell_rate: float = 0.75
    alpha: float = 5.0
    beta: float = 13.0
    max_rate: float = 0.9

    def rates(self, n_cells: int, device: torch.device) -> Tensor:
        """Rate of each cell, (n_cells,), zero for those that are not masked."""
        # A Beta variate from two Gamma variates: torch's own Beta sampler validates its arguments at every call.
        a = torch._standard_gamma(torch.full((n_cells,), self.alpha, device=device))
        b = torch._standard_gamma(torch.full((n_cells,), self.beta, device=device))
        rate = (a / (a + b)).clamp_max(self.max_rate)
        return rate * (torch.rand(n_cells, device=device) < self.cell_rate)

    def __call__(self, counts: SparseCounts) -> SparseCounts:
        """Counts with the masked entries set to zero."""
        rates = self.rates(counts.n_cells, counts.values.device)
        keep = torch.rand_like(counts.values) >= rates.index_select(0, counts.rows)
        return counts.with_values(counts.values * keep)


@dataclass(frozen=True)
class PanelMasking:
    """Shows some cells to the encoder as another data set would have measured them.

    So cells of a reference learn to be embedded, and all their genes to be predicted, from the genes of a panel alone,
    which is what imputation asks for.

    Parameters
    ----------
    cell_rate
        Share of the cells that are shown through a panel drawn at random.
    """

    cell_rate: float = 0.5

    def __call__(self, counts: SparseCounts, library: Tensor, panels: Tensor) -> tuple[SparseCounts, Tensor]:
        """Hide what the panels lack, and take it from the library.

        Parameters
        ----------
        counts
            Counts, (n_cells, n_genes).
        library
            Library size, (n_cells,).
        panels
            Genes of each panel, (n_panels, n_genes), boolean.
        """
        n_cells = counts.n_cells
        panel = torch.randint(panels.shape[0], (n_cells,), device=library.device)
        shown = torch.rand(n_cells, device=library.device) >= self.cell_rate
        keep = shown[counts.rows] | panels[panel[counts.rows], counts.genes]
        # a cell that would be left with nothing is shown as it is
        some = torch.zeros(n_cells, device=library.device).index_add_(0, counts.rows, keep.float()) > 0
        keep = keep | ~some[counts.rows]
        hidden = library.new_zeros(n_cells).index_add_(0, counts.rows, counts.values * ~keep)
        return counts.with_values(counts.values * keep), library - hidden
