"""Embedding of cells, whole samples at a time, and the loaders of everything that builds on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import settings

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._checks import check_sizes, counted, some, warn
from cellplm_scvi.data._loader import CellDataset, CellLoader, RowSampler, SpatialInputs, whole_sample_loader
from cellplm_scvi.data._streaming import InferenceLoader
from cellplm_scvi.data._table import CellTable
from cellplm_scvi.nn import MixtureLatent
from cellplm_scvi.nn.published import PublishedMixture

from ._defaults import default_inference_batch_size, default_row_batch_size

if TYPE_CHECKING:
    from cellplm_scvi._typing import Minibatch
    from cellplm_scvi.module import CellPLMModule

Moments = tuple[np.ndarray, np.ndarray]
#: cells that are aligned at once
ALIGNED_AT_ONCE = 65_536
#: precision of the encoder at inference, in Lightning's words
Precision = Literal["32-true", "bf16-mixed"]


_draws_are_fixed: ContextVar[bool] = ContextVar("draws_are_fixed", default=False)


def _is_positional(index: pd.Index, names: pd.Index | np.ndarray) -> bool:
    """Whether what has this index may be read by position: it has the cells' names in their order, or none."""
    return isinstance(index, pd.RangeIndex) or np.array_equal(index, names)


@contextmanager
def fixed_draws(*, anew: bool = False) -> Iterator[None]:
    """Draw the same random numbers at each call, and leave the global generator as it was.

    Calls within it go on with its numbers, unless they begin ``anew``: what is compared must not have the same noise.
    """
    if _draws_are_fixed.get() and not anew:
        yield
        return
    token = _draws_are_fixed.set(True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed or 0)
            yield
    finally:
        _draws_are_fixed.reset(token)


