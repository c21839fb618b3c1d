"""Regression of the genes that a panel lacks on those that it shares with a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cellplm_scvi.data._contexts import content_order
from cellplm_scvi.data._table import CellTable

#: most cells of a reference, genes of a panel, and cells that a mean is taken over
MAX_REFERENCE, MAX_SHARED, MAX_CELLS = 20_000, 2_000, 2_000
#: fewest cells of a reference and genes that it shares
MIN_REFERENCE, MIN_SHARED = 20, 5
#: least share of what was decoded that is left
FLOOR = 0.1
#: L2 penalty relative to the number of cells, for standardised genes
PENALTY = 1.0
#: most principal components of each side, and least cosine of a pair of principal vectors
MAX_COMPONENTS, MIN_COSINE = 50, 0.5


@dataclass(frozen=True)
class PanelRegression:
    """Ridge regression of log expression, from a reference to the cells of a panel.

    Genes are standardised in the reference and in the data set that is imputed, each by itself, so that the two need not agree
    in means and scales. What is predicted is the deviation from the data set's mean. Only directions along which the cells
    of both vary are used, see :func:`_common_directions`: where assays differ, genes vary together in one that do not in the other.

    Parameters
    ----------
    panel
        Panel of the cells that are imputed.
    shared, genes
        Columns of the predictors, (n_shared,), and of what is predicted, (n_predicted,).
    coefficient
        (n_shared, n_predicted).
    mean, scale
        Of the predictors in the data set that is imputed, each (n_shared,).
    depth
        Total of the shared genes that counts are scaled to.
    centre
        Mean of decoded log expression in the data set that is imputed, (n_predicted,).
    """

    panel: int
    shared: np.ndarray
    genes: np.ndarray
    coefficient: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    depth: float
    centre: Tensor = field(default_factory=lambda: torch.zeros(()))

    def deviation(self, counts: sp.csr_matrix) -> np.ndarray:
        """Predicted deviation of each cell from the mean, (n_cells, n_predicted), from counts, (n_cells, n_genes)."""
        x = _log_normalised(counts, self.shared, self.depth)[0].toarray()
        return ((x - self.mean) / self.scale) @ self.coefficient

    def decoded(self, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Log expression of the genes, (n_cells, n_predicted), and sum of the shared ones, (n_cells, 1), of decoded shares."""
        total = shares[:, self.shared].sum(1, keepdim=True)
        return (shares[:, self.genes] / total * self.depth).log1p(), total

    def blended(self, shares: Tensor, deviation: Tensor, weight: float) -> Tensor:
        """Shares whose logs are between what was decoded and what is predicted here, (n_cells, n_predicted)."""
        decoded, total = self.decoded(shares)
        log = (1 - weight) * decoded + weight * (self.centre + deviation)
        # a regression does not know that expression is positive
        expression = torch.maximum(log.expm1(), FLOOR * decoded.expm1())
        return expression / self.depth * total


def fit_panel_regressions(table: CellTable, model_table: CellTable, columns: np.ndarray) -> list[PanelRegression]:
    """Fit one for each panel of the cells to impute and each data set of the model that measured genes beyond it.

    Parameters
    ----------
    table
        Cells to impute.
    model_table
        Cells of the model's AnnData.
    columns
        Genes asked for.
    """
    found: list[PanelRegression] = []
    if table.measured is None or table.panel is None or model_table.measured is None or model_table.panel is None:
        return found
    asked = np.zeros(table.measured.shape[1], dtype=bool)
    asked[columns] = True
    for panel in np.unique(table.panel):
        own = table.measured[panel]
        own_rows = _some(table, panel, MAX_REFERENCE)
        for reference, measured in enumerate(model_table.measured):
            shared, genes = np.flatnonzero(own & measured), np.flatnonzero(asked & ~own & measured)
            rows = _some(model_table, reference, MAX_REFERENCE)
            if shared.size < MIN_SHARED or genes.size == 0 or rows.size < MIN_REFERENCE:
                continue
            fit = _fit(model_table.counts[rows], table.counts[own_rows], shared, genes, int(panel))
            if fit is not None:
                found.append(fit)
    return found


