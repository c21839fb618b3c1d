"""Where in the latent space the cells of samples lie, and how likely a cell is among those of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scvi import settings
from scvi.model.base import VAEMixin
from scvi.utils import track
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal, StudentT

from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._checks import check_column, check_no_missing, check_sizes, some, warn

if TYPE_CHECKING:
    from cellplm_scvi.data._table import CellTable
    from cellplm_scvi.module import CellPLMModule


class AbundanceMixin(VAEMixin):
    """Compares samples by where their cells lie."""

    module: CellPLMModule

    def get_aggregated_posterior(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> MixtureSameFamily:
        """Aggregated posterior of cells: the mixture of their q(z|h), each with the same weight.

        Means are those of :meth:`~cellplm_scvi.CellPLM.get_latent_representation`, with the batches aligned.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`~cellplm_scvi.CellPLM.get_latent_representation`.
        dof
            Degrees of freedom of Student's t-distributions in place of normal ones; ``None`` is the latter.

        Returns
        -------
        Distribution of z, (n_latent,).

        Raises
        ------
        ValueError
            If ``indices`` asks for no cell, or the model's latent space is deterministic.
        """
        mean, variance = self.get_latent_representation(adata, indices, batch_size=batch_size, return_dist=True)
        if len(mean) == 0:
            raise ValueError("indices asks for no cell.")
        return self._mixture(mean, variance, dof)

    @torch.inference_mode()
    def differential_abundance(
        self,
        adata: AnnOrMuData | None = None,
        adata_sub: AnnOrMuData | None = None,
        sample_key: str | None = None,
        batch_size: int = 128,
        num_cells_posterior: int | None = None,
        dof: float | None = None,
    ) -> None:
        """Log probability of each cell's embedding among the cells of each sample (Boyeau et al. 2025), as in scvi-tools.

        Parameters
        ----------
        adata
            AnnData whose cells make up the samples (of a corpus, its ``to_anndata()``); ``None`` is the one that the model was
            built with.
        adata_sub
            AnnData with the cells to tell of; ``None`` is ``adata``. Where they all are cells of ``adata``, by name and number
            of counts, they are embedded in its company. Otherwise the rest of their samples cannot be known: they have each
            other alone for company, and a warning says so.
        sample_key
            Column of ``obs`` that tells the samples, or other groups of cells, to compare: those that ``adata_sub`` has.
        batch_size
            Cells that are compared with a sample at once.
        num_cells_posterior
            Most cells of a sample that stand for it, drawn at random by ``scvi.settings.seed``; ``None`` is all.
        dof
            As in :meth:`get_aggregated_posterior`.

        Returns
        -------
        Nothing: ``adata_sub.obsm["da_log_probs"]`` becomes a DataFrame, (n_cells, n_samples), rows named by ``obs_names``.

        Raises
        ------
        KeyError
            If there is no such column.
        ValueError
            If ``sample_key`` is not given, values of the column are missing, a sample has no cell in ``adata``, or the model's
            latent space is deterministic.
        """
        check_sizes(
            batch_size=batch_size,
            **({} if num_cells_posterior is None else {"num_cells_posterior": num_cells_posterior}),
        )
        adata = self._validate_anndata(adata)
        part = adata if adata_sub is None else self._validate_anndata(adata_sub)
        samples, asked = _samples(adata, sample_key), list(_samples(part, sample_key).unique())
        if absent := [name for name in asked if not (samples == name).any()]:
            raise ValueError(
                f'{len(absent)} of the samples in adata_sub.obs["{sample_key}"] ha{"ve" if len(absent) > 1 else "s"} no cell '
                f"in adata ({some(absent)}). Pass the cells of all samples as `adata`."
            )
        rows = np.arange(adata.n_obs) if part is adata else _rows_within(self._table(part), self._table(adata))
        mean, variance = self.get_latent_representation(adata, return_dist=True)
        z = torch.from_numpy(self.get_latent_representation(part) if rows is None else mean[rows])
        log_probs = {}
        for name in track(asked, description="DA..."):
            members = np.flatnonzero(samples == name)
            if num_cells_posterior is not None and num_cells_posterior < members.size:
                # begun anew for each, so that those of a sample do not depend on which samples are asked for
                rng = np.random.default_rng(settings.seed or 0)
                members = rng.choice(members, num_cells_posterior, replace=False)
            posterior = self._mixture(mean[members], variance[members], dof)
            found = [posterior.log_prob(cells.to(self.module.device)).cpu() for cells in z.split(batch_size)]
            log_probs[name] = torch.cat(found).numpy()
        part.obsm["da_log_probs"] = pd.DataFrame(log_probs, index=part.obs_names)

    def _mixture(self, mean: np.ndarray, variance: np.ndarray, dof: float | None) -> MixtureSameFamily:
        """Mixture of distributions with these moments, each (n_cells, n_latent)."""
        if not self.module.latent.stochastic:
            raise ValueError(
                'With latent="deterministic", the embedding of a cell is a point, which has no density. Build a model with '
                'latent="mixture" or latent="gaussian".'
            )
        location, scale = (torch.from_numpy(x).to(self.module.device) for x in (mean, np.sqrt(variance)))
        cells = Normal(location, scale) if dof is None else StudentT(dof, location, scale)
        return MixtureSameFamily(Categorical(torch.ones_like(location[:, 0])), Independent(cells, 1))


def _samples(adata: AnnOrMuData, key: str | None) -> pd.Series:
    """The sample of each cell."""
    if key is None:
        raise ValueError(
            f"Name the column of adata.obs that tells the samples, `sample_key=`: one of {some(list(adata.obs), 12)}."
        )
    column = check_column(adata, key, "sample_key")
    check_no_missing(column, key, before="differential_abundance")
    return column


def _rows_within(part: CellTable, whole: CellTable) -> np.ndarray | None:
    """Row in the whole of each cell of a part, (n_cells of the part,); ``None``, with a warning, if one is not there."""
    known = pd.Series(np.arange(whole.n_cells), index=whole.names)
    rows = known[~known.index.duplicated(keep=False)].reindex(part.names, fill_value=-1).to_numpy()
    # names alone may be those of other cells, such as "0", "1", ...
    found = (rows >= 0) & (whole.totals[rows] == part.totals)
    if found.all():
        return rows
    warn(
        f"{int((~found).sum()):,} of the {part.n_cells:,} cells of adata_sub are not in adata, by name and number of counts "
        f"(cells {some(part.names[~found])}). Those of adata_sub are embedded with each other alone for company: where they "
        "are a part of their samples, pass all cells of these as `adata`."
    )
    return None
