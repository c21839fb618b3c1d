"""The registered data of an AnnData or MuData as arrays, and its counts by rows."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from cellplm_scvi import _constants as c
from cellplm_scvi._compat import CSCDataset, CSRDataset

from ._checks import (
    CHUNK_ROWS,
    as_csr,
    check_column,
    check_coordinates,
    check_counts,
    check_library_sizes,
    dense,
    some,
    warn,
)
from ._vocabulary import N_GIVEN_KEY, gene_columns

if TYPE_CHECKING:
    from scvi.data import AnnDataManager


#: cells whose counts are looked at again whenever data are read
N_LOOKED_AT = 256


class CountRows:
    """Rows of a matrix of counts in canonical CSR, in the model's order of genes.

    Parameters
    ----------
    x
        Counts, (n_cells, n_given): CSR, CSC (matrix or array), dense, or backed.
    columns
        For each given gene its column in the model, -1 where the model does not know it, (n_given,).
    n_genes
        Number of genes of the model.
    measured, panel
        Genes of each panel, (n_panels, n_genes), and panel of each cell, (n_cells,): counts of a gene that the cell's
        panel lacks are left out.
    order
        Row of ``x`` of each cell, (n_cells,); ``None`` for the order of ``x``.
    """

    def __init__(
        self,
        x: Any,
        columns: np.ndarray,
        n_genes: int,
        measured: np.ndarray | None = None,
        panel: np.ndarray | None = None,
        order: np.ndarray | None = None,
    ):
        self._order = order
        if isinstance(x, CSCDataset):
            x = x.to_memory()
        if sp.issparse(x):
            x = as_csr(x)
            if not x.has_canonical_format:
                x = x.astype(np.float32)  # a copy, in which sums cannot overflow
                x.sum_duplicates()
        self._x = x
        self._backed = isinstance(x, CSRDataset | h5py.Dataset)
        self.n_genes = n_genes
        whole = measured is None or bool(measured.all())
        self._measured: np.ndarray | None = None if whole else measured
        self._panel: np.ndarray | None = None if whole else panel
        identity = columns.shape[0] == n_genes and bool((columns == np.arange(n_genes)).all())
        self._columns = None if identity else columns

    def without_panels(self) -> CountRows:
        """The same rows with all their counts."""
        whole = copy(self)
        whole._measured = whole._panel = None
        return whole

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        """Counts of the rows asked for, in their order, float32."""
        stored = rows if self._order is None else self._order[rows]
        if self._backed:
            order = np.argsort(stored, kind="stable")
            unique, inverse = np.unique(stored[order], return_inverse=True)
            part = as_csr(self._x[unique])[inverse][np.argsort(order)]
        else:
            part = as_csr(self._x[stored])
        part = part.astype(np.float32, copy=False)
        if self._backed:
            part.sum_duplicates()
        part.eliminate_zeros()
        if self._columns is None and self._panel is None:
            return part
        columns = part.indices if self._columns is None else self._columns[part.indices]
        keep = columns >= 0
        if self._measured is not None and self._panel is not None:
            keep &= self._measured[np.repeat(self._panel[rows], np.diff(part.indptr)), columns]
        offsets = np.concatenate([[0], np.cumsum(keep)])[part.indptr]
        return sp.csr_matrix((part.data[keep], columns[keep], offsets), shape=(part.shape[0], self.n_genes))


@dataclass(frozen=True)
class CellTable:
    """Everything a model reads of an AnnData that is registered with it, one row a cell.

    Parameters
    ----------
    counts
        Counts by rows.
    covariates
        Codes of batch, platform and data set, each (n_cells,).
    sample
        Sample code, (n_cells,).
    coordinates
        (n_cells, n_dims), NaN without position, or ``None``.
    size_factor
        True library size, (n_cells,), or ``None``.
    measured
        Genes measured by each panel, (n_panels, n_genes), or ``None`` for all by all; ``panel`` is each cell's row.
    names
        Cell names.
    annotations
        Codes of labels and perturbations.
    """

    counts: CountRows
    covariates: dict[str, np.ndarray]
    sample: np.ndarray
    names: np.ndarray
    coordinates: np.ndarray | None = None
    size_factor: np.ndarray | None = None
    measured: np.ndarray | None = None
    panel: np.ndarray | None = None
    annotations: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def from_manager(cls, manager: AnnDataManager) -> CellTable:
        """Read what is registered."""
        manager.validate()  # the AnnData may hold the codes of another set-up
        registry = manager.data_registry
        state = manager.get_state_registry(c.X_KEY)
        genes = pd.Index(state.column_names)
        adata = _holder(manager, c.X_KEY)
        columns = gene_columns(state, adata.var_names)

        coordinates = None
        if c.COORDINATES_KEY in registry:
            holder, key = _holder(manager, c.COORDINATES_KEY), registry[c.COORDINATES_KEY].attr_key
            n_dims = manager.get_state_registry(c.COORDINATES_KEY)["n_dims"]
            if key in holder.obsm:
                # they may have been changed since the set-up
                check_coordinates(dense(holder.obsm[key]), key, holder.obs_names, n_dims)
                coordinates = _in_order(manager, c.COORDINATES_KEY, dense(holder.obsm[key]).astype(np.float64))
            else:
                coordinates = np.full((adata.n_obs, n_dims), np.nan)
        size_factor = None
        if c.SIZE_FACTOR_KEY in registry:
            key = registry[c.SIZE_FACTOR_KEY].attr_key
            check_library_sizes(check_column(_holder(manager, c.SIZE_FACTOR_KEY), key, "size_factor_key"), key)
            size_factor = np.asarray(manager.get_from_registry(c.SIZE_FACTOR_KEY), dtype=np.float32).ravel()
            size_factor = _in_order(manager, c.SIZE_FACTOR_KEY, size_factor)
        if columns.size and columns.max() < 0:
            raise ValueError(
                f"None of the {columns.size:,} genes of this AnnData (such as {some(adata.var_names)}) is among the model's "
                f"{len(genes):,} (such as {some(genes)}). Were var_names changed after it was set up?"
            )
        if (n_given := state.get(N_GIVEN_KEY, len(genes))) != adata.n_vars:
            warn(
                f"This AnnData had {n_given:,} genes when it was set up, and has {adata.n_vars:,} now. Of the model's "
                f"{len(genes):,}, the {len(genes) - int((columns >= 0).sum()):,} that it lacks count as not measured."
            )
        measured, panel = _panels(manager, adata, genes, columns)
        counts = CountRows(
            manager.get_from_registry(c.X_KEY), columns, len(genes), measured, panel, _order(manager, c.X_KEY)
        )
        # all were looked at when the data were set up; what was transformed since shows in any part
        check_counts(
            counts[np.arange(min(adata.n_obs, N_LOOKED_AT))], "The registered matrix, changed since its set-up,"
        )
        return cls(
            counts=counts,
            covariates={key: registered_codes(manager, key) for key in c.COVARIATES if key in registry},
            sample=registered_codes(manager, c.SAMPLE_KEY),
            names=manager.adata.obs_names.to_numpy(),
            coordinates=coordinates,
            size_factor=size_factor,
            measured=measured,
            panel=panel,
            annotations={
                key: registered_codes(manager, key) for key in (c.LABELS_KEY, c.PERTURBATION_KEY) if key in registry
            },
        )

    @property
    def n_cells(self) -> int:
        return self.sample.shape[0]

    @cached_property
    def totals(self) -> np.ndarray:
        """Counts of each cell over the model's genes, (n_cells,)."""
        chunks = (self.counts[rows].sum(1, dtype=np.float64).A1 for rows in self._row_chunks())
        return np.concatenate(list(chunks))

    def counts_outside_panels(self) -> int:
        """Number of counts of genes that the cell's data set did not measure, by its panel."""
        if self.measured is None:
            return 0
        whole = self.counts.without_panels()
        return round(sum(whole[rows].sum(dtype=np.float64) for rows in self._row_chunks()) - self.totals.sum())

    def gene_totals(self, covariate: str) -> np.ndarray:
        """Counts of each gene in each category of a covariate, (n_categories, n_genes)."""
        codes = self.covariates[covariate]
        totals = np.zeros((int(codes.max()) + 1, self.counts.n_genes))
        for rows in self._row_chunks():
            member = sp.csr_matrix(
                (np.ones(rows.shape[0]), (codes[rows], np.arange(rows.shape[0]))),
                shape=(totals.shape[0], rows.shape[0]),
            )
            totals += (member @ self.counts[rows]).toarray()
        return totals

    def _row_chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.n_cells, CHUNK_ROWS):
            yield np.arange(start, min(start + CHUNK_ROWS, self.n_cells))