def _fit(
    reference: sp.csr_matrix, own: sp.csr_matrix, shared: np.ndarray, genes: np.ndarray, panel: int
) -> PanelRegression | None:
    totals = own[:, shared].sum(1, dtype=np.float64).A1
    if not (totals > 0).any():
        return None
    depth = float(np.median(totals[totals > 0]))
    reference = reference[reference[:, shared].sum(1).A1 > 0]
    n = reference.shape[0]
    if n < MIN_REFERENCE:
        return None
    x, scale_of_cell = _log_normalised(reference, shared, depth)
    if shared.size > MAX_SHARED:
        keep = np.sort(np.argsort(-_moments(x)[1], kind="stable")[:MAX_SHARED])
        shared, x = shared[keep], x[:, keep]
    own_x = _log_normalised(own[totals > 0], shared, depth)[0]
    y = (sp.diags(scale_of_cell) @ reference[:, genes]).log1p().tocsr()
    (mean, deviation), y_mean = _moments(x), _moments(y)[0]
    gram = _gram(x)
    cross = ((x.T @ y).toarray() - n * np.outer(mean, y_mean)) / deviation[:, None]
    directions = _common_directions(gram, _gram(own_x), min(n, own_x.shape[0]))
    if directions.shape[1] == 0:
        return None
    penalty = PENALTY * n * np.eye(directions.shape[1])
    coefficient = directions @ np.linalg.solve(directions.T @ gram @ directions + penalty, directions.T @ cross)
    return PanelRegression(panel, shared, genes, coefficient, *_moments(own_x), depth)


def _gram(x: sp.csr_matrix) -> np.ndarray:
    """Products of the standardised columns, (n_columns, n_columns), without a dense matrix of cells x columns."""
    mean, deviation = _moments(x)
    return ((x.T @ x).toarray() - x.shape[0] * np.outer(mean, mean)) / np.outer(deviation, deviation)


def _common_directions(gram: np.ndarray, own_gram: np.ndarray, n_cells: int) -> np.ndarray:
    """Principal vectors of the reference that the cells to impute share, (n_shared, n_directions), orthonormal.

    The principal components of both data sets are rotated to pairs of vectors, each the closest that is left (principal
    vectors; Mourragui et al. 2019, Abdelaal et al. 2020). Those of the reference are taken whose partner is near.
    """
    n = min(MAX_COMPONENTS, gram.shape[0] // 2, n_cells - 1)
    components, own_components = (np.linalg.eigh(products)[1][:, ::-1][:, :n] for products in (gram, own_gram))
    rotation, cosine, _ = np.linalg.svd(components.T @ own_components)
    return components @ rotation[:, cosine > MIN_COSINE]


def centred(
    regressions: list[PanelRegression], table: CellTable, decode: Callable[[np.ndarray], list[Tensor]]
) -> list[PanelRegression]:
    """With the means of what ``decode`` gives for rows, shares of all genes in parts."""
    done = []
    for panel in sorted({regression.panel for regression in regressions}):
        of_panel = [regression for regression in regressions if regression.panel == panel]
        rows = _some(table, panel, MAX_CELLS)
        sums: list[Tensor | float] = [0.0] * len(of_panel)
        for shares in decode(rows):
            sums = [s + r.decoded(shares)[0].sum(0) for s, r in zip(sums, of_panel, strict=True)]
        done += [replace(r, centre=torch.as_tensor(s) / rows.size) for s, r in zip(sums, of_panel, strict=True)]
    return done


def blend(
    shares: Tensor, counts: sp.csr_matrix, panel: np.ndarray, regressions: list[PanelRegression], weight: float
) -> Tensor:
    """Decoded shares with those of genes that panels lack blended; means where several references have a gene."""
    result, n = shares.clone(), torch.zeros_like(shares)
    for regression in regressions:
        rows = np.flatnonzero(panel == regression.panel)
        if rows.size == 0:
            continue
        deviation = torch.as_tensor(regression.deviation(counts[rows]), dtype=shares.dtype, device=shares.device)
        at = torch.from_numpy(rows)[:, None], torch.from_numpy(regression.genes)[None]
        value = regression.blended(shares[rows], deviation, weight)
        result[at] = torch.where(n[at] > 0, result[at] + value, value)
        n[at] += 1
    return result / n.clamp_min(1)


def _some(table: CellTable, panel: int, at_most: int) -> np.ndarray:
    """Cells of a panel; a part that is as good as random, whatever the order of rows, if there are too many."""
    rows = np.flatnonzero(table.panel == panel)
    return rows if rows.size <= at_most else rows[content_order(table, rows)[:at_most]]


def _log_normalised(counts: sp.csr_matrix, columns: np.ndarray, depth: float) -> tuple[sp.csr_matrix, np.ndarray]:
    """log1p of counts of these genes, scaled to a total, (n_cells, n_columns), and the scale of each cell."""
    part = counts[:, columns]
    scale = depth / np.maximum(part.sum(1, dtype=np.float64).A1, 1e-8)
    return (sp.diags(scale) @ part).log1p().tocsr(), scale


def _moments(x: sp.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; that of a constant one counts as 1."""
    mean = np.asarray(x.mean(0), dtype=np.float64).ravel()
    variance = np.asarray(x.multiply(x).mean(0)).ravel() - mean**2
    deviation = np.sqrt(np.maximum(variance, 0.0))
    return mean, np.where(deviation > 1e-6, deviation, 1.0)
