"""Checks of what a user hands in; each message says what was found, where, and what to do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import h5py
import lightning
import numpy as np
import pandas as pd
import scipy.sparse as sp
import scvi
import torch
from anndata import AnnData

from cellplm_scvi._compat import CSCDataset, CSRDataset

CHUNK_ROWS = 4096
#: squares of differences are finite in double precision
LARGEST_COORDINATE = 1e150


#: code between a user's line and a warning of ours, by where it lies
NOT_USERS = (
    str(Path(__file__).parents[1]),
    contextlib.__file__,
    *(path for module in (lightning, scvi, torch) for path in module.__path__),
)


def warn(message: str) -> None:
    """Warn at the user's line."""
    warnings.warn(message, UserWarning, skip_file_prefixes=NOT_USERS)


def some(names: Sequence[object] | np.ndarray | pd.Index, most: int = 3) -> str:
    """The first names in quotes: ``"A", "B", "C", ...``."""
    shown = ", ".join(f'"{name}"' for name in list(names[:most]))
    return shown + (", ..." if len(names) > most else "")


def counted(n: int, one: str, more: str | None = None) -> str:
    """A number with what there is of it: ``"1 cell has"``, ``"2,000 cells have"``; ``more`` defaults to ``one`` with an s."""
    return f"{n:,} {one if n == 1 else more or one + 's'}"


def as_names(gene_list: str | Iterable[str]) -> list[str]:
    """Genes asked for, by name."""
    if not np.iterable(gene_list):
        raise TypeError(f"gene_list={gene_list!r}: pass a list of names.")
    names = [gene_list] if isinstance(gene_list, str) else list(gene_list)
    if any(not isinstance(name, str) for name in names):
        raise TypeError(
            f"gene_list has {some([name for name in names if not isinstance(name, str)])}: pass names; of a mask, these are "
            "`adata.var_names[mask]`."
        )
    return names


def as_csr(x: Any) -> sp.csr_matrix:
    """A dense or sparse matrix in memory as CSR; types that SciPy does not have become single precision."""
    foreign = x.dtype == np.float16 or not x.dtype.isnative  # in the byte order of another machine
    return sp.csr_matrix(x.astype(np.float32) if foreign else x)


def value_chunks(x: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield stored values of a matrix, dense or sparse, in memory or backed, with the first row of each chunk."""
    if sp.issparse(x):
        yield 0, x.data
    elif isinstance(x, CSRDataset | CSCDataset):
        for start in range(0, x.shape[0], CHUNK_ROWS):
            rows: Any = x[start : start + CHUNK_ROWS]
            yield start, rows.data
    elif isinstance(x, np.ndarray | h5py.Dataset):
        for start in range(0, x.shape[0], CHUNK_ROWS):
            yield start, np.asarray(x[start : start + CHUNK_ROWS]).ravel()
    else:
        raise TypeError(
            f"Counts of type {type(x).__module__}.{type(x).__name__} are not supported. Pass a NumPy array, a SciPy "
            "sparse matrix or array, or a backed AnnData."
        )


def check_counts(x: object, where: str) -> None:
    """Raise unless every value is a finite, non-negative whole number.

    Parameters
    ----------
    x
        Matrix of counts, (n_cells, n_genes).
    where
        Its name in messages.
    """
    for _, values in value_chunks(x):
        if values.dtype.kind in "ub":
            continue
        if values.dtype.kind not in "if":
            raise TypeError(f"{where} holds values of dtype {values.dtype}; counts are needed.")
        if values.size == 0:
            continue
        low, high = values.min(), values.max()  # NaN propagates to both
        if not (np.isfinite(low) and np.isfinite(high)):
            n = int((~np.isfinite(values)).sum())
            raise ValueError(f"{where} has {n:,} missing or infinite value{'s' * (n > 1)}. Counts must be finite.")
        if low < 0:
            n = int((values < 0).sum())
            raise ValueError(
                f"{where} has {n:,} negative value{'s' * (n > 1)} (lowest {low:g}): is it scaled or corrected data? "
                "Pass raw counts, for example with `layer=`."
            )
        if values.dtype.kind == "f":
            fraction = values != np.rint(values)
            if fraction.any():
                raise ValueError(_fractional(values, fraction, where, high))


def _fractional(values: np.ndarray, fraction: np.ndarray, where: str, high: float) -> str:
    share = fraction.mean()
    if high < 25 and share > 0.5:
        guess = (
            f"it looks log-normalised (largest value {high:.3g}, {share:.0%} of the values are fractions). Pass the raw "
            'counts, for example `layer="counts"`, or `adata.raw.to_adata()` if they are kept there.'
        )
    else:
        guess = (
            f"{counted(int(fraction.sum()), 'value is a fraction', 'values are fractions')} (such as "
            f"{values[fraction][0]:g}). Pass raw counts; if these "
            "are estimated counts, round them first."
        )
    return f"{where} does not hold counts: {guess}"


def check_names(adata: AnnData) -> None:
    """Raise on no cells, no genes, or genes without a name of their own; warn of ambiguous cells."""
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise ValueError(f"The AnnData is empty: it has {adata.n_obs} cells and {adata.n_vars} genes.")
    if other := [name for name in adata.var_names if not isinstance(name, str)]:
        raise TypeError(
            f"var_names has {counted(len(other), 'name that is', 'names that are')} no text (such as {other[0]!r} "
            f"of type {type(other[0]).__name__}). "
            "Genes are matched by name: call `adata.var_names = adata.var_names.astype(str)`."
        )
    if not adata.var_names.is_unique:
        names = adata.var_names[adata.var_names.duplicated()].unique()
        raise ValueError(
            f"var_names has {len(names):,} gene name{'s' * (len(names) > 1)} more than once ({some(names)}). Genes are "
            "matched by name: call `adata.var_names_make_unique()`, or sum the columns of each gene, first."
        )
    if not adata.obs_names.is_unique:
        names = adata.obs_names[adata.obs_names.duplicated()].unique()
        warn(
            f"obs_names has {len(names):,} cell name{'s' * (len(names) > 1)} more than once ({some(names)}). Results "
            "keep the order of the rows, but cannot be joined by name; `adata.obs_names_make_unique()` mends it."
        )


def check_sizes(**sizes: int) -> None:
    """Raise if a size is not a positive whole number."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}={size!r} must be a positive whole number.")


