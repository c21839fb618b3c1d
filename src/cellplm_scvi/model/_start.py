"""Where the decoder of trained weights starts on data that it was not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cellplm_scvi._compat import move_to_device
from cellplm_scvi.module import ExpressionDistribution
from cellplm_scvi.nn import AddedCodes

if TYPE_CHECKING:
    from cellplm_scvi.data._loader import CellLoader
    from cellplm_scvi.module import CellPLMModule
    from cellplm_scvi.nn import BatchAwareDecoder

    from ._cellplm import CellPLM

#: cells whose counts are compared with what the model expects of them
N_START_CELLS = 4096
#: variance of the log fold changes of genes that codes are not meant to explain
UNEXPLAINED = 0.1
#: standard deviation, before any counts, of a gene's log fold change
PRIOR_SD = 1.0


class _Totals(NamedTuple):
    """Sums of counts of each gene over the cells of each group, (n_groups, n_genes)."""

    observed: Tensor
    expected: Tensor

    @property
    def fold_changes(self) -> Tensor:
        """Logarithm of what is observed of what is expected."""
        return (self.observed + 1).log() - (self.expected + 1).log()

    @property
    def precision(self) -> Tensor:
        """Inverse variance of the fold changes, of Poisson counts and the unexplained part."""
        return self.expected / (1 + UNEXPLAINED * self.expected)

    def deviance(self) -> float:
        """Poisson deviance of the observed counts from the expected ones."""
        expected = self.expected.clamp_min(1e-8)
        return float(2 * (torch.xlogy(self.observed, self.observed / expected) - self.observed + expected).sum())


@torch.no_grad()
def start_decoders(model: CellPLM, rows: np.ndarray, *, biases: bool) -> None:
    r"""Let decoders start at the mean counts of new data, so that z does not have to explain them first and forget them later.

    With the log fold change :math:`d_j` of the observed from the expected counts of gene :math:`j` in some cells, and its
    precision :math:`p_j`, the bias of the gene moves by :math:`d_j p_j / (p_j + 1)`. Then, with the fold changes that
    remain in a category that was added and has not been trained, its code before the last layer, of weights :math:`w_j`,
    moves by the ridge regression :math:`\arg\min_{c, a} \sum_j p_j (d_j - w_j^\top c - a)^2 + \lambda |c|^2`, where
    :math:`\lambda` is the mean of :math:`|w_j|^2`.
    Where a step does not bring expected counts closer to the observed ones, it is taken back.

    Parameters
    ----------
    model
        A trained model, attached to the data.
    rows
        Cells that may be looked at.
    biases
        Whether biases may move; codes of categories that are not new never do.
    """
    if len(rows) > N_START_CELLS:
        rows = np.sort(np.random.default_rng(0).choice(rows, N_START_CELLS, replace=False))
    cells = model._make_data_loader(model.adata, rows)  # type: ignore[arg-type]
    for decoder in model.module.decoders:
        means = _Means(model.module, decoder, cells)
        if biases:
            _move_biases(decoder, means)
        for covariate, table in decoder.output_codes.items():
            if isinstance(table, AddedCodes) and torch.equal(table.weight, table.mean().expand_as(table.weight)):
                _move_codes(decoder, means, covariate, table)


def _move_biases(decoder: BatchAwareDecoder, means: _Means) -> None:
    before = means.totals()
    precision = before.precision[0]
    step = before.fold_changes[0] * precision / (precision + PRIOR_SD**-2)
    decoder.bias.add_(step)
    if not means.totals().deviance() < before.deviance():
        decoder.bias.sub_(step)


def _move_codes(decoder: BatchAwareDecoder, means: _Means, covariate: str, table: AddedCodes) -> None:
    start = table.weight.clone()
    before = means.totals(covariate, table.n_categories)
    # in float64, which not every device has; a column for what is common to all genes
    weight = torch.nn.functional.pad(decoder.weight.cpu().double(), (0, 1), value=1.0)
    ridge = torch.full((weight.shape[1],), float(decoder.weight.square().sum(1).mean()) / PRIOR_SD**2).double()
    ridge[-1] = 1e-6
    added = slice(table.n_known, None)
    for row, precision, fold_changes in zip(
        table.weight, before.precision[added].cpu().double(), before.fold_changes[added].cpu().double(), strict=True
    ):
        weighted = weight * precision[:, None]
        solution = torch.linalg.solve(weighted.T @ weight + ridge.diag(), weighted.T @ fold_changes)
        row += solution[:-1].to(row)
    if not means.totals(covariate, table.n_categories).deviance() < before.deviance():
        table.weight.copy_(start)


class _Means:
    """Compares the counts of some cells with what a decoder says at the means of q(z|h)."""

    def __init__(self, module: CellPLMModule, decoder: BatchAwareDecoder, cells: CellLoader):
        self.module = module
        self.decoder = decoder
        self.cells = cells

    def totals(self, covariate: str | None = None, n_categories: int = 1) -> _Totals:
        """Of all cells, or by the categories of a covariate."""
        module, decoder = self.module, self.decoder
        observed, expected = torch.zeros(2, n_categories, module.n_genes, device=module.device)
        for tensors in self.cells:
            tensors = move_to_device(tensors, module.device)
            # the loader brings the means of q(z|h)
            encoded = {"z": tensors["qz_mean"], "library": tensors["library"]}
            inputs = module._get_generative_input(tensors, encoded)  # type: ignore[arg-type]
            hidden, output = decoder(inputs["z"], inputs["covariates"]), decoder.output(inputs["measured"])
            px = ExpressionDistribution(hidden, output, inputs["library"], inputs["panel"])
            code = inputs["covariates"][covariate] if covariate else torch.zeros_like(px.library, dtype=torch.long)
            known = (code >= 0) & (code < n_categories)
            observed.index_add_(0, code[known], module.counts(tensors).to_dense()[known])
            expected.index_add_(0, code[known], px.mean[known])
        return _Totals(observed, expected)
