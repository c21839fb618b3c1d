"""Expression of a cell given the model and the cell's own counts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._checks import check_library_size
from cellplm_scvi.model._embedding import fixed_draws
from cellplm_scvi.nn import nb_expected_log1p

if TYPE_CHECKING:
    from cellplm_scvi.module import CellPLMModule


class DenoisingMixin:
    """Combines what the decoder expects of a cell with what was counted in it."""

    module: CellPLMModule

    @torch.inference_mode()
    def get_denoised_expression(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        log1p: bool = False,
        depth: float | None = None,
        batch_size: int | None = None,
        return_numpy: bool = False,
    ) -> np.ndarray | pd.DataFrame:
        r"""Expression of each gene, expected from the cell's state and its own count of that gene.

        A negative binomial is a Poisson whose rate is Gamma distributed among cells of the same state. Given the count
        :math:`x`, that rate is again Gamma distributed, with shape :math:`x + \theta` and mean

        .. math::
            \hat\lambda = \frac{x + \theta}{1 + \theta / \mu},

        which lies between what the decoder expects, :math:`\mu`, and what was counted: nearer to the former the less the
        gene varies among such cells (:math:`\theta` large) and the fewer molecules tell (:math:`\mu` small).
        :meth:`get_normalized_expression` returns :math:`\mu` alone, which is what is wanted across batches.

        With ``log1p``, the result is the expected logarithm instead of the logarithm of what is expected, which is larger:

        .. math::
            E\left[\log\left(1 + \tfrac{s}{d} X\right)\right], \qquad X \sim \mathrm{NB}(\hat\lambda d / L, x + \theta),

        for new counts :math:`X` of the same cell at a depth of :math:`d` molecules, normalised to :math:`s`. It is the best
        prediction, by squared error, of log-normalised counts at that depth.

        Parameters
        ----------
        adata, indices, gene_list, batch_size, return_numpy
            As in :meth:`get_normalized_expression`.
        library_size
            Counts that the expression of a cell adds up to, about, over the genes it measured (:math:`s`); ``"latent"`` is
            its own library.
        log1p
            Return the expectation of log1p of normalised counts.
        depth
            Molecules of the new counts (:math:`d`), with ``log1p``; ``None`` is the cell's own library (:math:`L`).

        Returns
        -------
        (n_cells, n_genes), genes in the order of ``adata.var_names``. NaN where a cell's data set did not measure a gene.

        Raises
        ------
        ValueError
            If ``gene_list`` names something unknown, or ``depth`` is given without ``log1p`` or is not positive.
        """
        if depth is not None and not (log1p and isinstance(depth, Real) and 0 < depth < np.inf):
            raise ValueError(
                f"depth={depth!r}: it is a positive number of molecules, and only `log1p=True` asks for it."
            )
        check_library_size(library_size)
        self._check_if_trained(warn=False)  # type: ignore[attr-defined]
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        genes, names = self._genes(manager, gene_list)  # type: ignore[attr-defined]
        rows = self._rows(adata.obs_names, indices)  # type: ignore[attr-defined]
        parts = [np.zeros((0, len(names)), np.float32)]
        with fixed_draws():
            for tensors in self._make_data_loader(adata, rows, batch_size):  # type: ignore[attr-defined]
                shares = self._decoded(tensors, None, None, 1)[:, genes]  # type: ignore[attr-defined]
                counts = self.module.counts(tensors).to_dense()[:, genes].to(shares.device)
                theta = self.module.decoder.output().log_theta.exp()[genes]
                library = tensors["library"].to(shares.device)[:, None]
                scale = library if library_size == "latent" else torch.full_like(library, library_size)
                values = _denoised(counts, shares, theta, library, scale, log1p=log1p, depth=depth)
                parts.append(values.cpu().numpy())
        expression = np.concatenate(parts)
        return expression if return_numpy else pd.DataFrame(expression, index=adata.obs_names[rows], columns=names)


def _denoised(
    counts: Tensor, shares: Tensor, theta: Tensor, library: Tensor, scale: Tensor, *, log1p: bool, depth: float | None
) -> Tensor:
    """Rate given counts and shares, (n_cells, n_genes), for libraries (n_cells, 1), scaled; or its expected log1p."""
    library = library.clamp_min(1e-8)  # without any count, what the state says is left
    shape = counts + theta
    rate = shape / (1 + theta / (shares * library))
    if not log1p:
        return rate * (scale / library)
    new = library if depth is None else torch.full_like(library, depth)
    return nb_expected_log1p(rate * (new / library), shape, scale / new)
