"""How well genes that a data set did not measure are imputed, judged by genes that it did measure."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scvi import settings
from sklearn.isotonic import IsotonicRegression

from cellplm_scvi.data._checks import as_csr, some

from ._embedding import fixed_draws

if TYPE_CHECKING:
    from ._cellplm import CellPLM

#: fewest genes held out that say something of the others
MIN_HELD_OUT = 5


def imputation_reliability(
    model: CellPLM, dataset: str | None, held_out: float, max_epochs: int | None, train_kwargs: dict[str, Any]
) -> pd.DataFrame:
    """See :meth:`cellplm_scvi.CellPLM.get_imputation_reliability`."""
    adata, key, dataset_key = _data_of(model)
    table = pd.DataFrame(adata.varm[key]).copy()
    table.columns = table.columns.astype(str)
    names = pd.Series(adata.obs[dataset_key]).astype(str)
    dataset = _chosen(table, names, None if dataset is None else str(dataset))
    table = table.loc[:, table.columns.isin(names)]  # a data set without cells teaches nothing
    others = table.drop(columns=dataset).any(axis=1)
    genes = table.index[table[dataset] & others]
    n = round(held_out * len(genes))
    if not MIN_HELD_OUT <= n < len(genes):
        raise ValueError(
            f'held_out={held_out} of the {len(genes):,} genes that "{dataset}" shares with other data sets are {n}; at least '
            f"{MIN_HELD_OUT} and not all of them are needed."
        )
    hidden = np.random.default_rng(settings.seed).choice(genes, n, replace=False)
    reduced = table.copy()
    reduced.loc[hidden, dataset] = False
    second = _trained_on(model, adata, key, reduced, max_epochs, train_kwargs)
    cells = (names == dataset).to_numpy()
    imputed = second.get_imputed_expression(indices=np.flatnonzero(cells), gene_list=list(hidden))  # type: ignore[arg-type]
    kept = reduced.index[reduced[dataset]]
    found = pd.DataFrame(index=table.index)
    found["reference_correlation"] = _within_reference(second, adata, names, dataset, kept, reduced)
    found["held_out_correlation"] = _correlations(_counts(adata[cells], kept, hidden), imputed)  # type: ignore[arg-type]
    known = found.dropna()
    line = IsotonicRegression(out_of_bounds="clip").fit(known["reference_correlation"], known["held_out_correlation"])
    value = found["reference_correlation"].notna()
    found.loc[value, "expected_correlation"] = line.predict(found.loc[value, "reference_correlation"])
    return found


def _data_of(model: CellPLM) -> tuple[AnnData, str, str]:
    """AnnData with the counts in X, key of the table of measured genes, and column of the data set."""
    adata = model.adata
    setup = model.registry_["setup_args"]
    key, dataset_key = setup.get("measured_genes_key"), setup.get("dataset_key")
    if not isinstance(adata, AnnData) or key is None or key not in adata.varm:
        raise ValueError(
            "The reliability is judged by hiding genes that a data set measured: set the model up on an AnnData with "
            "measured_genes_key, such as concat_panels makes."
        )
    layer = setup.get("layer")
    return _on_same_cells(adata, adata.X if layer is None else adata.layers[layer]), key, dataset_key


def _on_same_cells(adata: AnnData, x: Any) -> AnnData:
    """An AnnData of these counts, which are not copied, with what is known of cells and genes."""
    new = AnnData(x, obs=adata.obs.copy(), var=pd.DataFrame(index=adata.var_names))  # type: ignore[arg-type]
    new.obsm.update(adata.obsm)
    new.varm.update(adata.varm)
    return new


def _chosen(table: pd.DataFrame, names: pd.Series, dataset: str | None) -> str:
    """The data set asked for, or the one that measured the fewest genes."""
    present = [name for name in table.columns if (names == name).any()]
    if dataset is None:
        return str(table[present].sum().idxmin())
    if dataset not in present:
        raise ValueError(f'dataset="{dataset}" is not one of {some(present, 12)}.')
    return dataset


def _trained_on(
    model: CellPLM, adata: AnnData, key: str, table: pd.DataFrame, max_epochs: int | None, train_kwargs: dict[str, Any]
) -> CellPLM:
    """A new model like this one, trained on the same counts with another table of measured genes."""
    setup = {name: value for name, value in model.registry_["setup_args"].items() if value is not None}
    setup.pop("layer", None)  # they are in X
    copy = _on_same_cells(adata, adata.X)
    copy.varm[key] = table
    cls = model._network_class
    init = {name: value for name, value in model.init_params_["non_kwargs"].items() if value is not None}
    init.pop("extension", None)  # it is set up on all categories at once
    init.pop("perturbation", None)
    with warnings.catch_warnings():
        # the counts of hidden genes are left out, as they should be
        warnings.filterwarnings("ignore", message=".*counts belong to genes that their data set did not measure.*")
        cls.setup_anndata(copy, **setup)
        with fixed_draws(anew=True):
            second = cls(copy, **init)
            second.train(max_epochs, **train_kwargs)
    return second


def _within_reference(
    model: CellPLM, adata: AnnData, names: pd.Series, dataset: str, kept: pd.Index, table: pd.DataFrame
) -> pd.Series:
    """Correlation of each gene in the cells of the other data sets, of which the model is shown the panel alone."""
    key, best = model.registry_["setup_args"]["measured_genes_key"], pd.Series(np.nan, index=table.index)
    for name in table.columns.drop(dataset):
        rows = (names == name).to_numpy()
        shown = kept[table.loc[kept, name].to_numpy()]
        genes = table.index[table[name] & ~table.index.isin(shown)]
        if not rows.any() or shown.empty or genes.empty:
            continue
        part = adata[rows, adata.var_names.isin(shown)].copy()
        part.varm.pop(key, None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # genes are missing on purpose
            # these cells are what a regression would be fitted to
            imputed = model.get_imputed_expression(part, gene_list=list(genes), regression_weight=0)
        found = _correlations(_counts(adata[rows], shown, genes), imputed)  # type: ignore[arg-type]
        best = best.combine(found.reindex(best.index), np.fmax)
    return best


def _counts(adata: AnnData, total_of: pd.Index, genes: Any) -> pd.DataFrame:
    """Counts of some genes relative to the total of others, (n_cells, n_genes)."""
    x = as_csr(adata.X)
    places = adata.var_names.get_indexer
    total = np.maximum(np.asarray(x[:, places(total_of)].sum(1)).ravel(), 1)
    return pd.DataFrame(x[:, places(pd.Index(genes))].toarray() / total[:, None], columns=list(genes))


def _correlations(counts: pd.DataFrame, imputed: pd.DataFrame, scale: float = 100.0) -> pd.Series:
    """Pearson correlation over cells of log1p expression of each gene; 0 where a gene is constant."""
    a, b = (np.log1p(scale * frame[counts.columns].to_numpy(dtype=np.float64)) for frame in (counts, imputed))
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return pd.Series(np.where(norm > 1e-12, (a * b).sum(0) / np.maximum(norm, 1e-12), 0.0), index=counts.columns)
