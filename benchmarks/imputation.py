"""Measure how well genes are imputed that a spatial data set did not measure.

A fifth of the genes that reference and target share is taken away from the target (which fifth is decided by the seed) and
predicted from the others. The score is the correlation of prediction and truth over the target's cells, Pearson on log1p
of normalised counts and Spearman, averaged over the genes taken away. Counts are normalised by the total of the genes that
are left, the same for all. Lines that are on file are not computed again; ``--table`` prints them as Markdown.

    python benchmarks/imputation.py
    python benchmarks/imputation.py --table
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import scanpy as sc
import scipy.sparse as sp
from _common import (
    ResultFile,
    Row,
    benchmark_parser,
    kept_or_trained,
    markdown_table,
    read_dataset,
    seed_everything,
    versions,
)
from scipy.stats import rankdata
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestNeighbors

KEY = ("pair", "method", "seed", "kwargs")
PACKAGES = ("scvi-tools", "scanpy", "scikit-learn", "torch")
HELD_OUT = 0.2
N_VARIABLE = 1000

Pair = tuple[ad.AnnData, ad.AnnData]
#: predicted log1p expression (n_target, n_held_out) from reference, target without the held-out genes, and their names
Method = Callable[[ad.AnnData, ad.AnnData, list[str], int, argparse.Namespace], np.ndarray]


def compact(adata: ad.AnnData, n_cells: int) -> ad.AnnData:
    """Return the cells nearest to the middle of a section."""
    centre = np.median(adata.obsm["spatial"], axis=0)
    nearest = np.argsort(((adata.obsm["spatial"] - centre) ** 2).sum(1))[:n_cells]
    return adata[np.sort(nearest)].copy()


def xenium_region(folder: Path, region: int, n_cells: int) -> ad.AnnData:
    """Return ``n_cells`` in the middle of a region, none of them empty."""
    adata = read_dataset(folder, "xenium_breast_rep1_4regions")
    adata = adata[adata.obs["batch"] == adata.obs["batch"].astype("category").cat.categories[region]].copy()
    sc.pp.filter_cells(adata, min_counts=10)
    return compact(adata, n_cells)


def read_pair(name: str, folder: Path, n_cells: int) -> Pair:
    """Return reference and spatial target."""
    if name == "breast":
        return read_dataset(folder, "wu2021_breast_tnbc_CID4465"), xenium_region(folder, 0, n_cells)
    if name == "regions":
        reference = xenium_region(folder, 0, n_cells)
        del reference.obsm["spatial"]
        return reference, xenium_region(folder, 1, n_cells)
    reference, target = read_dataset(folder, "lymphnode_sc_ref_330"), read_dataset(folder, "visium_lymphnode_1000")
    return reference, target


PAIRS = ("breast", "regions", "lymph node")


def split(reference: ad.AnnData, target: ad.AnnData, seed: int) -> tuple[ad.AnnData, ad.AnnData, list[str]]:
    """Take a fifth of the shared genes from the target; keep in the reference what is shared and variable genes."""
    shared = [gene for gene in target.var_names if gene in set(reference.var_names)]
    detected = np.asarray((target[:, shared].X > 0).sum(0)).ravel() >= 0.01 * target.n_obs
    shared = [gene for gene, keep in zip(shared, detected, strict=True) if keep]
    held_out = sorted(np.random.default_rng(seed).choice(shared, int(HELD_OUT * len(shared)), replace=False).tolist())
    kept = [gene for gene in target.var_names if gene not in set(held_out)]
    variable = set(shared)
    if reference.n_vars > len(shared) + N_VARIABLE:
        normalised = ad.AnnData(reference.X.copy(), var=reference.var[[]])
        sc.pp.normalize_total(normalised)
        sc.pp.log1p(normalised)
        sc.pp.highly_variable_genes(normalised, n_top_genes=N_VARIABLE)
        variable |= set(reference.var_names[normalised.var["highly_variable"]])
        reference = reference[:, [gene for gene in reference.var_names if gene in variable]].copy()
    target = target[:, kept].copy()
    filled = np.asarray(target[:, [g for g in kept if g in variable]].X.sum(1)).ravel() > 0
    return reference, target[filled].copy(), held_out


def log_normalised(counts: sp.csr_matrix, total: np.ndarray) -> np.ndarray:
    """Return log1p of counts scaled to the median total, dense."""
    return np.log1p(counts.toarray() * (np.median(total[total > 0]) / np.maximum(total, 1))[:, None])


def common(reference: ad.AnnData, target: ad.AnnData, held_out: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return standardised shared genes of both, and log expression of the held-out genes in the reference."""
    genes = [gene for gene in target.var_names if gene in set(reference.var_names)]
    a, b = reference[:, genes].X, target[:, genes].X
    total_a, total_b = (np.asarray(x.sum(1)).ravel() for x in (a, b))
    x, y = log_normalised(a, total_a), log_normalised(b, total_b)
    x, y = ((v - v.mean(0)) / np.maximum(v.std(0), 1e-6) for v in (x, y))
    return x, y, log_normalised(reference[:, held_out].X, total_a)


