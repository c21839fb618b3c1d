"""Differential expression between groups of cells, among the genes that both have measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scvi import settings
from scvi.utils import track

from cellplm_scvi._compat import AnnOrMuData, compare_groups
from cellplm_scvi.data._checks import CHUNK_ROWS, columns_of, counted, some, warn

from ._embedding import fixed_draws
from ._pretrained import check_words

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

    from cellplm_scvi.data._table import CellTable

DifferentialMode = Literal["vanilla", "change"]

#: column of row numbers in a copy of ``obs``
ROW = "_cellplm_row"


class DifferentialMixin:
    """Compares the expression of groups of cells."""

    def differential_expression(
        self,
        adata: AnnOrMuData | None = None,
        groupby: str | None = None,
        group1: Sequence[str] | str | None = None,
        group2: str | None = None,
        idx1: Sequence[int] | Sequence[bool] | str | None = None,
        idx2: Sequence[int] | Sequence[bool] | str | None = None,
        mode: DifferentialMode = "vanilla",
        delta: float = 0.25,
        batch_size: int | None = None,
        all_stats: bool = True,
        batch_correction: bool = False,
        batchid1: Sequence[str] | None = None,
        batchid2: Sequence[str] | None = None,
        fdr_target: float = 0.05,
        silent: bool = False,
        weights: Literal["uniform"] | None = "uniform",
        filter_outlier_cells: bool = False,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """Bayesian differential expression between groups of cells (Boyeau et al. 2019), as in scvi-tools.

        Where data sets measured different genes, a gene is compared between the cells that measured it, and is NaN where
        none of a group did. Genes that the model does not know are not compared.

        Parameters
        ----------
        adata
            ``None`` is the AnnData that the model was built with.
        groupby, group1, group2, idx1, idx2, mode, delta, batch_size, all_stats, batch_correction, batchid1, batchid2,\
 fdr_target, silent, weights, filter_outlier_cells, **kwargs
            As in :meth:`scvi.model.SCVI.differential_expression`.

        Returns
        -------
        DataFrame with a row a gene and comparison.

        Raises
        ------
        ValueError
            If a group has no cell, or two groups have no gene in common.
        """
        if not batch_correction and (batchid1 is not None or batchid2 is not None):
            raise ValueError("batchid1 and batchid2 are batches to decode in, which batch_correction=True does.")
        check_words(mode=(mode, get_args(DifferentialMode)))
        batches1, batches2 = ([one] if isinstance(one, str) else one for one in (batchid1, batchid2))
        adata = self._validate_anndata(adata)  # type: ignore[attr-defined]
        manager = self.get_anndata_manager(adata, required=True)  # type: ignore[attr-defined]
        genes, names = self._genes(manager, None)  # type: ignore[attr-defined]
        unknown = self._gene_names(manager).difference(names)  # type: ignore[attr-defined]
        if len(unknown):
            genes_are = counted(len(unknown), "gene of this AnnData is", "genes of this AnnData are")
            warn(f"{genes_are} unknown to the model ({some(unknown)}), and not compared.")
        rows_of = partial(self._rows, adata.obs_names)  # type: ignore[attr-defined]
        comparisons = list(_comparisons(pd.DataFrame(adata.obs), rows_of, groupby, group1, group2, idx1, idx2))

        def representation(_: object, indices: np.ndarray) -> np.ndarray:
            return self.get_latent_representation(adata, indices=indices, align_batches=False)  # type: ignore[attr-defined]

        def shares_of(kept: np.ndarray, _: object, **cells: Any) -> np.ndarray:
            shares = self.get_normalized_expression(  # type: ignore[attr-defined]
                adata, return_numpy=True, n_samples=1, batch_size=batch_size, weights=weights, **cells
            )
            return _where_measured(shares[:, kept])

        results = []
        with self._encoded_once(adata), fixed_draws(), fixed_numpy_draws():  # type: ignore[attr-defined]
            table: CellTable = self._table(adata)  # type: ignore[attr-defined]
            for asked in track(comparisons, description="DE...", disable=silent):
                in_both = np.minimum(_n_measured(table, asked.first), _n_measured(table, asked.second)) > 0
                kept = np.flatnonzero(in_both[genes])
                if kept.size == 0:
                    raise ValueError("No gene was measured in both groups.")
                found = compare_groups(
                    _Registered(manager, asked.obs, _Columns(table, genes[kept])),
                    partial(shares_of, kept),
                    representation if filter_outlier_cells else None,
                    *asked.arguments,
                    all_stats,
                    _count_statistics,
                    names[kept],
                    mode,
                    batches1,
                    batches2,
                    delta,
                    batch_correction,
                    fdr_target,
                    True,  # the bar is here
                    **kwargs,
                )
                results.append(_with_all_genes(found, names))
        return pd.concat(results)


@dataclass(frozen=True)
class _Comparison:
    """Cells of two groups, (n_cells,) boolean, and what scvi-tools is told of them.

    Parameters
    ----------
    first, second
        Members.
    obs
        Table of cells with the column that the arguments name.
    arguments
        ``groupby, group1, group2, idx1, idx2``.
    """

    first: np.ndarray
    second: np.ndarray
    obs: pd.DataFrame
    arguments: tuple[Any, ...]


def _comparisons(
    obs: pd.DataFrame,
    rows_of: Callable[[np.ndarray | pd.Series], np.ndarray],
    groupby: str | None,
    group1: Any,
    group2: Any,
    idx1: Any,
    idx2: Any,
) -> Iterator[_Comparison]:
    """The comparisons that are asked for, as scvi-tools understands the arguments."""

    def members(name: str, cells: Any) -> np.ndarray:
        if isinstance(cells, str):
            try:
                # by number: names may repeat
                cells = obs.assign(**{ROW: np.arange(len(obs))}).query(cells)[ROW]
            except Exception as error:  # whatever pandas raises
                columns = some(columns_of(obs), 12) or "none"
                raise ValueError(f"{name}={cells!r} is no query of adata.obs, which has {columns}: {error}") from error
        mask = np.zeros(len(obs), dtype=bool)
        try:
            mask[rows_of(cells if isinstance(cells, pd.Series) else np.asarray(cells).ravel())] = True
        except (IndexError, TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        return mask

    if idx1 is None and (groupby is None or idx2 is not None):
        raise ValueError('Say which cells to compare: groupby="cell_type", or idx1, with idx2 or all other cells.')
    if idx1 is not None:
        first = members("idx1", idx1)
        second = ~first if idx2 is None else members("idx2", idx2)
        for name, cells in (("idx1", first), ("idx2", second)):
            if not cells.any():
                raise ValueError(f"{name} has no cell.")
        # a cell of both counts as one of the second
        if not (first & ~second).any():
            raise ValueError("Each cell of idx1 is one of idx2 too: there is nothing to compare.")
        if both := int(np.count_nonzero(first & second)):
            warn(
                f"{counted(both, 'cell is', 'cells are')} in idx1 and in idx2: they count as cells of the second group."
            )
        yield _Comparison(first, second, obs[[]].copy(), (None, None, None, first, None if idx2 is None else second))
        return
    if groupby not in obs:
        raise KeyError(
            f'groupby="{groupby}" is not a column of adata.obs, which has {some(columns_of(obs), 12) or "none"}. '
            "MuData get those of their modalities by `mdata.pull_obs()`."
        )
    if group2 is not None and not isinstance(group2, str) and np.iterable(group2):
        raise TypeError(f"group2={group2!r} is one group. For the cells of several, pass idx1 and idx2.")
    # compared with a name, a missing category is False, where that of a nullable column is missing
    column = obs[groupby].astype("category").cat.remove_unused_categories()
    groups = column.cat.categories.tolist()
    if group1 is None and len(groups) < 2:
        found = f"one group only ({some(groups)})" if groups else "no value"
        raise ValueError(f'obs["{groupby}"] has {found}: there is nothing to compare.')
    chosen = groups if group1 is None else group1
    chosen = [chosen] if isinstance(chosen, str) or not np.iterable(chosen) else list(chosen)
    if not chosen:
        raise ValueError("group1 is empty: name groups to compare, or pass None for each of them.")
    if group1 is None and group2 is not None:
        chosen = [name for name in chosen if name != group2]
    for name in chosen:
        if group2 is not None and name == group2:
            raise ValueError(f"group1 and group2 are both {group2!r}: there is nothing to compare.")
        first = (column == name).to_numpy()
        second = ~first if group2 is None else (column == group2).to_numpy()
        for group, cells in ((name, first), (group2, second)):
            if not cells.any():
                # quotes tell "1" from 1
                wanted, *known = (f'"{x}"' if isinstance(x, str) else str(x) for x in (group, *groups[:4]))
                there = ", ".join(known[:3]) + (", ..." if len(groups) > 3 else "")
                raise ValueError(f'obs["{groupby}"] has no cell of the group {wanted}; it has {there}.')
        yield _Comparison(first, second, column.to_frame(), (groupby, [name], group2, None, None))


class _Columns:
    """Counts of some genes, by rows."""

    def __init__(self, table: CellTable, genes: np.ndarray):
        self.table = table
        self.genes = genes

    def __getitem__(self, rows: np.ndarray) -> sp.csr_matrix:
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        return self.table.counts[rows][:, self.genes]


@dataclass
class _Obs:
    """What scvi-tools reads of an AnnData, and writes to it."""

    obs: pd.DataFrame
    uns: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        return self.obs.shape


class _Registered:
    """The manager of the data as scvi-tools' comparison sees it: some genes, and a table of cells of its own."""

    def __init__(self, manager: AnnDataManager, obs: pd.DataFrame, counts: _Columns):
        self.adata = _Obs(obs)
        self.counts = counts
        self.get_state_registry = manager.get_state_registry

    def get_from_registry(self, key: str) -> _Columns:
        """The counts, which is all that is asked for."""
        return self.counts


