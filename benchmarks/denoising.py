"""Measure denoising by molecular cross-validation and by masked counts.

Molecular cross-validation (Batson et al. 2019, as in OpenProblems): the molecules of each cell are split at random, nine
tenths to denoise and the rest to score, so that only signal is shared. Scores are the mean squared error of log1p of counts
per 10,000, and the Poisson loss of the held-out counts given what was denoised, scaled to their total. Masked counts (Wen et
al. 2024): a tenth of the non-zero counts is set to zero, and RMSE and MAE of log1p of counts per 10,000 are computed there.
Lines that are on file are not computed again; ``--table`` prints them as Markdown.

    python benchmarks/denoising.py
    python benchmarks/denoising.py --table
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp
from _common import (
    ResultFile,
    Row,
    benchmark_parser,
    markdown_table,
    read_dataset,
    seed_everything,
    versions,
)
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

KEY = ("dataset", "method", "seed", "protocol", "kwargs")
PACKAGES = ("scvi-tools", "scanpy", "scikit-learn", "magic-impute", "torch")
TRAIN_SHARE = 0.9
MASKED_SHARE = 0.1
PER_CELL = 1e4

#: data set -> column of batches, most cells, most genes (the most often detected); None for all
DATASETS: dict[str, tuple[str | None, int | None, int | None]] = {
    "pbmc3k_labelled": (None, None, 3000),
    "kang2018_ctrl_8donors": ("batch", 4000, None),
    "wu2021_breast_tnbc_CID4465": (None, None, 3000),
}
PROTOCOLS = ("molecules", "masked")

#: results that say nothing under a protocol
BESIDE_THE_POINT = {"molecules": "non-zero", "masked": "log, held-out depth"}

#: denoised counts, in the scale of the counts given, (n_cells, n_genes), or several by name
Method = Callable[[ad.AnnData, int, argparse.Namespace], np.ndarray | dict[str, np.ndarray]]


def read_counts(folder: Path, name: str) -> ad.AnnData:
    """Cells and genes of a data set, the same for every method and seed; genes are chosen without looking at values."""
    batch, n_cells, n_genes = DATASETS[name]
    adata = read_dataset(folder, name)
    adata = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32), obs=adata.obs.copy(), var=adata.var[[]].copy())
    adata.obs["batch"] = adata.obs[batch].astype(str) if batch else "all"
    if n_cells is not None and adata.n_obs > n_cells:
        adata = adata[np.sort(np.random.default_rng(0).choice(adata.n_obs, n_cells, replace=False))].copy()
    detected = np.asarray((adata.X > 0).sum(0)).ravel()
    keep = np.argsort(-detected, kind="stable")[: n_genes or adata.n_vars]
    return adata[:, np.sort(keep[detected[keep] > 10])].copy()


def split_molecules(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, sp.csr_matrix]:
    """What is denoised, and the counts that it is scored on; genes without a molecule on either side stay."""
    rng = np.random.default_rng([seed, 1])
    kept = adata.X.copy()
    kept.data = rng.binomial(kept.data.astype(np.int64), TRAIN_SHARE).astype(np.float32)
    held_out = (adata.X - kept).tocsr()
    kept.eliminate_zeros()
    held_out.eliminate_zeros()
    return ad.AnnData(kept, obs=adata.obs.copy(), var=adata.var.copy()), held_out


def mask_counts(adata: ad.AnnData, seed: int) -> tuple[ad.AnnData, np.ndarray]:
    """Counts with a tenth of the non-zero ones set to zero, and which those are, among the stored ones."""
    masked = np.random.default_rng([seed, 2]).random(adata.X.nnz) < MASKED_SHARE
    kept = adata.X.copy()
    kept.data[masked] = 0
    kept.eliminate_zeros()
    return ad.AnnData(kept, obs=adata.obs.copy(), var=adata.var.copy()), masked


def log_normalised(x: np.ndarray) -> np.ndarray:
    """log1p of counts per 10,000."""
    return np.log1p(x * (PER_CELL / np.maximum(x.sum(1, keepdims=True), 1e-9)))


def score_molecules(denoised: np.ndarray, given: sp.csr_matrix, held_out: sp.csr_matrix) -> dict[str, float]:
    """Mean squared error of log-normalised counts, and Poisson loss, over all cells and genes."""
    truth = held_out.toarray()
    mean = denoised * (truth.sum() / given.sum())
    return {
        "mse": float(np.mean((log_normalised(denoised) - log_normalised(truth)) ** 2)),
        "poisson": float(np.mean(mean - truth * np.log(mean + 1e-6))),
    }


def score_masked(denoised: np.ndarray, whole: sp.csr_matrix, masked: np.ndarray) -> dict[str, float]:
    """RMSE and MAE of log-normalised counts where they were masked; both sides by the total of the whole cell."""
    rows = np.repeat(np.arange(whole.shape[0]), np.diff(whole.indptr))[masked]
    genes = whole.indices[masked]
    scale = PER_CELL / np.asarray(whole.sum(1)).ravel()[rows]
    error = np.log1p(denoised[rows, genes] * scale) - np.log1p(whole.data[masked] * scale)
    return {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error)))}


def no_denoising(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> np.ndarray:
    """The counts themselves."""
    return adata.X.toarray()


def knn_smoothing(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> np.ndarray:
    """Mean normalised counts of the 15 nearest cells by 30 PCs of square roots (Wagner et al. 2018), own cell included."""
    x = adata.X.toarray()
    total = x.sum(1, keepdims=True)
    share = x / np.maximum(total, 1)
    pcs = PCA(min(30, min(x.shape) - 1), random_state=seed).fit_transform(np.sqrt(share * np.median(total)))
    index = NearestNeighbors(n_neighbors=15).fit(pcs).kneighbors(return_distance=False)
    index = np.concatenate([np.arange(len(x))[:, None], index[:, :14]], 1)
    return share[index].mean(1) * total


def magic(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> np.ndarray:
    """MAGIC (van Dijk et al. 2018) with its defaults, on square roots of normalised counts as its authors advise."""
    import magic as magic_impute

    x = adata.X.toarray()
    total = x.sum(1, keepdims=True)
    scale = np.median(total) / np.maximum(total, 1)
    operator = magic_impute.MAGIC(random_state=seed, verbose=0, n_jobs=args.threads)
    smooth = np.asarray(operator.fit_transform(np.sqrt(x * scale), genes="all_genes"))
    return np.square(np.maximum(smooth, 0)) / scale


def alra(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> np.ndarray:
    """ALRA (Linderman et al. 2022): low-rank approximation, thresholded and rescaled gene by gene."""
    counts = adata.X.toarray()
    total = counts.sum(1, keepdims=True)
    x = log_normalised(counts)
    model = PCA(min(100, min(x.shape) - 1), svd_solver="randomized", random_state=seed).fit(x)
    gaps = -np.diff(model.singular_values_)
    noise = gaps[79:] if len(gaps) > 90 else gaps[len(gaps) // 2 :]
    rank = max(2, int(np.flatnonzero(gaps > noise.mean() + 6 * noise.std())[-1]) + 1 if len(gaps) else 2)
    components = model.components_[:rank]
    low = (x - model.mean_) @ components.T @ components + model.mean_
    low[low <= np.abs(low.min(0))] = 0
    for gene in range(x.shape[1]):
        seen, kept = x[:, gene] > 0, low[:, gene] > 0
        if seen.sum() > 1 and kept.sum() > 1 and low[kept, gene].std() > 0:
            values = low[kept, gene]
            values = (values - values.mean()) * (x[seen, gene].std() / values.std()) + x[seen, gene].mean()
            low[kept, gene] = np.where(values > 0, values, low[kept, gene])
    low = np.where((low <= 0) & (x > 0), x, low)
    return np.expm1(low) * total / PER_CELL


def scvi(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> np.ndarray:
    """Train scVI with its defaults."""
    from scvi.model import SCVI

    seed_everything(seed, args.threads)
    adata = adata.copy()
    SCVI.setup_anndata(adata, batch_key="batch")
    model = SCVI(adata)
    model.train(accelerator=args.accelerator, enable_progress_bar=False, max_epochs=args.scvi_epochs)
    return model.get_normalized_expression(library_size="latent", return_numpy=True)


def cellplm(adata: ad.AnnData, seed: int, args: argparse.Namespace) -> dict[str, np.ndarray]:
    """CellPLM, trained on the same cells.

    ``""``: what decoder and counts say together; ``"decoder"``: the former alone; ``"log"``: counts whose log1p is the
    expected log1p, at the cell's own depth, and at that of the held-out molecules; ``"non-zero"``: likewise of counts that
    are known not to be zero, as the masked ones are.
    """
    import torch

    from cellplm_scvi import CellPLM
    from cellplm_scvi.nn import nb_expected_log1p

    seed_everything(seed, args.threads)
    adata = adata.copy()
    CellPLM.setup_anndata(adata, batch_key="batch")
    model = CellPLM(adata, **args.cellplm_kwargs)
    defaults = {"accelerator": args.accelerator, "devices": 1, "enable_progress_bar": False}
    model.train(**{**defaults, **args.train_kwargs})
    total = np.asarray(adata.X.sum(1))
    held_out_depth = float(np.median(total)) * (1 - TRAIN_SHARE) / TRAIN_SHARE

    def counts(log: np.ndarray) -> np.ndarray:
        return np.expm1(log) * total / PER_CELL

    decoded = model.get_normalized_expression(library_size="latent", return_numpy=True)
    expected_log = partial(model.get_denoised_expression, library_size=PER_CELL, log1p=True, return_numpy=True)
    theta = model.module.decoder.log_theta.exp().detach().numpy()
    mean, scale = torch.from_numpy(decoded), torch.from_numpy((PER_CELL / total).astype(np.float32))
    non_zero = -np.expm1(-theta * np.log1p(decoded / theta))
    given_non_zero = nb_expected_log1p(mean, torch.from_numpy(theta), scale).numpy() / np.maximum(non_zero, 1e-12)
    return {
        "": model.get_denoised_expression(library_size="latent", return_numpy=True),
        "decoder": decoded,
        "log": counts(expected_log()),
        "log, held-out depth": counts(expected_log(depth=held_out_depth)),
        "non-zero": counts(given_non_zero),
    }


METHODS: dict[str, Method] = {
    "no denoising": no_denoising,
    "kNN smoothing": knn_smoothing,
    "MAGIC": magic,
    "ALRA": alra,
    "scVI": scvi,
    "CellPLM": cellplm,
}


def evaluate(
    adata: ad.AnnData, method: Method, protocol: str, seed: int, args: argparse.Namespace
) -> Iterator[tuple[str, Row]]:
    """Scores and seconds of each result of a method."""
    if protocol == "molecules":
        given, held_out = split_molecules(adata, seed)
    else:
        given, masked = mask_counts(adata, seed)
    start = time.perf_counter()
    results = method(given, seed, args)
    seconds = time.perf_counter() - start
    for variant, denoised in results.items() if isinstance(results, dict) else [("", results)]:
        if variant == BESIDE_THE_POINT[protocol]:
            continue
        denoised = np.maximum(denoised, 0)
        if protocol == "molecules":
            scores = score_molecules(denoised, given.X, held_out)
        else:
            scores = score_masked(denoised, adata.X, masked)
        yield variant, {name: round(value, 6) for name, value in scores.items()} | {"seconds": round(seconds, 1)}


def run(args: argparse.Namespace, results: ResultFile) -> None:
    """Compute and append every result that is not on file."""
    for dataset in args.datasets:
        adata: ad.AnnData | None = None
        for seed in args.seeds:
            for protocol in args.protocols:
                for name in args.methods:
                    kwargs = {**args.cellplm_kwargs, **args.train_kwargs} if name == "CellPLM" else {}
                    row: Row = {"dataset": dataset, "method": name, "seed": seed, "protocol": protocol}
                    row["kwargs"] = kwargs
                    if row in results:
                        continue
                    adata = read_counts(args.data, dataset) if adata is None else adata
                    sizes = {"n_cells": adata.n_obs, "n_genes": adata.n_vars, "threads": args.threads}
                    for variant, found in evaluate(adata, METHODS[name], protocol, seed, args):
                        found |= {"method": f"{name}, {variant}" if variant else name}
                        print(dataset, protocol, seed, found, flush=True)
                        results.append(
                            row | found | sizes | {"contended": args.contended, "versions": versions(*PACKAGES)}
                        )


def table(rows: list[Row]) -> str:
    """Return the Markdown tables: mean ± standard deviation over seeds."""
    order = [*DATASETS, *METHODS]
    columns = {
        "molecules": {"mse": ("MSE", 4), "poisson": ("Poisson loss", 4), "seconds": ("seconds", 0)},
        "masked": {"rmse": ("RMSE", 3), "mae": ("MAE", 3), "seconds": ("seconds", 0)},
    }
    parts = []
    for protocol in PROTOCOLS:
        some = [row for row in rows if row["protocol"] == protocol]
        if some:
            parts.append(markdown_table(some, ("dataset", "method", "kwargs"), columns[protocol], order))
    return "\n\n".join(parts)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = benchmark_parser(__doc__, "denoising")
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--protocols", nargs="+", choices=PROTOCOLS, default=list(PROTOCOLS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--scvi-epochs", type=int, default=None, help="epochs of scVI; its own default otherwise")
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