class EmbeddingMixin:
    """Embeds cells in the company of their sample.

    Encoder and decoder are decoupled: the encoder runs over whole samples, and its result, the mean and variance of q(z|h)
    of each cell, is all that later steps need. Those read cells one by one in the order asked for.
    """

    module: CellPLMModule
    _kept_moments: tuple[CellTable, Moments] | None = None

    @property
    def _spatial_inputs(self) -> SpatialInputs:
        """What the encoder takes of positions."""
        raise NotImplementedError

    def _rows(self, names: pd.Index | np.ndarray, indices: Sequence[int] | np.ndarray | pd.Series | None) -> np.ndarray:
        """Row numbers from a list of rows or a boolean mask, of cells with these names."""
        n_cells = len(names)
        if indices is None:
            return np.arange(n_cells)
        rows = np.asarray(indices)
        if rows.dtype == bool:
            if rows.shape != (n_cells,):
                raise ValueError(f"indices is a mask of shape {rows.shape}; the AnnData has {n_cells:,} cells.")
            if isinstance(indices, pd.Series) and not _is_positional(indices.index, names):
                raise ValueError(
                    f"indices is a mask whose index ({some(indices.index)}) is not that of the cells in their order "
                    f"({some(names)}): a mask is read by position. Pass `mask.loc[adata.obs_names]`."
                )
            return np.flatnonzero(rows)
        if rows.size == 0:
            return np.empty(0, dtype=np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(
                f"indices must be row numbers, one a cell, or a boolean mask, and is an array of {rows.dtype} of shape "
                f"{rows.shape}; for names use `adata[names]`."
            )
        if rows.min() < -n_cells or rows.max() >= n_cells:
            raise IndexError(f"indices go from {rows.min()} to {rows.max()}; the AnnData has {n_cells:,} cells.")
        rows = rows.astype(np.int64)  # first: small types cannot hold the sum
        return np.where(rows < 0, rows + n_cells, rows)

    def _table(self, adata: AnnOrMuData) -> CellTable:
        if self._kept_moments is not None:
            return self._kept_moments[0]
        return CellTable.from_manager(self.get_anndata_manager(adata, required=True))  # type: ignore[attr-defined]

    @torch.inference_mode()
    def _moments(
        self,
        table: CellTable,
        rows: np.ndarray,
        batch_size: int | None,
        *,
        mean_only: bool = False,
        precision: Precision = "32-true",
    ) -> Moments:
        """Mean and variance of q(z|h), each (n_cells of the table, n_latent); NaN for rows not asked for.

        With ``mean_only``, the second is the first: for a published mixture, the variance costs more than the mean.
        """
        if self._kept_moments is not None:
            return self._kept_moments[1]
        if batch_size is not None:
            check_sizes(batch_size=batch_size)
        self.module.eval()
        n_latent = self.module.latent.mean.out_features
        mean = np.full((table.n_cells, n_latent), np.nan, dtype=np.float32)
        variance = mean if mean_only else np.full_like(mean, np.nan)
        loader = whole_sample_loader(
            table,
            self._spatial_inputs,
            rows,
            batch_size=batch_size or default_inference_batch_size(self.module.n_hidden, self.module.device.type),
            max_context=self.module.max_context,
        )
        empty = 0
        with fixed_draws(anew=True), self._autocast(precision):
            for request, tensors in zip(loader.sampler, loader, strict=True):
                empty += int((tensors["offsets"].diff() == 0).sum())
                found = request.rows if request.target is None else request.rows[request.target]
                if mean_only:
                    mean[found] = self.module.embed(tensors).float().cpu().numpy()
                    continue
                outputs = self.module.inference(tensors)
                mean[found] = outputs["qzm"].float().cpu().numpy()
                variance[found] = outputs["qzv"].float().cpu().numpy()
        if empty:
            cells = counted(empty, "cell that was embedded has", "cells that were embedded have")
            warn(f"{cells} no counts of the model's genes, and so nothing to say.")
        return mean, variance

    def _autocast(self, precision: Precision) -> torch.autocast:
        """Products in bfloat16 where that was asked for."""
        if precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f'precision="{precision}" is neither "32-true" nor "bf16-mixed".')
        return torch.autocast(self.module.device.type, dtype=torch.bfloat16, enabled=precision == "bf16-mixed")

    @contextmanager
    def _encoded_once(self, adata: AnnOrMuData, *, positions: bool = True) -> Iterator[None]:
        """Keep the moments of all cells while several results are drawn from the same data.

        Without ``positions``, cells are embedded as if they had no coordinates.
        """
        table = self._table(adata)
        if not positions and table.coordinates is not None:
            table = replace(table, coordinates=np.full_like(table.coordinates, np.nan))
        self._kept_moments = (table, self._moments(table, np.arange(table.n_cells), None))
        try:
            yield
        finally:
            self._kept_moments = None

    def _make_data_loader(
        self,
        adata: AnnOrMuData,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        shuffle: bool = False,
        data_loader_class: type | None = None,
        **data_loader_kwargs: Any,
    ) -> CellLoader:
        """Cells in the order of ``indices`` with their encoder's moments, as scvi-tools' mixins expect them."""
        if batch_size is not None:
            check_sizes(batch_size=batch_size)
        table = self._table(adata)
        rows = self._rows(table.names, indices)
        moments = self._moments(table, rows, None)
        if shuffle:
            rows = np.random.default_rng(settings.seed).permutation(rows)
        size = batch_size or default_row_batch_size(table.counts.n_genes)
        return CellLoader(
            CellDataset(table, SpatialInputs(), None, moments), RowSampler(rows, size), **data_loader_kwargs
        )

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 1,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterable[Minibatch] | None = None,
        precision: Precision = "32-true",
        align_batches: bool = True,
    ) -> np.ndarray | Moments:
        """Embed cells.

        A cell is embedded in the company of its whole sample, whatever ``indices`` asks for, so its embedding depends
        neither on them nor on ``batch_size``, the order of rows or other samples.

        Parameters
        ----------
        adata
            AnnData with the genes of the model, in any order; ``None`` is the one that the model was built with.
        indices
            Rows to return, in this order; ``None`` is all.
        give_mean
            Return the mean of q(z|h), a deterministic function of the cell and its sample, instead of draws.
        mc_samples
            Number of draws to average with ``give_mean=False``.
        batch_size
            Cells that the encoder takes at once; ``None`` chooses by memory.
        return_dist
            Return mean and variance of q(z|h).
        dataloader
            Minibatches to embed instead of ``adata``; rows are returned in its order, and those of a corpus
            (:meth:`~cellplm_scvi.data.CorpusDataModule.inference_dataloader`) in its order of cells.
        precision
            ``"bf16-mixed"`` computes the encoder's products in bfloat16, which is meant for GPUs; a CPU without instructions
            for it takes several times as long. On ``pbmc3k`` it moved embeddings by less than a hundredth of their standard
            deviation (root mean square).
        align_batches
            Move the cells of each batch, cluster by cluster, to where these clusters lie in all batches, as :meth:`train` found
            it (``cellplm_scvi.nn.BatchAlignment``). ``False`` gives the mean of q(z|h) itself, which the decoder takes, and so
            do all other results but :meth:`differential_abundance`. Cells of a batch that the model does not know stay where they are.

        Returns
        -------
        (n_cells, n_latent), float32, or two of them with ``return_dist``.
        """
        self._check_if_trained(warn=False)  # type: ignore[attr-defined]
        check_sizes(mc_samples=mc_samples)
        if dataloader is not None:
            if adata is not None or indices is not None:
                raise ValueError("Pass either `dataloader` or `adata` and `indices`.")
            if isinstance(dataloader, Sized) and len(dataloader) == 0:
                raise ValueError("The dataloader has no minibatch.")
            mean, variance = self._moments_of(dataloader, precision, align_batches)
        else:
            adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
            table = self._table(adata)
            rows = self._rows(table.names, indices)
            mean_only = give_mean and not return_dist
            # without indices, the result is the array that was filled, not a copy
            mean, variance = (
                moment if indices is None else moment[rows]
                for moment in self._moments(table, rows, batch_size, mean_only=mean_only, precision=precision)
            )
            if align_batches and (batch := table.covariates.get(c.BATCH_KEY)) is not None:
                mean = self._aligned(mean, batch if indices is None else batch[rows])
        if return_dist:
            return mean, variance
        if give_mean:
            return mean
        with fixed_draws():
            draws = self.module.latent.sample(torch.from_numpy(mean), torch.from_numpy(variance), mc_samples)
        return (draws if mc_samples == 1 else draws.mean(0)).numpy()

    def _aligned(self, mean: np.ndarray, batch: np.ndarray) -> np.ndarray:
        """Embeddings, (n_cells, n_latent), after the alignment of the batches with these codes, (n_cells,)."""
        alignment = self.module.alignment
        if alignment is None or not alignment.fitted:
            return mean
        # in place, for the largest array is the result, unless others see it too
        aligned = mean if self._kept_moments is None else mean.copy()
        for rows in np.array_split(np.arange(len(mean)), max(1, len(mean) // ALIGNED_AT_ONCE)):
            part = slice(rows[0], rows[-1] + 1) if rows.size else slice(0)
            z = torch.from_numpy(aligned[part]).to(self.module.device)
            aligned[part] = alignment(z, torch.from_numpy(batch[part]).to(z.device)).cpu().numpy()
        return aligned

    def _moments_of(self, dataloader: Iterable[Minibatch], precision: Precision, align_batches: bool) -> Moments:
        self.module.eval()
        rows, means, variances = [], [], []

        def minibatches() -> Iterator[Minibatch]:
            if not isinstance(dataloader, InferenceLoader):
                yield from dataloader
                return
            for found, tensors in dataloader.serve(self).numbered():  # type: ignore[arg-type]
                rows.append(found)
                yield tensors

        with fixed_draws(anew=True), self._autocast(precision):
            for tensors in minibatches():
                outputs = self.module.inference(tensors)
                mean = outputs["qzm"].float()
                means.append((self.module.aligned(mean, tensors) if align_batches else mean).cpu())
                variances.append(outputs["qzv"].float().cpu())
        order = np.argsort(np.concatenate(rows)) if rows else slice(None)
        return torch.cat(means).numpy()[order], torch.cat(variances).numpy()[order]

    def get_mixture_probabilities(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """Probability that each component of the latent mixture generated a cell, q(y|z) at the mean of q(z|h).

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.

        Returns
        -------
        (n_cells, n_components), rows named by ``obs_names`` and summing to one.

        Raises
        ------
        ValueError
            If the model's latent space is not a mixture.
        """
        latent = self.module.latent
        if not isinstance(latent, MixtureLatent | PublishedMixture):
            raise ValueError(
                'Only a model with latent="mixture" has mixture components; the latent space of this one is a '
                f"{type(latent).__name__}."
            )
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        mean = self.get_latent_representation(adata, indices=indices, batch_size=batch_size, align_batches=False)
        with torch.inference_mode():
            z = torch.from_numpy(np.asarray(mean)).to(self.module.device)
            probabilities = latent.responsibilities(z).cpu().numpy()
        return pd.DataFrame(
            probabilities,
            index=adata.obs_names[self._rows(adata.obs_names, indices)],
            columns=[f"component_{k}" for k in range(latent.n_components)],
        )