def _count_statistics(registered: _Registered, cells1: np.ndarray, cells2: np.ndarray) -> dict[str, np.ndarray]:
    """Means of counts, and of counts per 10,000, and share of cells with a count, of each gene in both groups."""
    table, genes = registered.counts.table, registered.counts.genes
    means = []
    for cells in (cells1, cells2):
        rows = np.flatnonzero(cells)
        total, present, relative = np.zeros((3, genes.size))
        for start in range(0, rows.size, CHUNK_ROWS):
            part = rows[start : start + CHUNK_ROWS]
            counts = registered.counts[part]
            counts.eliminate_zeros()
            total += counts.sum(0, dtype=np.float64).A1
            present += counts.getnnz(0)
            relative += (1e4 / np.maximum(table.totals[part], 1e-8)) @ counts
        means.append(np.stack([total, present, relative]) / np.maximum(_n_measured(table, cells)[genes], 1))
    names = ("raw_mean", "non_zeros_proportion", "raw_normalized_mean")
    return {f"{name}{n + 1}": means[n][i] for i, name in enumerate(names) for n in (0, 1)}


def _n_measured(table: CellTable, cells: np.ndarray) -> np.ndarray:
    """How many of the cells, (n_cells,) boolean, measured each gene, (n_genes,)."""
    if table.measured is None or table.panel is None:
        return np.full(table.counts.n_genes, np.count_nonzero(cells))
    return np.bincount(table.panel[cells], minlength=len(table.measured)) @ table.measured


def _where_measured(shares: np.ndarray) -> np.ndarray:
    """Draws of genes, (n_draws, n_genes), with others of the same gene in place of those of cells that did not measure it."""
    absent = np.isnan(shares)
    for gene in np.flatnonzero(absent.any(0) & ~absent.all(0)):
        there = shares[~absent[:, gene], gene]
        shares[absent[:, gene], gene] = np.random.choice(there, absent[:, gene].sum())  # noqa: NPY002
    return np.nan_to_num(shares, copy=False)


def _with_all_genes(found: pd.DataFrame, names: pd.Index) -> pd.DataFrame:
    """The result of a comparison with NaN for the genes that were not compared, last."""
    absent = names.difference(found.index, sort=False)
    if absent.empty:
        return found
    unknown = {"f": np.nan, "b": False}
    # the rest are names of the comparison
    values = {name: unknown.get(column.dtype.kind, column.iloc[0]) for name, column in found.items()}
    return pd.concat([found, pd.DataFrame(values, index=absent)])


@contextmanager
def fixed_numpy_draws() -> Iterator[None]:
    """The same for NumPy's global generator, which pairs of cells are drawn from, as :func:`fixed_draws` for torch's."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(settings.seed or 0)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
