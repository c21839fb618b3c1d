"""Expression decoded from the embedding: normalised values, differential expression, predictive samples, likelihoods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi.model.base import RNASeqMixin, VAEMixin
from scvi.utils import track
from torch import Tensor

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import AnnOrMuData
from cellplm_scvi.data._categories import CovariateField, as_text
from cellplm_scvi.data._checks import as_names, check_library_size, check_sizes, counted, some
from cellplm_scvi.data._vocabulary import gene_columns
from cellplm_scvi.model._embedding import fixed_draws

if TYPE_CHECKING:
    from sparse import GCXS

    from cellplm_scvi._typing import Minibatch
    from cellplm_scvi.module import CellPLMModule


class ExpressionMixin(RNASeqMixin, VAEMixin):
    """What scvi-tools' models say of expression, aligned with ``obs_names``, the same at each call."""

    module: CellPLMModule

    @torch.inference_mode()
    def get_normalized_expression(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: Sequence[str | float] | str | float | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: Literal["uniform"] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        silent: bool = True,
    ) -> np.ndarray | pd.DataFrame:
        r"""Expected expression of each gene, denoised and in one batch if asked for.

        Parameters
        ----------
        adata, indices
            As in :meth:`~cellplm_scvi.CellPLM.get_latent_representation`.
        transform_batch
            Category of the batch to decode every cell in; several are averaged; ``None`` decodes each cell in its own.
        gene_list
            Genes to return, in the order of the AnnData; ``None`` is all that it shares with the model.
        library_size
            Counts that the expression of a cell adds up to, over the genes it measured, and with ``size_factor_key`` over those
            beyond the model too; ``"latent"`` is its own.
        n_samples
            1 decodes the mean of q(z|h); more average over draws.
        n_samples_overall
            Draw this many (cell, z) pairs instead, for differential expression.
        weights
            Only uniform weights: importance weights assume a standard normal prior.
        batch_size
            Cells decoded at once; ``None`` chooses by memory.
        return_mean
            Average over the draws.
        return_numpy
            Return an array instead of a DataFrame.
        silent
            Hide the progress bar over ``transform_batch``.

        Returns
        -------
        (n_cells, n_genes), or (n_samples, n_cells, n_genes) with ``return_mean=False``, or (n_samples_overall, n_genes).
        Genes in the order of ``adata.var_names``. NaN where a cell's data set did not measure a gene.

        Raises
        ------
        ValueError
            If ``gene_list`` or ``transform_batch`` names something unknown.
        """
        if weights not in (None, "uniform"):
            raise ValueError(
                f'weights="{weights}" is not available: importance weights assume a standard normal prior.'
            )
        check_sizes(
            n_samples=n_samples, **({} if n_samples_overall is None else {"n_samples_overall": n_samples_overall})
        )
        check_library_size(library_size)
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        genes, names = self._genes(manager, gene_list)
        rows = self._rows(adata.obs_names, indices)  # type: ignore[attr-defined]
        if n_samples_overall is not None:
            n_samples = n_samples_overall // max(rows.size, 1) + 1
        draw = n_samples > 1 or n_samples_overall is not None
        loader = self._make_data_loader(adata, rows, batch_size)  # type: ignore[attr-defined]
        codes = _batch_codes(manager, transform_batch)
        parts = []
        with fixed_draws():
            n_pairs = rows.size * n_samples
            chosen = None
            if n_samples_overall is not None and n_pairs:
                chosen = torch.randint(n_pairs, (n_samples_overall,)).numpy()
            for tensors in loader:
                decoded = [
                    self._decoded(tensors, code, n_samples if draw else None, library_size)[..., genes].cpu()
                    for code in track(codes, disable=silent)
                ]
                mean = torch.stack(decoded).mean(0).numpy()
                parts.append(
                    mean.mean(0, keepdims=True) if draw and return_mean and n_samples_overall is None else mean
                )
        shape = (1, 0, len(names)) if draw else (0, len(names))
        expression = np.concatenate(parts, axis=-2) if parts else np.zeros(shape, np.float32)
        if n_samples_overall is not None:
            expression = expression.reshape(-1, expression.shape[-1])
            return expression if chosen is None else expression[chosen]
        if draw and not return_mean:
            return expression
        expression = expression[0] if draw else expression
        if return_numpy:
            return expression
        return pd.DataFrame(expression, index=adata.obs_names[rows], columns=names)

    def _genes(self, manager: Any, gene_list: Sequence[str] | None) -> tuple[np.ndarray, pd.Index]:
        """Columns of the model, and names, of the genes asked for, in the order of the data."""
        given = self._gene_names(manager)
        columns = gene_columns(manager.get_state_registry(c.X_KEY), given)
        known = columns >= 0
        names, columns = given[known], columns[known]
        if gene_list is not None:
            gene_list = as_names(gene_list)
            unknown = [gene for gene in gene_list if gene not in names]
            if unknown:
                raise ValueError(f"gene_list has {counted(len(unknown), 'gene')} not known ({some(unknown)}).")
            columns, names = columns[names.isin(gene_list)], names[names.isin(gene_list)]
        return columns, names

    @staticmethod
    def _gene_names(manager: Any) -> pd.Index:
        """Genes of the data, in their order."""
        mod_key = getattr(manager.data_registry[c.X_KEY], "mod_key", None)
        return (manager.adata if mod_key is None else manager.adata.mod[mod_key]).var_names

    def _decoded(
        self, tensors: Any, code: int | None, n_samples: int | None, library_size: float | Literal["latent"]
    ) -> Tensor:
        """Expected expression of a minibatch, at the mean of q(z|h) or at draws, ((n_samples,) n_cells, n_genes)."""
        inference = self.module.inference(tensors, n_samples=n_samples or 1)
        if n_samples is None:
            inference = inference | {"z": inference["qzm"]}  # type: ignore[assignment]
        elif n_samples == 1:
            inference = inference | {"z": inference["z"][None]}  # type: ignore[assignment]
        inputs = self.module._get_generative_input(tensors, inference)
        px = self.module.generative(**inputs, transform_batch=code)["px"]
        values = px.mu if library_size == "latent" else px.scale * library_size
        if px.output.measured is not None and px.panel is not None:
            values = values.masked_fill(~px.output.measured[px.panel], torch.nan)
        return values

    def posterior_predictive_sample(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: Sequence[str | float] | str | float | None = None,
        n_samples: int = 1,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        dataloader: Iterable[Minibatch] | None = None,
        silent: bool = True,
    ) -> GCXS:
        """Draw counts from the posterior predictive distribution, as in scvi-tools.

        Parameters
        ----------
        adata, indices, transform_batch, gene_list, batch_size
            As in :meth:`get_normalized_expression`.
        n_samples
            Number of draws.
        dataloader, silent
            Of :meth:`scvi.model.SCVI.posterior_predictive_sample`.

        Returns
        -------
        Sparse array (n_cells, n_genes), or (n_cells, n_genes, n_samples) for more than one sample; rows in the order of
        ``indices``, genes in the order of ``adata.var_names``.
        """
        if dataloader is not None:
            with fixed_draws():
                return super().posterior_predictive_sample(
                    adata, indices, transform_batch, n_samples, gene_list, batch_size, dataloader, silent
                )
        import sparse

        check_sizes(n_samples=n_samples)
        _check_some_cells(adata, indices)
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        genes, _ = self._genes(manager, gene_list)
        codes = _batch_codes(manager, transform_batch)
        parts = []
        with fixed_draws():
            for tensors in self._make_data_loader(adata, indices, batch_size):  # type: ignore[attr-defined]
                draws = [self.module.sample(tensors, n_samples, {"transform_batch": code})[:, genes] for code in codes]
                parts.append(sparse.GCXS.from_numpy(torch.stack(draws).mean(0).numpy()))
        return sparse.concatenate(parts, axis=0)

    @torch.inference_mode()
    def _get_denoised_samples(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        n_samples: int = 25,
        batch_size: int = 64,
        rna_size_factor: float = 1000,
        transform_batch: int | None = None,
        **_: Any,
    ) -> np.ndarray:
        """Rates drawn from the posterior predictive's Gamma, for :meth:`get_feature_correlation_matrix`.

        Returns
        -------
        (n_cells, n_genes), or (n_cells, n_genes, n_samples) for more than one sample.
        """
        _check_some_cells(adata, indices)
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        genes, _names = self._genes(self.get_anndata_manager(adata, required=True), None)  # type: ignore[attr-defined]
        draws = []
        with fixed_draws():
            for tensors in self._make_data_loader(adata, indices, batch_size):  # type: ignore[attr-defined]
                inference = self.module.inference(tensors, n_samples=n_samples)
                inputs = self.module._get_generative_input(tensors, inference)
                px = self.module.generative(**inputs, transform_batch=transform_batch)["px"]
                rate = (rna_size_factor * px.scale).clamp_min(1e-12)
                draws.append(torch.distributions.Gamma(px.theta, px.theta / rate).sample()[..., genes].cpu().numpy())
        drawn = np.concatenate(draws, axis=-2)
        return drawn if n_samples == 1 else drawn.transpose(1, 2, 0)

    def get_feature_correlation_matrix(
        self, adata: AnnOrMuData | None = None, *args: Any, **kwargs: Any
    ) -> pd.DataFrame:
        """Correlation of genes over draws from the posterior predictive, as in scvi-tools.

        Parameters
        ----------
        adata, *args, **kwargs
            ``adata``, ``indices``, ``n_samples``, ``batch_size``, ``correlation_type`` and so on, of
            :meth:`scvi.model.SCVI.get_feature_correlation_matrix`.

        Returns
        -------
        DataFrame (n_genes, n_genes).

        Raises
        ------
        ValueError
            If the data have genes that the model does not know.
        """
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        unknown = self._gene_names(manager).difference(self._genes(manager, None)[1])
        if len(unknown):
            raise ValueError(
                f"{counted(len(unknown), 'gene of this AnnData is', 'genes of this AnnData are')} unknown to the model "
                f"({some(unknown)}). Pass an AnnData without them."
            )
        return super().get_feature_correlation_matrix(adata, *args, **kwargs)

    def get_likelihood_parameters(
        self, adata: AnnOrMuData | None = None, *args: Any, **kwargs: Any
    ) -> dict[str, np.ndarray]:
        """Mean and inverse dispersion of the counts' negative binomial, as in scvi-tools.

        Parameters
        ----------
        adata, *args, **kwargs
            ``adata``, ``indices``, ``n_samples``, ``give_mean``, ``batch_size``, of
            :meth:`scvi.model.SCVI.get_likelihood_parameters`.

        Returns
        -------
        ``{"mean": (n_cells, n_genes), "dispersions": (n_cells, n_genes)}``, genes in the order of ``adata.var_names``.
        """
        _check_some_cells(adata, *args, **kwargs)
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        genes, _ = self._genes(self.get_anndata_manager(adata, required=True), None)  # type: ignore[attr-defined]
        with fixed_draws():
            found = super().get_likelihood_parameters(adata, *args, **kwargs)
        return {name: values[..., genes] for name, values in found.items()}

    def get_elbo(self, *args: Any, **kwargs: Any) -> float:
        """Evidence lower bound of the data, the higher the better, as in scvi-tools.

        Parameters
        ----------
        *args, **kwargs
            ``adata``, ``indices``, ``batch_size``, ``return_mean``, of :meth:`scvi.model.SCVI.get_elbo`.

        Returns
        -------
        Mean over cells, or a tensor (n_cells,) with ``return_mean=False``.
        """
        _check_some_cells(*args, **kwargs)
        with fixed_draws():
            return super().get_elbo(*args, **kwargs)

    def get_reconstruction_error(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Negative log-likelihood of the counts given one draw of z, as in scvi-tools.

        Parameters
        ----------
        *args, **kwargs
            ``adata``, ``indices``, ``batch_size``, ``return_mean``, of :meth:`scvi.model.SCVI.get_reconstruction_error`.

        Returns
        -------
        ``{"reconstruction_loss": mean over cells, or (n_cells,) with return_mean=False}``.
        """
        _check_some_cells(*args, **kwargs)
        with fixed_draws():
            return super().get_reconstruction_error(*args, **kwargs)

    def get_latent_library_size(
        self,
        adata: AnnOrMuData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Library size of each cell, which this model takes as given, (n_cells,), counts.

        ``give_mean`` and ``batch_size`` are those of :meth:`scvi.model.SCVI.get_latent_library_size`, and change nothing.
        """
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        table = self._table(adata)  # type: ignore[attr-defined]
        library = table.totals if table.size_factor is None else table.size_factor
        return library[self._rows(table.names, indices)]  # type: ignore[attr-defined]


def _batch_codes(manager: Any, transform_batch: Sequence[str | float] | str | float | None) -> list[int | None]:
    """Codes of the batches to decode in; ``None`` stands for each cell's own."""
    known = manager.get_state_registry(c.BATCH_KEY)[CovariateField.CATEGORICAL_MAPPING_KEY]
    code_of = {as_text(name): code for code, name in enumerate(known)} | {name: code for code, name in enumerate(known)}
    many = np.iterable(transform_batch) and not isinstance(transform_batch, str)
    asked: list[Any] = list(transform_batch) if many else [transform_batch]  # type: ignore[arg-type]
    if not asked:
        raise ValueError("transform_batch is empty. Name a batch, or pass None to decode each cell in its own.")
    codes = [None if name is None else code_of.get(name, code_of.get(as_text(name))) for name in asked]
    unknown = [name for name, code in zip(asked, codes, strict=True) if name is not None and code is None]
    if unknown:
        raise ValueError(
            f"transform_batch: {some(unknown)} is no batch of these data or the model ({some(known, 12)})."
        )
    return codes


def _check_some_cells(
    adata: AnnOrMuData | None = None, indices: Sequence[int] | np.ndarray | None = None, *_: Any, **__: Any
) -> None:
    """Raise if rows are asked for and there are none."""
    if indices is not None and (np.size(indices) == 0 or (np.asarray(indices).dtype == bool and not np.any(indices))):
        raise ValueError("indices asks for no cell.")
