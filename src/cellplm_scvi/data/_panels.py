"""Joins data sets that measured different genes, and keeps which data set measured what."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from ._checks import as_csr, check_counts, check_names, some, warn

#: key of ``varm`` under which the table of measured genes is put
MEASURED_GENES = "measured_genes"
ENSEMBL = re.compile(r"^(ENS[A-Z]*G)\d{6,}")
#: below this number of shared genes there is little to learn from
FEW_SHARED = 10


def concat_panels(
    adatas: Sequence[AnnData] | Mapping[str, AnnData] | MuData,
    keys: Sequence[str] | None = None,
    *,
    label: str = "dataset",
    spatial_key: str = "spatial",
    layer: str | None = None,
) -> AnnData:
    """Join data sets that measured different genes, such as a dissociated reference and a spatial panel.

    Genes are matched by name and all are kept. A gene that a data set did not measure has no counts there, and
    ``varm["measured_genes"]`` says so, so that the zeros are not taken for measurements: pass it on as
    ``measured_genes_key``.

    Parameters
    ----------
    adatas
        Data sets of raw counts: a sequence; a mapping from names; or a MuData whose modalities are data sets.
    keys
        Names of the data sets; by default those of the mapping or the modalities, which ``keys`` may also select from,
        or ``"0"``, ``"1"``, ...
    label
        Column of ``obs`` for these names; a column of that name in the data sets is replaced.
    spatial_key
        Key of ``obsm`` with coordinates. Cells of data sets without it get rows of NaN; coordinates are left as they are.
    layer
        Layer that holds the counts in every data set; ``None`` is ``X``.

    Returns
    -------
    AnnData with counts in ``X`` (CSR, float32), the union of genes, first those of the first data set; ``obs`` with the
    union of columns; and ``varm["measured_genes"]``, a boolean DataFrame, genes x data sets. Cell names that several data
    sets use get the name of the data set behind them, as all cells of these data sets do.

    Raises
    ------
    ValueError
        If names are not unique, no gene is shared, data sets name genes in different ways, or ``X`` holds no counts.

    Examples
    --------
    >>> adata = cellplm_scvi.data.concat_panels({"reference": single_cells, "xenium": section})
    >>> CellPLM.setup_anndata(
    ...     adata, dataset_key="dataset", batch_key="batch", spatial_key="spatial", measured_genes_key="measured_genes"
    ... )
    """
    named = _named(adatas, keys)
    counts = {}
    for name, adata in named.items():
        try:
            check_names(adata)
            counts[name] = _counts(adata, layer)
        except (ValueError, TypeError, KeyError) as error:
            raise type(error)(f'Data set "{name}": {error.args[0]}') from None
    _check_not_joined(named, label)
    _check_genes(named)
    genes = pd.Index(list(dict.fromkeys(gene for adata in named.values() for gene in adata.var_names)))
    var = pd.DataFrame(index=genes)
    for adata in named.values():
        var = var.combine_first(cast(pd.DataFrame, adata.var))
    joined = AnnData(
        sp.vstack(
            [_widened(counts[name], genes.get_indexer(adata.var_names), len(genes)) for name, adata in named.items()],
            format="csr",
        ),
        obs=_joined_obs(named, label),
        var=_with_truth_values(var.loc[genes]),
    )
    joined.varm[MEASURED_GENES] = pd.DataFrame(
        {name: genes.isin(adata.var_names) for name, adata in named.items()}, index=genes
    )
    coordinates = _joined_coordinates(named, spatial_key)
    if coordinates is not None:
        joined.obsm[spatial_key] = coordinates
    return joined


def _check_not_joined(named: Mapping[str, AnnData], label: str) -> None:
    """Raise if a data set has genes that some of its cells did not measure."""
    for name, adata in named.items():
        if MEASURED_GENES not in adata.varm:
            continue
        table = pd.DataFrame(adata.varm[MEASURED_GENES])
        columns = [adata.obs[key].astype(str) for key in (label, "dataset") if key in adata.obs]
        held = next((obs.unique() for obs in columns if obs.isin(table.columns.astype(str)).all()), table.columns)
        lacking = [str(one) for one in table.columns if str(one) in set(map(str, held)) and not table[one].all()]
        if lacking:
            raise ValueError(
                f'Data set "{name}": by varm["{MEASURED_GENES}"], {some(lacking)} did not measure all of its genes. Pass each data '
                f'set by itself with the genes that it measured, adata[cells, adata.varm["{MEASURED_GENES}"][name]].'
            )


def _named(
    adatas: Sequence[AnnData] | Mapping[str, AnnData] | MuData, keys: Sequence[str] | None
) -> dict[str, AnnData]:
    """Data sets by name."""
    if isinstance(adatas, AnnData):
        raise TypeError("concat_panels joins several data sets: pass a list of AnnData, a dict or a MuData.")
    if isinstance(adatas, MuData):
        adatas = adatas.mod
    if isinstance(adatas, Mapping):
        chosen = list(adatas) if keys is None else [str(key) for key in keys]
        absent = [key for key in chosen if key not in adatas]
        if absent:
            raise KeyError(f"keys has {some(absent)}; there are {some(list(adatas), 12)}.")
        named = {str(key): adatas[key] for key in chosen}
    else:
        chosen = [str(n) for n in range(len(adatas))] if keys is None else [str(key) for key in keys]
        if len(chosen) != len(adatas):
            raise ValueError(f"There are {len(adatas)} data sets and {len(chosen)} keys ({some(chosen)}).")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"keys ({some(chosen, 12)}) must differ from each other.")
        named = dict(zip(chosen, adatas, strict=True))
    for name, adata in named.items():
        if not isinstance(adata, AnnData):
            raise TypeError(f'Data set "{name}" is a {type(adata).__name__}, not an AnnData.')
    if len(named) < 2:
        raise ValueError(f"concat_panels joins several data sets; there is {len(named)}.")
    return named


def _counts(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    if layer is not None and layer not in adata.layers:
        raise KeyError(
            f'layer="{layer}" is not among its layers ({some([str(name) for name in list(adata.layers) if name]) or "none"}).'
        )
    x = adata.X if layer is None else adata.layers[layer]
    if x is None:
        raise ValueError("X is None. Pass the layer that holds the counts with `layer=`.")
    if adata.isbacked:
        return _counts(adata.to_memory(), layer)
    check_counts(x, "X" if layer is None else f'layers["{layer}"]')
    return as_csr(x).astype(np.float32, copy=False)


def _widened(counts: sp.csr_matrix, columns: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """The same counts in a table of more genes."""
    wide = sp.csr_matrix((counts.data.copy(), columns[counts.indices], counts.indptr), shape=(counts.shape[0], n_genes))
    wide.sort_indices()
    return wide


def _check_genes(named: Mapping[str, AnnData]) -> None:
    """Raise unless every data set shares genes with the others, named in the same way."""
    kinds = {name: gene_name_kind(adata.var_names) for name, adata in named.items()}
    if len(set(kinds.values())) > 1:
        examples = "; ".join(f'"{name}": {kinds[name]} ({some(adata.var_names, 2)})' for name, adata in named.items())
        raise ValueError(
            f"The data sets name their genes in different ways: {examples}. Bring them to one with "
            "`cellplm_scvi.genes.to_ensembl(adata.var_names)` or `to_symbol`."
        )
    if set(kinds.values()) != {"symbols"}:
        _check_versions(named)
    for name, adata in named.items():
        others = pd.Index([gene for key, other in named.items() if key != name for gene in other.var_names])
        n_shared = int(adata.var_names.isin(others).sum())
        if n_shared == 0:
            folded = int(adata.var_names.str.upper().isin(others.str.upper()).sum())
            hint = (
                f"Ignoring upper and lower case {folded:,} are shared: are these different organisms? "
                '`cellplm_scvi.genes.to_ensembl(names, organism="mouse")` gives human orthologues.'
                if folded
                else "Use the same kind of gene names in all of them."
            )
            raise ValueError(
                f'Data set "{name}" shares none of its {adata.n_vars:,} genes (such as {some(adata.var_names)}) with the '
                f"other data sets (such as {some(others)}). {hint}"
            )
        if n_shared < min(FEW_SHARED, adata.n_vars):
            warn(f'Data set "{name}" shares only {n_shared} of its {adata.n_vars:,} genes with the other data sets.')


def _check_versions(named: Mapping[str, AnnData]) -> None:
    """Raise if an Ensembl id has different versions in two data sets, or one with and one without."""
    written: dict[str, tuple[str, str]] = {}
    differ: dict[str, str] = {}
    for name, adata in named.items():
        for gene in map(str, adata.var_names):
            plain = gene.split(".")[0] if ENSEMBL.match(gene) else gene
            earlier, elsewhere = written.setdefault(plain, (gene, name))
            if gene != earlier and name != elsewhere:
                differ[plain] = f'{earlier} in "{elsewhere}", {gene} in "{name}"'
    if differ:
        raise ValueError(
            f"{len(differ):,} Ensembl ids have different versions in the data sets ({some(list(differ.values()), 2)}), and "
            "would count as different genes. Take the versions off: "
            '`adata.var_names = adata.var_names.str.split(".").str[0]`.'
        )


def gene_name_kind(names: pd.Index) -> str:
    """``"symbols"``, or the prefix of most Ensembl ids, such as ``"ENSG ids"``."""
    prefixes = pd.Series([match[1] if (match := ENSEMBL.match(str(name))) else "" for name in names])
    commonest = prefixes.mode()[0]
    return f"{commonest} ids" if commonest else "symbols"


def _joined_obs(named: Mapping[str, AnnData], label: str) -> pd.DataFrame:
    """All columns of ``obs``; categories are joined, and ``label`` says which data set a cell is of."""
    uses = pd.Index(np.concatenate([adata.obs_names.unique() for adata in named.values()])).value_counts()
    repeated = set(uses.index[uses > 1])
    tables, categories = [], []
    for name, adata in named.items():
        table = cast(pd.DataFrame, adata.obs).drop(columns=label, errors="ignore").copy()
        for column in table.select_dtypes("category"):
            table[column] = table[column].astype(object)
            categories.append(column)
        if repeated.intersection(adata.obs_names):
            table.index = [f"{cell}-{name}" for cell in table.index]
        tables.append(table.assign(**{label: name}))
    obs = _with_truth_values(pd.concat(tables, join="outer"))
    obs[label] = pd.Categorical(obs[label], categories=list(named))
    for column in categories:
        obs[column] = obs[column].astype("category")
    return obs


def _with_truth_values(table: pd.DataFrame) -> pd.DataFrame:
    """The table with columns of truth values as such, nullable where some are missing, so that it can be written."""
    for name, column in table.items():
        if pd.api.types.is_object_dtype(column) and pd.api.types.infer_dtype(column) == "boolean":
            table[name] = table[name].astype("boolean" if table[name].isna().any() else bool)
    return table


def _joined_coordinates(named: Mapping[str, AnnData], key: str) -> np.ndarray | None:
    """Coordinates of all cells, (n_cells, n_dims), NaN where a data set has none; ``None`` if no data set has them."""
    found = {name: np.asarray(adata.obsm[key], dtype=np.float64) for name, adata in named.items() if key in adata.obsm}
    if not found:
        return None
    widths = {name: values.shape[1] for name, values in found.items()}
    if len(set(widths.values())) > 1:
        raise ValueError(
            f'obsm["{key}"] has a different number of columns in the data sets ({widths}). Keep the same axes in all.'
        )
    width = next(iter(widths.values()))
    return np.concatenate([found.get(name, np.full((adata.n_obs, width), np.nan)) for name, adata in named.items()])