def check_library_size(library_size: float | str) -> None:
    """Raise if it is neither a positive number nor ``"latent"``."""
    if isinstance(library_size, str) and library_size == "latent":
        return
    if not (isinstance(library_size, Real) and 0 < library_size < np.inf):
        raise ValueError(f'library_size={library_size!r} must be a positive number of counts, or "latent".')


def dense(values: Any) -> np.ndarray:
    """An array, DataFrame or sparse matrix as an array; missing values of nullable numbers are NaN."""
    if isinstance(values, pd.DataFrame) and all(map(pd.api.types.is_numeric_dtype, values.dtypes)):
        nullable = any(isinstance(dtype, pd.api.extensions.ExtensionDtype) for dtype in values.dtypes)
        return values.to_numpy(np.float64, na_value=np.nan) if nullable else values.to_numpy()
    return values.toarray() if sp.issparse(values) else np.asarray(values)


def check_column(adata: AnnData, key: str, argument: str) -> pd.Series:
    """The column ``adata.obs[key]``; raise if it is absent, or there twice."""
    if key not in adata.obs:
        columns = columns_of(adata.obs)
        # of MuData, a column may be that of a modality
        within = [name for name, part in getattr(adata, "mod", {}).items() if key in part.obs]
        hint = f' Modality "{within[0]}" has it: pass modalities={{"{argument}": "{within[0]}"}}.' if within else ""
        raise KeyError(
            f'{argument}="{key}" is not a column of adata.obs, which has {some(columns, 12) or "none"}.{hint}'
        )
    column = adata.obs[key]
    if column.ndim > 1:
        raise ValueError(f'{argument}="{key}": adata.obs has {column.shape[1]} columns of this name. Rename them.')
    return pd.Series(column)


def columns_of(obs: Any) -> list[object]:
    """Columns of a user, without those of scvi-tools."""
    return [name for name in obs.columns if not str(name).startswith("_scvi_")]


def check_no_missing(column: pd.Series, key: str, before: str = "setup_anndata") -> None:
    """Raise if a category is missing; the message says to mend it before some call."""
    missing = column.isna().to_numpy()
    if missing.any():
        n = int(missing.sum())
        raise ValueError(
            f'obs["{key}"] has {n:,} missing value{"s" * (n > 1)} (cells {some(column.index[missing])}). Fill '
            f"them or drop those cells before {before}."
        )


def check_coordinates(coordinates: np.ndarray, key: str, obs_names: pd.Index, n_dims: int | None = None) -> None:
    """Raise unless coordinates are (n_cells, 2 or 3), or of the number that is asked for, each row finite or all NaN."""
    if coordinates.ndim != 2 or coordinates.shape[1] not in (2, 3):
        raise ValueError(
            f'obsm["{key}"] has shape {coordinates.shape}; coordinates are (n_cells, 2) or (n_cells, 3), such as '
            f'`adata.obsm["{key}"][:, :2]`.'
        )
    if n_dims is not None and coordinates.shape[1] != n_dims:
        raise ValueError(f'obsm["{key}"] has {coordinates.shape[1]} columns; the model was set up with {n_dims}.')
    if coordinates.dtype.kind not in "iuf":
        raise TypeError(f'obsm["{key}"] has dtype {coordinates.dtype}; coordinates are numbers.')
    if coordinates.dtype.kind != "f":
        return
    for what, bad in {
        "infinite coordinates": np.isinf(coordinates).any(1),
        f"coordinates beyond {LARGEST_COORDINATE:g}, whose distances cannot be computed": (
            (np.abs(coordinates, dtype=np.float64) > LARGEST_COORDINATE) & np.isfinite(coordinates)
        ).any(1),
        "coordinates of which only some are NaN": np.isnan(coordinates).any(1) & ~np.isnan(coordinates).all(1),
    }.items():
        if bad.any():
            raise ValueError(
                f'obsm["{key}"]: {counted(int(bad.sum()), "cell has", "cells have")} {what} (cells '
                f"{some(obs_names[bad])}). A cell "
                "without a position has NaN in its whole row."
            )


def check_library_sizes(column: pd.Series, key: str) -> None:
    """Raise unless all library sizes, by cell, are numbers of counts."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~(np.isfinite(values) & (values >= 0))  # that of a cell without any count may be zero
    if bad.any():
        raise ValueError(
            f'obs["{key}"] is the library size of each cell, in counts: '
            f"{counted(int(bad.sum()), 'value is', 'values are')} missing, negative or no "
            f"number (cells {some(column.index[bad])})."
        )


def check_library(totals: np.ndarray, library: np.ndarray, names: np.ndarray) -> None:
    """Raise if the library size of a cell is smaller than the sum of its counts; each (n_cells,)."""
    short = library < totals * (1 - 1e-4)
    if short.any():
        raise ValueError(
            f"The library size (size_factor_key) of {counted(int(short.sum()), 'cell')} is smaller than the sum of "
            "counts "
            f"(cells {some(names[short])}). It is the total of each cell over all genes, in counts."
        )