def neighbour_mean(x: np.ndarray, y: np.ndarray, values: np.ndarray, k: int = 50) -> np.ndarray:
    """Return for each row of ``y`` the mean of ``values`` over its nearest rows of ``x``, weighted by cosine."""
    distance, index = NearestNeighbors(n_neighbors=min(k, len(x)), metric="cosine").fit(x).kneighbors(y)
    weight = np.clip(1 - distance, 1e-6, None)
    weight /= weight.sum(1, keepdims=True)
    return np.einsum("nk,nkg->ng", weight, values[index])


def knn(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """50 nearest reference cells by cosine of standardised shared genes."""
    return neighbour_mean(*common(reference, target, held_out))


def ridge(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """Ridge regression on standardised shared genes, penalty 1 a reference cell (a tenth of that was worse)."""
    x, y, values = common(reference, target, held_out)
    return Ridge(alpha=len(x)).fit(x, values).predict(y)


def spage(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """SpaGE (Abdelaal et al. 2020): principal vectors of both data sets with cosine above 0.3, then 50 nearest cells."""
    x, y, values = common(reference, target, held_out)
    n = min(50, x.shape[1] // 2, len(x) - 1, len(y) - 1)
    a, b = (PCA(n, random_state=0).fit(v).components_ for v in (x, y))
    u, cosine, _ = np.linalg.svd(a @ b.T)
    directions = (u.T @ a)[cosine > 0.3]
    return neighbour_mean(x @ directions.T, y @ directions.T, values)


def tangram(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """Tangram (Biancalani et al. 2021), cells mode, trained on the shared genes."""
    import tangram as tg

    seed_everything(seed, args.threads)
    a, b = reference.copy(), target.copy()
    sc.pp.normalize_total(a)
    genes = [gene for gene in b.var_names if gene in set(a.var_names)]
    tg.pp_adatas(a, b, genes=genes, gene_to_lowercase=False)
    mapped = tg.map_cells_to_space(a, b, mode="cells", device="cpu", num_epochs=args.tangram_epochs, random_state=seed)
    weight = np.asarray(mapped.X)
    weight = weight / weight.sum(0)
    _, _, values = common(reference, target, held_out)
    return weight.T @ values


def gimvi(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """Train gimVI (Lopez et al. 2019) on the shared genes and, in the reference, those held out."""
    from scviva import GIMVI

    seed_everything(seed, args.threads)
    genes = [gene for gene in target.var_names if gene in set(reference.var_names)]
    a, b = reference[:, genes + held_out].copy(), target[:, genes].copy()
    for x in (a, b):
        sc.pp.filter_cells(x, min_counts=1)
        GIMVI.setup_anndata(x)
    model = GIMVI(a, b)
    model.train(max_epochs=args.gimvi_epochs, accelerator=args.accelerator, enable_progress_bar=False)
    _, imputed = model.get_imputed_values(normalized=True)
    return np.log1p(np.asarray(imputed)[:, len(genes) :] * 1e3)


def cellplm(
    reference: ad.AnnData, target: ad.AnnData, held_out: list[str], seed: int, args: argparse.Namespace
) -> np.ndarray:
    """CellPLM trained on both."""
    from cellplm_scvi import CellPLM
    from cellplm_scvi.data import concat_panels

    seed_everything(seed, args.threads)
    joined = concat_panels({"reference": reference, "target": target})
    joined.obs["batch"] = joined.obs["dataset"].astype(str) + "-" + joined.obs["batch"].astype(str)
    CellPLM.setup_anndata(
        joined,
        batch_key=args.batch_key,
        dataset_key="dataset",
        sample_key="batch",
        spatial_key="spatial",
        measured_genes_key="measured_genes",
    )

    def train() -> CellPLM:
        model = CellPLM(joined, **args.cellplm_kwargs)
        defaults = {"accelerator": args.accelerator, "devices": 1, "enable_progress_bar": False}
        model.train(**{**defaults, **args.train_kwargs})
        return model

    def load(path: Path) -> CellPLM:
        return CellPLM.load(path, adata=joined, accelerator=args.accelerator)

    model = kept_or_trained(args.models, f"{reference.n_obs}-{target.n_obs}-{seed}", load, train)
    rows = np.flatnonzero(joined.obs["dataset"] == "target")
    total = np.median(np.asarray(target.X.sum(1)))
    wanted = {"indices": rows, "gene_list": held_out, "library_size": total}
    return np.log1p(model.get_imputed_expression(**wanted, **args.impute_kwargs).to_numpy())


METHODS: dict[str, Method] = {
    "kNN": knn,
    "ridge": ridge,
    "SpaGE": spage,
    "Tangram": tangram,
    "gimVI": gimvi,
    "CellPLM": cellplm,
}


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson correlations between the columns of two arrays; 0 where one is constant."""
    a, b = (x - x.mean(0) for x in (a, b))
    norm = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.where(norm > 1e-9, (a * b).sum(0) / np.maximum(norm, 1e-9), 0.0)


def scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the mean over genes of Pearson and Spearman correlation, and the median of Pearson."""
    pearson = correlation(predicted, truth)
    spearman = correlation(rankdata(predicted, axis=0), rankdata(truth, axis=0))
    found = {"pearson": pearson.mean(), "spearman": spearman.mean(), "median_pearson": np.median(pearson)}
    return {name: round(float(value), 6) for name, value in found.items()}


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for pair in args.pairs:
        data: Pair | None = None
        for seed in args.seeds:
            for name in args.methods:
                kwargs = {**args.cellplm_kwargs, **args.train_kwargs, **args.impute_kwargs} if name == "CellPLM" else {}
                identity = {"pair": pair, "method": name, "seed": seed, "kwargs": kwargs}
                if identity in results:
                    continue
                data = data or read_pair(pair, args.data, args.n_cells)
                reference, target, held_out = split(*data, seed)
                total = np.asarray(target.X.sum(1)).ravel()
                truth = log_normalised(data[1][target.obs_names, held_out].X, total)
                start = time.perf_counter()
                predicted = METHODS[name](reference, target, held_out, seed, args)
                row = {**identity, **scores(predicted, truth), "seconds": round(time.perf_counter() - start, 1)}
                row |= {"n_genes": len(held_out), "cells": [reference.n_obs, target.n_obs], "threads": args.threads}
                results.append({**row, "contended": args.contended, "versions": versions(*PACKAGES)})
                print(
                    f"{pair} {name} {seed}: {row['pearson']:.4f} {row['spearman']:.4f}, {row['seconds']} s", flush=True
                )


def table(rows: list[Row]) -> str:
    """Return the Markdown table: mean ± standard deviation over seeds."""
    columns = {
        "pearson": ("Pearson", 3),
        "spearman": ("Spearman", 3),
        "median_pearson": ("median Pearson", 3),
        "seconds": ("seconds", 0),
    }
    return markdown_table(rows, ("pair", "method", "kwargs"), columns, [*PAIRS, *METHODS])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "imputation", models=True)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--n-cells", type=int, default=4000, help="cells of a Xenium region")
    parser.add_argument("--batch-key", default=None, help="batch_key of CellPLM beside dataset_key")
    parser.add_argument("--impute-kwargs", type=json.loads, default={}, help="JSON for get_imputed_expression(...)")
    parser.add_argument("--tangram-epochs", type=int, default=500)
    parser.add_argument("--gimvi-epochs", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    """Run what is missing, or print the table."""
    args = parse_args()
    results = ResultFile(args.out, KEY)
    if not args.table:
        run(args, results)
    print(table(results.rows()))


if __name__ == "__main__":
    main()
