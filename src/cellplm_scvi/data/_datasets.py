"""Small data that come with a dependency."""

from __future__ import annotations

import numpy as np
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData


def pbmc() -> AnnData:
    """700 peripheral blood mononuclear cells x 765 genes with raw counts, from scanpy; no network is used.

    Scanpy's ``pbmc68k_reduced`` keeps log-normalised values of three decimals. A cell's smallest non-zero value belongs to
    a single count, so dividing its values (after ``expm1``) by that one gives each count to within 0.12 of an integer.

    Returns
    -------
    AnnData with counts in ``X`` (CSR, float32), cell types in ``obs["cell_type"]`` and the true library size, over all
    genes, in ``obs["n_counts"]``.
    """
    reduced = sc.datasets.pbmc68k_reduced()
    values = sp.csr_matrix(reduced.raw.X).astype(np.float64)
    values.data = np.expm1(values.data)
    smallest = np.array([row.data.min() for row in values])
    counts = sp.csr_matrix(sp.diags(1 / smallest) @ values)
    counts.data = np.rint(counts.data)
    adata = AnnData(counts.astype(np.float32), obs=reduced.obs[["n_counts"]].copy(), var=reduced.raw.var[[]].copy())
    adata.obs["cell_type"] = reduced.obs["bulk_labels"].astype("category")
    return adata
