"""What the counts of a cell decide where nothing else may: neither its row nor the frame of its coordinates."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._checks import CHUNK_ROWS
from ._table import CellTable


def content_order(table: CellTable, rows: np.ndarray) -> np.ndarray:
    """An order of cells that depends on their counts (then on their names) alone, not on their rows."""
    names = pd.util.hash_array(table.names[rows].astype(object))
    return np.lexsort((names, _keys_of(table, rows)))


def content_weights(table: CellTable, rows: np.ndarray) -> np.ndarray:
    """A pseudo-random weight in [0, 1] of each cell that its counts alone decide, (n,)."""
    return _keys_of(table, rows) / 2.0**64


def content_keys(counts: sp.csr_matrix) -> np.ndarray:
    """A pseudo-random number of each cell that its counts alone decide, (n_cells,).

    It is the sum over the cell's counts, (n_cells, n_genes), of a pseudo-random integer for each gene, modulo 2^64.
    """
    code = np.random.default_rng(0).integers(1, 2**63, size=counts.shape[1], dtype=np.uint64)
    products = counts.data.astype(np.uint64) * code[counts.indices]
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(products, dtype=np.uint64)])
    return sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]


def _keys_of(table: CellTable, rows: np.ndarray) -> np.ndarray:
    starts = range(0, rows.shape[0], CHUNK_ROWS)
    return np.concatenate([content_keys(table.counts[rows[start : start + CHUNK_ROWS]]) for start in starts])