def _holder(manager: AnnDataManager, key: str) -> AnnData:
    """The AnnData, or the modality of the MuData, that a key is registered in."""
    mod_key = getattr(manager.data_registry[key], "mod_key", None)
    return manager.adata if mod_key is None else manager.adata.mod[mod_key]


def _order(manager: AnnDataManager, key: str) -> np.ndarray | None:
    """Row of each cell where a key is registered: modalities of a MuData may have their cells in an order of their own."""
    names, own = manager.adata.obs_names, _holder(manager, key).obs_names
    if names.equals(own):
        return None
    if names.is_unique:
        return own.get_indexer(names)
    return np.asarray(manager.adata.obsmap[manager.data_registry[key].mod_key]).ravel().astype(np.int64) - 1


def _in_order(manager: AnnDataManager, key: str, values: np.ndarray) -> np.ndarray:
    """Values of cells in the order of the AnnData, or MuData, as a whole."""
    order = _order(manager, key)
    return values if order is None else values[order]


def registered_codes(manager: AnnDataManager, key: str) -> np.ndarray:
    """Codes of a registered category, (n_cells,), in the order of the AnnData, or MuData, as a whole."""
    return _in_order(manager, key, np.asarray(manager.get_from_registry(key)).ravel().astype(np.int64))


def _panels(
    manager: AnnDataManager, adata: AnnData, genes: pd.Index, columns: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Genes measured by each data set (n_panels, n_genes), and the panel of each cell."""
    present = np.zeros(len(genes), dtype=bool)
    present[columns[columns >= 0]] = True
    registry = manager.data_registry
    if c.MEASURED_GENES_KEY not in registry or registry[c.MEASURED_GENES_KEY].attr_key not in adata.varm:
        if present.all():
            return None, None
        return present[None], np.zeros(adata.n_obs, dtype=np.int64)
    field_state = manager.get_state_registry(c.DATASET_KEY)
    if field_state.original_key not in _holder(manager, c.DATASET_KEY).obs:
        warn(f'obs["{field_state.original_key}"] is absent: every gene of the AnnData counts as measured.')
        return (None, None) if present.all() else (present[None], np.zeros(adata.n_obs, dtype=np.int64))
    table = pd.DataFrame(adata.varm[registry[c.MEASURED_GENES_KEY].attr_key])
    table = table.set_axis(table.columns.astype(str), axis=1)
    names = _holder(manager, c.DATASET_KEY).obs[field_state.original_key].astype(str)
    names = _in_order(manager, c.DATASET_KEY, names.to_numpy())
    panel, used = pd.factorize(names)
    absent = [name for name in used if name not in table]
    if absent:
        key = registry[c.MEASURED_GENES_KEY].attr_key
        raise ValueError(f'varm["{key}"] has no column for the data set{"s" * (len(absent) > 1)} {some(absent)}.')
    measured = np.zeros((len(used), len(genes)), dtype=bool)
    known = columns >= 0
    measured[:, columns[known]] = table[used].to_numpy().T[:, known]
    return measured, panel.astype(np.int64)
